"""Whole training runs for integration tests: `python -m frpo train` in processes of their own. Not a test itself."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

STEPS = 6

LONG = pytest.mark.skipif(os.environ.get("FRPO_TEST_LONG") != "1", reason="takes minutes: set FRPO_TEST_LONG=1")
"""Mark of tests that are not part of every test run."""

RAYS_OWN = re.compile(r"raylet|gcs_server|ray::(Dashboard|RuntimeEnv)Agent|python.*log_monitor")
"""Names of processes that Ray ends in its own time."""

REWARD = """
def spread(completions, **columns):
    return [sum(map(ord, completion)) % 2 for completion in completions]


def dear(completions, **columns):
    return [2.0 * value for value in spread(completions)]
"""
"""A random model earns something of it, so that every step has a gradient; about one group in eight is all alike. What
earns is also dear, and the cost is kept under a limit."""

SMALL = ("model.tiny.hidden_size=64", "model.tiny.num_heads=2", "model.tiny.num_layers=2",
         "model.tiny.warm_start.steps=0", "data.heldout=8", "evaluate.every=2", "evaluate.samples=1",
         "rollout.prompts_per_step=8", "rollout.group_size=4", "rollout.dynamic={max_draws: 3}",
         "learner.updates_per_step=2", "objective.kl_estimator=full",
         "objective.kl_control={target: 1.0e-4, warmup_steps: 1}",
         f"run.num_steps={STEPS}", "run.save_every=2", "run.keep_last=3")


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    """A training run in `folder`, in a session of its own; its output goes to a file beside it."""
    with folder.with_suffix(".log").open("a", encoding="utf-8") as log:
        return subprocess.Popen([sys.executable, "-m", "frpo", "train", "smoke", *overrides_of(folder), *overrides],
                                stdout=log, stderr=subprocess.STDOUT, cwd=folder.parent, start_new_session=True)


def overrides_of(folder: Path) -> list[str]:
    reward = folder.parent / "reward.py"
    return [f"run.dir={folder}", f"rewards=[{{name: spread, function: '{reward}:spread'}}, "
            f"{{name: dear, function: '{reward}:dear', weight: 0.0}}]",
            "objective.constraint={cost: dear, threshold: 0.9}", *SMALL]


def finish(folder: Path, *overrides: str) -> None:
    process = start(folder, *overrides)
    assert process.wait(timeout=200) == 0, folder.with_suffix(".log").read_text(encoding="utf-8")[-3000:]


def lines(path: Path) -> list[str]:
    """Whole lines of a file that may still grow."""
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []


def metrics(folder: Path) -> list[dict[str, float]]:
    """Rows of metrics.jsonl without what a clock says."""
    return [{key: value for key, value in json.loads(line).items() if not key.startswith("time/")}
            for line in lines(folder / "metrics.jsonl")]


def kill_in_step(process: subprocess.Popen, folder: Path, step: int) -> list[psutil.Process]:
    """SIGKILL the driver when the traces of `step` are written and its metrics are not. Returns its descendants."""
    traces = folder / "traces.jsonl"
    while not any(json.loads(line)["group_id"] == [step - 1, 0] for line in lines(traces)):
        assert process.poll() is None, folder.with_suffix(".log").read_text(encoding="utf-8")[-3000:]
        # Stopped while it is looked at, so that the step cannot end between the look and the kill.
        process.send_signal(signal.SIGCONT)
        time.sleep(0.002)
        process.send_signal(signal.SIGSTOP)
    family = psutil.Process(process.pid).children(recursive=True)
    for child in family:
        child.name()  # remembered by psutil for when it is gone
    process.kill()
    process.wait()
    return family
