"""An exported model is an ordinary Hugging Face folder: plain transformers and plain vLLM load it and answer alike."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loop import GREEDY, random_prompts

SCRIPT = Path(__file__).with_name("greedy.py")


@pytest.mark.timeout(180)
def test_transformers_and_vllm_give_the_engines_greedy_answers(loop, tmp_path):
    prompts = random_prompts(12, 20, seed=3)
    loop.push()
    for _ in range(3):
        loop.update(prompts)
        loop.push()
    loop.learner.export(str(tmp_path / "export"))
    served = [list(group.completions[0].token_ids) for group in loop.sample(prompts, GREEDY, group_size=1)]
    (tmp_path / "prompts.json").write_text(json.dumps([prompt.token_ids for prompt in prompts]))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "export").iterdir()}
    for library in ("transformers", "vllm"):
        answers = tmp_path / f"{library}.json"
        subprocess.run([sys.executable, SCRIPT, library, tmp_path / "export", tmp_path / "prompts.json", answers],
                       check=True, timeout=120, capture_output=True)
        given = [answer[:GREEDY.max_new_tokens] for answer in json.loads(answers.read_text())]
        assert given == served, library
    assert len({tuple(answer) for answer in served}) > 1
