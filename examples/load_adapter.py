"""The adapter of a run, loaded by peft on its base, beside the merged model."""
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "runs/chat_lora/export"
tokens = AutoTokenizer.from_pretrained(folder)("What do bees make?", return_tensors="pt")
adapted = AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapter", dtype=torch.float32)
merged = AutoModelForCausalLM.from_pretrained(folder)
with torch.no_grad():
    difference = (adapted(**tokens).logits - merged(**tokens).logits).abs().max()
print(f"largest difference of logits: {difference:.1e}")
