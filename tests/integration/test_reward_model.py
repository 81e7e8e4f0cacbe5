"""Reward and cost models: what they learn of a known rule, their export elsewhere, the same numbers on all ranks."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from frpo.config.loader import load_recipe
from frpo.config.preference import RewardModelRecipe
from frpo.data.preferences import load_pairs
from frpo.lab import preferences
from frpo.learner.model import load_tokenizer
from frpo.loops.reward_model import RewardModelTrainer
from frpo.run.build_finetune import check_finetune, finetune_on
from loop import random_model, splitting_strategy
from runs import lines, metrics

LAUNCHER = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus"]
PORT = str(29900 + os.getpid() % 90)
SEED, UPDATES = 7, 9


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the laboratory's pairs, sums with a right and a wrong answer, a model, and a ZeRO-3 strategy."""
    folder = tmp_path_factory.mktemp("reward_model")
    preferences.prepare(folder / "lab", SEED)
    rows = [{"prompt": f"{a}+{b}=", "response_0": str(a + b), "response_1": str(a * b + 11), "better_response_id": 0,
             "safer_response_id": 0, "is_response_0_safe": True, "is_response_1_safe": False}
            for a in range(10) for b in range(5)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    random_model(folder / "model", "qwen2", tied=True)
    splitting_strategy(folder, 3)
    return folder


def lab(place: Path, kind: str) -> Path:
    """Train the laboratory's reward or cost model as a user does. Returns the run's folder."""
    command = [sys.executable, "-m", "frpo", "reward-model", f"lab_{kind}_model", f"run.dir={place / kind}",
               f"model.path={place / 'lab' / 'model'}", f"data.path={place / 'lab' / 'pairs.jsonl'}",
               f"data.heldout_path={place / 'lab' / 'heldout.jsonl'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "held-out accuracy: " in done.stdout and (place / kind / "accuracy.png").stat().st_size > 5000
    return place / kind


@pytest.fixture(scope="module")
def cost_model(place):
    return lab(place, "cost")


@pytest.mark.timeout(240)
def test_a_reward_model_learns_the_rule(place):
    folder = lab(place, "reward")
    found = preferences.measures(str(folder / "export"), SEED)
    assert found["accuracy"] > found["bayes"] - 0.06 and found["agreement"] > 0.87
    assert 0.8 < found["slope"] < 1.2 and found["correlation"] > 0.95
    assert (folder / "calibration.png").stat().st_size > 5000
    assert metrics(folder)[-1]["eval/calibration_error"] < 0.06


@pytest.mark.timeout(240)
def test_a_cost_model_learns_the_signs_and_the_order(cost_model):
    found = preferences.measures(str(cost_model / "export"), SEED)
    assert found["sign_accuracy"] > 0.98 and found["cost_order"] > 0.85
    facts = json.loads((cost_model / "export" / "frpo_scorer.json").read_text(encoding="utf-8"))
    assert facts["kind"] == "cost" and facts["heldout"]["sign_accuracy"] > 0.98


VLLM = """
import json, sys
from vllm import LLM, PoolingParams
llm = LLM(model=sys.argv[1], runner="pooling", dtype="float32", enforce_eager=True, max_model_len=16,
          kv_cache_memory_bytes=64 * 2**20)
found = llm.classify([{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])],
                     pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
print("scores", json.dumps([each.outputs.probs[0] for each in found]))
"""


@pytest.mark.timeout(240)
def test_vllm_gives_the_same_scores(cost_model):
    """By its classification task, without an activation."""
    drawn = preferences.pairs(preferences.world_of(SEED), 8, heldout=True)
    tokenizer = AutoTokenizer.from_pretrained(cost_model / "export")
    ids = [[*tokenizer(f"{pair.request.text} {said}")["input_ids"], tokenizer.eos_token_id]
           for pair in drawn for said in pair.responses]
    done = subprocess.run([sys.executable, "-c", VLLM, str(cost_model / "export"), json.dumps(ids)],
                          capture_output=True, text=True, timeout=200,
                          env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("scores")).split(" ", 1)[1])
    assert np.array(found) == pytest.approx(preferences.scores(str(cost_model / "export"), drawn).flatten(), abs=1e-4)
    assert np.ptp(found) > 1


def overrides(place: Path, name: str, *more: str) -> list[str]:
    """3 updates an epoch, three epochs, on packed pairs."""
    return [f"run.dir={place / name}", f"data.path={place / 'rows.jsonl'}", f"model.path={place / 'model'}",
            "model.max_length=32", "data.heldout_path=null", "data.heldout=5", "data.batch_size=15",
            "learner.packing=true", "learner.micro_batch_tokens=64", f"learner.deepspeed={place / 'zero3.json'}",
            f"run.num_epochs={UPDATES // 3}", "run.save_every=3", "evaluate.every=3", *more]


def in_ray(ranks_of, place: Path, name: str, *more: str) -> Path:
    recipe = load_recipe("lab_cost_model", overrides(place, name, "learner.ranks=ray", *more), RewardModelRecipe)
    with finetune_on(ranks_of(recipe), "cpu", recipe, check_finetune(recipe), recipe.model.path) as parts:
        RewardModelTrainer(parts).fit()
    return place / name


def launched(place: Path, name: str) -> subprocess.Popen:
    with (place / f"{name}.log").open("a", encoding="utf-8") as log:
        command = [*LAUNCHER, "2", "--master_port", PORT, "--module", "frpo", "reward-model", "lab_cost_model",
                   *overrides(place, name)]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


@pytest.mark.timeout(300)
def test_ranks_of_ray_and_of_a_launcher_that_was_killed_compute_the_same(ranks_of, place):
    """To the bit, two ranks each. One process differs by rounding."""
    two = in_ray(ranks_of, place, "two", "learner.num_ranks=2")
    process = launched(place, "killed")
    while not (place / "killed" / "checkpoints" / "step_000003" / "COMPLETE").is_file() or (
            len(lines(place / "killed" / "metrics.jsonl")) < 5):
        assert process.poll() is None, (place / "killed.log").read_text(encoding="utf-8")[-3000:]
        time.sleep(0.005)
    family = psutil.Process(process.pid).children(recursive=True)
    next(p for p in family if "--local_rank=1" in p.cmdline()).send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert not psutil.wait_procs(family, timeout=20)[1]
    assert len(lines(place / "killed" / "metrics.jsonl")) - 1 < UPDATES
    resumed = launched(place, "killed")
    assert resumed.wait(timeout=120) == 0, (place / "killed.log").read_text(encoding="utf-8")[-3000:]
    assert metrics(place / "killed") == metrics(two)
    one = in_ray(ranks_of, place, "one", "learner.packing=false")
    for row, same in zip(metrics(one), metrics(two), strict=True):
        assert row == pytest.approx(same, rel=1e-3, abs=1e-5)
    assert metrics(two)[-1]["preference/sign_accuracy"] > metrics(two)[1]["preference/sign_accuracy"]


@pytest.mark.timeout(240)
def test_adapters_train_the_head_whole_and_peft_reads_both(ranks_of, place):
    folder = in_ray(ranks_of, place, "lora", "model.lora={r: 4}", "learner.num_ranks=2") / "export"
    base = AutoModelForSequenceClassification.from_pretrained(place / "model", num_labels=1, dtype=torch.float32)
    base.config.pad_token_id = 0
    adapted = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    merged = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    recipe = load_recipe("lab_cost_model", overrides(place, "lora"), RewardModelRecipe)
    pairs = load_pairs(recipe.data, load_tokenizer(str(folder)), 32, "harm", 0).heldout
    ids = [torch.tensor([ids]) for pair in pairs for ids in (pair.first, pair.second)]
    with torch.no_grad():
        found, same = (torch.cat([network(input_ids=each).logits[:, 0] for each in ids])
                       for network in (adapted, merged))
    assert found.tolist() == pytest.approx(same.tolist(), abs=1e-5) and found.std() > 1e-3
    start = torch.randn(merged.score.weight.shape, generator=torch.Generator().manual_seed(0)) / (
        merged.score.in_features + 1)
    assert (merged.score.weight - start).abs().mean() > 1e-3
