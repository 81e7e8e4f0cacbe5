"""Reinforcement learning on the processes of a launcher computes what it computes on Ray actors."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runs import metrics, overrides_of

DEEPSPEED = Path(sys.executable).with_name("deepspeed")
PORT = str(29600 + os.getpid() % 300)


@pytest.mark.timeout(240)
def test_reinforcement_learning_on_a_launchers_processes_is_that_on_ray_actors(alone):
    """Rank 0 drives two ranks and an engine; `alone` is the same run of Ray actors."""
    folder = alone.parent / "launched"
    command = [DEEPSPEED, "--num_gpus", "2", "--master_port", PORT, "--module", "frpo", "train", "smoke",
               *overrides_of(folder)]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert metrics(folder) == metrics(alone)
    for name in ("traces.jsonl", "export/model.safetensors"):
        assert (folder / name).read_bytes() == (alone / name).read_bytes(), name
