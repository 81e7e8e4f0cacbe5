"""`frpo evaluate` on a random model: a real engine serves what lies on disk, and metrics are those of the traces."""
from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from frpo.config.loader import recipe_from_dict
from frpo.errors import EngineError
from frpo.evaluation.model import run_evaluate
from loop import random_model

SAMPLES = 4


@pytest.fixture
def recipe(tmp_path):
    """Ten held-out prompts and a reward that some completions of a random model earn."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(12)))
    (tmp_path / "reward.py").write_text(
        "def even(completions, **columns):\n    return [float(sum(map(ord, text)) % 2 == 0) for text in completions]\n")
    return recipe_from_dict({
        "run": {"device": "cpu"}, "model": {"path": "not/there", "dtype": "fp32", "max_length": 64},
        "data": {"path": str(tmp_path / "rows.jsonl"), "format": "text", "heldout": 10, "max_prompt_tokens": 16},
        "rollout": {"max_new_tokens": 5, "kv_cache_mb": 32, "threads": 1},
        "rewards": [{"name": "even", "function": f"{tmp_path / 'reward.py'}:even"}],
        "evaluate": {"samples": SAMPLES, "pass_at": [1, 2, 4]}})


@pytest.mark.timeout(120)
def test_an_export_is_served_as_it_lies_there_and_counted_right(ray_cluster, recipe, tmp_path, capsys):
    model = random_model(tmp_path / "model", "qwen2", tied=True)
    assert run_evaluate(recipe, model, None) == 0
    metrics = json.loads((tmp_path / "model" / "evaluation.json").read_text())["metrics"]
    lines = (tmp_path / "model" / "evaluation.traces.jsonl").read_text().splitlines()
    groups = [json.loads(line)["completions"] for line in lines]
    assert [len(group) for group in groups] == [SAMPLES] * 10

    rewards = np.array([[completion["reward"] for completion in group] for group in groups])
    assert 0 < rewards.mean() < 1, "all completions are worth the same: nothing is counted"
    for k in (1, 2, 4):
        shares = [np.mean([max(subset) for subset in combinations(row, k)]) for row in rewards]
        assert metrics[f"eval/pass@{k}"] == pytest.approx(np.mean(shares))
        assert metrics[f"eval/pass@{k}/interval"] == pytest.approx(2.262 * np.std(shares, ddof=1) / math.sqrt(10))
    assert metrics["eval/reward"] == pytest.approx(rewards.mean())
    assert "pass@4" in capsys.readouterr().out

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for line in lines[:3]:
        row = json.loads(line)
        prompt, completion = row["prompt_token_ids"], row["completions"][0]
        assert completion["version_spans"] == [[0, 0, len(completion["token_ids"])]]
        with torch.no_grad():
            logits = network(torch.tensor([prompt + completion["token_ids"]])).logits[0, len(prompt) - 1:-1]
        own = logits.log_softmax(-1).gather(1, torch.tensor(completion["token_ids"])[:, None])[:, 0]
        assert completion["logprobs"] == pytest.approx(own.tolist(), abs=1e-4)


@pytest.mark.timeout(180)
def test_an_engine_with_pushed_weights_does_not_pass_them_off_as_loaded(loop):
    loop.push()
    with pytest.raises(EngineError, match=f"engine 0: it already serves version {loop.version}; label weights"):
        loop.pool.serve_loaded(0)
