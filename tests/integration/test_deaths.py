"""Runs whose engines or learner ranks are killed with -9 end, to the byte, as a run left alone does."""
from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from runs import LONG, STEPS, lines, metrics, start

KILLS = int(os.environ.get("FRPO_TEST_KILLS", "2"))
"""Engines killed in one run. Every one costs an engine's start, so that a larger number is for a look by hand."""

LONG_ANSWERS = "rollout.max_new_tokens=48"
"""Completions of a random model run into the limit, so that a step generates for a while."""


def process_of(run, name: str) -> psutil.Process | None:
    """The newest of the run's processes that Ray calls by this name."""
    found = []
    for process in psutil.Process(run.pid).children(recursive=True):
        try:
            if process.name().startswith(f"ray::{name}"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return max(found, key=lambda process: process.create_time(), default=None)


def kill(run, name: str) -> int:
    process = process_of(run, name)
    os.kill(process.pid, signal.SIGKILL)
    return process.pid


def steps_done(folder) -> int:
    return len(metrics(folder)) - 1


def ended_alike(folder, alone) -> None:
    assert metrics(folder) == metrics(alone)
    for name in ("traces.jsonl", "export/model.safetensors"):
        assert (folder / name).read_bytes() == (alone / name).read_bytes(), name


@pytest.mark.timeout(400)
def test_a_run_whose_engine_and_then_a_rank_are_killed_goes_on(alone):
    folder = alone.parent / "killed"
    run = start(folder)
    wait_for_step(1, run, folder)
    kill(run, "EngineActor")
    wait_for_step(3, run, folder)  # the newest checkpoint is of step 2
    kill(run, "LearnerActor")
    goes_on_from_checkpoint(run, folder, alone)
    assert folder.with_suffix(".log").read_text(encoding="utf-8").count("starting engine 0 again") == 1


@LONG
@pytest.mark.timeout(400)
def test_a_run_whose_learner_rank_hangs_goes_on_from_its_checkpoint(alone):
    folder = alone.parent / "rank_hung"
    run = start(folder, "learner.timeout_s=20")
    wait_for_step(3, run, folder)
    hung = process_of(run, "LearnerActor")
    rank = Path(os.readlink(f"/proc/{hung.pid}/fd/2")).stem.replace("_", " ")  # of its log
    hung.suspend()
    goes_on_from_checkpoint(run, folder, alone)
    assert f"; no answer from {rank} on " in folder.with_suffix(".log").read_text(encoding="utf-8")


def wait_for_step(step, run, folder) -> None:
    while steps_done(folder) < step:
        assert run.poll() is None, folder.with_suffix(".log").read_text(encoding="utf-8")[-3000:]
        time.sleep(0.01)


def goes_on_from_checkpoint(run, folder, alone) -> None:
    assert run.wait(timeout=300) == 0, folder.with_suffix(".log").read_text(encoding="utf-8")[-3000:]
    log = folder.with_suffix(".log").read_text(encoding="utf-8")
    assert "starting again from the newest checkpoint, 1 more restarts allowed (run.max_restarts)" in log
    ended_alike(folder, alone)


@LONG
@pytest.mark.timeout(600)
def test_a_run_whose_engine_is_killed_again_and_again_is_not_disturbed(alone):
    undisturbed, folder = alone.parent / "long", alone.parent / "engine_killed"
    assert start(undisturbed, LONG_ANSWERS).wait(timeout=200) == 0
    shares = np.random.default_rng(0).uniform(0.2, 0.8, size=KILLS)
    run = start(folder, LONG_ANSWERS, f"rollout.max_restarts={KILLS}")
    killed = []
    for step, share in enumerate(shares):
        seconds = generation_seconds(undisturbed, step + 1)
        while steps_done(folder) < step:
            assert run.poll() is None, folder.with_suffix(".log").read_text(encoding="utf-8")[-3000:]
            time.sleep(0.005)
        time.sleep(share * seconds)
        killed.append(kill(run, "EngineActor"))
    assert run.wait(timeout=300) == 0, folder.with_suffix(".log").read_text(encoding="utf-8")[-3000:]
    log = folder.with_suffix(".log").read_text(encoding="utf-8")
    assert len(set(killed)) == KILLS == log.count("starting engine 0 again")
    assert log.count("generate: rollout engine 0") > 0  # at least once while it sampled
    assert len(lines(folder / "metrics.jsonl")) == STEPS + 1
    ended_alike(folder, undisturbed)


def generation_seconds(folder, step: int) -> float:
    return next(row["time/generate"] for row in map(json.loads, lines(folder / "metrics.jsonl"))
                if row["step"] == step)
