"""Load what examples/chat_rl.yaml has trained in plain transformers, and ask it something."""
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "runs/chat_rl/export"
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
asked = [{"role": "user", "content": "What is the capital of Spain?"}]
tokens = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**tokens, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(answer[0, tokens["input_ids"].shape[1]:], skip_special_tokens=True))
