"""Greedy answers of an exported model from plain transformers or plain vLLM: nothing of frpo is imported here.

    python greedy.py {transformers,vllm} EXPORT PROMPTS.json ANSWERS.json      (PROMPTS: lists of token ids)
"""
from __future__ import annotations

import json
import os
import sys
from pathlib import Path

NEW_TOKENS = 12


def transformers_answers(export: str, prompts: list[list[int]]) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(export, dtype="auto")
    eos = AutoTokenizer.from_pretrained(export).eos_token_id
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        answer = output[0, len(prompt):].tolist()
        answers.append(answer[:answer.index(eos) + 1] if eos in answer else answer)
    return answers


def vllm_answers(export: str, prompts: list[list[int]]) -> list[list[int]]:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
                   "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2"}
    from vllm import LLM, SamplingParams

    # "auto" would serve these float32 weights in a 16-bit type, which flips near ties.
    llm = LLM(model=export, enforce_eager=True, kv_cache_memory_bytes=64 * 2**20, dtype="float32",
              max_model_len=max(map(len, prompts)) + NEW_TOKENS)  # a long window would ask for more cache
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    answer = {"transformers": transformers_answers, "vllm": vllm_answers}[sys.argv[1]]
    Path(sys.argv[4]).write_text(json.dumps(answer(sys.argv[2], json.loads(Path(sys.argv[3]).read_text()))))
