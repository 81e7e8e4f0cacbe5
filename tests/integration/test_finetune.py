"""Whole fine-tunings: the same numbers on a launcher's processes, on Ray and in one process; killed and resumed."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import load_recipe
from frpo.data.sets.arithmetic import problems
from frpo.loops.sft import FineTuner
from frpo.run.build_finetune import build_finetune, check_finetune, finetune_on
from loop import random_model, splitting_strategy
from runs import lines, metrics

LAUNCHER = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus"]
PORT = str(29600 + os.getpid() % 300)
UPDATES = 12
GENERATION = '{"temperature": 0.9, "top_p": 0.6, "do_sample": false, "eos_token_id": 1, "pad_token_id": 0}'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, a model whose generation config transformers refuses to write, and a ZeRO-3 strategy that
    splits tiny tensors."""
    folder = tmp_path_factory.mktemp("finetune")
    rows = [{"question": question, "answer": f"it is {answer}"} for question, answer in problems(56, 0)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    random_model(folder / "model", "qwen2", tied=True)
    (folder / "model" / "generation_config.json").write_text(GENERATION, encoding="utf-8")
    splitting_strategy(folder, 3)
    return folder


def overrides(place: Path, name: str, *more: str) -> list[str]:
    """6 updates an epoch, two epochs."""
    return [f"run.dir={place / name}", f"data.path={place / 'rows.jsonl'}", "model.tiny=null",
            f"model.path={place / 'model'}", "model.max_length=64", f"learner.deepspeed={place / 'zero3.json'}",
            "learner.micro_batch_tokens=128", "data.limit=56", "data.heldout=8", "data.batch_size=8",
            f"run.num_epochs={UPDATES // 6}", "run.save_every=4", "evaluate.every=6", *more]


def launched(place: Path, ranks: int, name: str, *more: str) -> subprocess.Popen:
    with (place / f"{name}.log").open("a", encoding="utf-8") as log:
        command = [*LAUNCHER, str(ranks), "--master_port", PORT, "--module", "frpo",
                   "finetune", "finetune_gsm8k", *overrides(place, name, *more)]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def finish(place: Path, process: subprocess.Popen, name: str) -> None:
    assert process.wait(timeout=120) == 0, (place / f"{name}.log").read_text(encoding="utf-8")[-3000:]


def in_ray(ranks_of, place: Path, name: str, *more: str) -> None:
    recipe = load_recipe("finetune_gsm8k", overrides(place, name, "learner.ranks=ray", *more), FinetuneRecipe)
    with finetune_on(ranks_of(recipe), "cpu", recipe, check_finetune(recipe), recipe.model.path) as parts:
        FineTuner(parts).fit()


def weights(folder: Path) -> bytes:
    return (folder / "export" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def two(ranks_of, place):
    """A run of two Ray actors that nothing disturbs."""
    in_ray(ranks_of, place, "two", "learner.num_ranks=2")
    return place / "two"


@pytest.mark.timeout(60)
def test_the_loss_falls_and_what_moves_is_logged(two):
    first, last = metrics(two)[0], metrics(two)[-1]
    assert len(metrics(two)) == UPDATES + 1
    assert last["eval/nll"] < first["eval/nll"] and first["eval/kl"] == 0 < last["eval/kl"]
    assert [row["pa/delta"] for row in metrics(two)[1:]] == pytest.approx([0.1 + 0.2 * i / UPDATES for i in range(12)])


@pytest.mark.timeout(240)
def test_one_plain_process_computes_what_one_ray_actor_computes(ray_cluster, place):
    command = [sys.executable, "-m", "frpo", "finetune", "finetune_gsm8k", *overrides(place, "plain")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{UPDATES} updates done" in done.stdout and (place / "plain" / "loss.png").stat().st_size > 5000
    recipe = load_recipe("finetune_gsm8k", overrides(place, "one", "learner.ranks=ray"), FinetuneRecipe)
    with build_finetune(recipe) as parts:
        FineTuner(parts).fit()
    assert metrics(place / "plain") == metrics(place / "one") and weights(place / "plain") == weights(place / "one")
    assert (place / "plain" / "export" / "generation_config.json").read_text(encoding="utf-8") == GENERATION


@pytest.mark.timeout(240)
def test_a_launchers_run_killed_with_9_goes_on_and_computes_what_ray_actors_compute(place, two):
    """To the bit; and the launcher has ended the rank that was left."""
    process = launched(place, 2, "killed")
    while not (place / "killed" / "checkpoints" / "step_000004" / "COMPLETE").is_file() or (
            len(lines(place / "killed" / "metrics.jsonl")) < 6):
        assert process.poll() is None, (place / "killed.log").read_text(encoding="utf-8")[-3000:]
        time.sleep(0.005)
    family = psutil.Process(process.pid).children(recursive=True)
    victim = next(p for p in family if "--local_rank=1" in p.cmdline() and "finetune" in p.cmdline())
    victim.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    steps = len(lines(place / "killed" / "metrics.jsonl")) - 1
    assert steps < UPDATES
    finish(place, launched(place, 2, "killed"), "killed")
    assert metrics(place / "killed") == metrics(two) and weights(place / "killed") == weights(two)


@pytest.mark.timeout(240)
def test_adapters_off_is_the_reference_that_a_copy_is(ranks_of, place):
    """LoRA: the policy without its adapters, a frozen copy beside it, and the cache of it."""
    lora = ("model.lora={r: 4, targets: [q_proj, v_proj]}", "learner.num_ranks=2", "run.num_epochs=1")
    in_ray(ranks_of, place, "off", *lora)
    in_ray(ranks_of, place, "copy", *lora, f"reference.path={place / 'model'}")
    in_ray(ranks_of, place, "cached", *lora, "reference.mode=cache")
    off = metrics(place / "off")
    for other in (metrics(place / "copy"), metrics(place / "cached")):
        for row, same in zip(other, off, strict=True):
            assert row == pytest.approx(same, rel=2e-4, abs=1e-6)
    assert off[0]["eval/kl"] == 0 < off[-1]["eval/kl"]
    assert (place / "off" / "export" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.timeout(120)
def test_a_mistake_is_told_and_the_launcher_ends_with_an_error(place):
    process = launched(place, 2, "mistaken", "data.path=nowhere.jsonl")
    assert process.wait(timeout=100) == 2
    assert "frpo: DataError: data file 'nowhere.jsonl' cannot be read" in (place / "mistaken.log").read_text()


@pytest.mark.timeout(60)
def test_the_cache_of_another_model_is_refused(ray_cluster, place):
    folder = place / "cached" / "reference_cache"
    other = random_model(place / "other", "qwen2", tied=True, seed=1)
    from frpo.errors import ConfigError
    from frpo.learner.model import cache_facts
    from frpo.learner.state_cache import StateCache

    recipe = load_recipe("finetune_gsm8k", overrides(place, "x"), FinetuneRecipe)
    with pytest.raises(ConfigError, match=r"holds the states of another run: model '\w+', needed '\w+'; data "):
        StateCache.begin(folder, cache_facts(recipe.model, other, []), [])


@pytest.mark.timeout(200)
def test_sigusr1_stops_after_an_update_and_the_same_command_goes_on(place):
    """The checkpoint is of the update that was in progress, whatever run.save_every says."""
    command = [sys.executable, "-m", "frpo", "finetune", "finetune_gsm8k",
               *overrides(place, "stopped", "run.num_epochs=10", "run.save_every=1000", "evaluate.every=1000")]
    rows = place / "stopped" / "metrics.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(lines(rows)) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGUSR1)
    _, told = process.communicate(timeout=60)
    step = len(lines(rows)) - 1
    assert process.returncode == 75 and 2 <= step < 60
    assert f"frpo: stopped after update {step}, as SIGUSR1 asked; the same command continues" in told
    assert [path.name for path in (place / "stopped" / "checkpoints").iterdir()] == [f"step_{step:06d}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming from step {step} " in done.stdout + done.stderr
    assert [row["step"] for row in metrics(place / "stopped")] == list(range(61))
