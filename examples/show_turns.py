"""Show completions of a trace file; tokens that the policy did not choose stand in brackets."""
import json

from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("runs/calls/export")
with open("runs/turns/rollouts.jsonl") as file:
    for row in map(json.loads, file):
        completion = row["completions"][0]
        shown = ""
        for token, chosen in zip(completion["token_ids"], completion["loss_mask"]):
            text = tokenizer.decode([token], skip_special_tokens=True)
            shown += text if chosen else f"[{text}]"
        print(f"{row['messages'][0]['content']:8} -> {shown:24} reward {completion['reward']}")
