"""A request to stop reaches every process of a matrix. The processes here are small ones in place of whole stages."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from frpo.downstream import jobs
from frpo.errors import ConfigError, EngineError
from frpo.run import stop_request

HEARS = """
import pathlib, sys, time
from frpo.run import stop_request
stop_request.hear()
pathlib.Path(sys.argv[1]).touch()
while not stop_request.asked():
    time.sleep(0.01)
print("stopped in order")
sys.exit(stop_request.EXIT_CODE)
"""

DEAF = """
import pathlib, sys, time
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


@pytest.fixture
def matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Start `code` for every seed; SIGUSR1 comes when all have begun. Returns a function of their codes."""
    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(stop_request, "_asked", threading.Event())
    monkeypatch.setattr(jobs, "POLL_S", 0.02)

    def run(*codes: str, ask: bool = True) -> None:
        def started(recipe: Path, seeds: list[int], log: Path, gpus) -> subprocess.Popen:
            with log.open("w") as file:
                return subprocess.Popen([sys.executable, "-c", codes[seeds[0]], str(tmp_path / f"begun{seeds[0]}")],
                                        stdout=file, stderr=subprocess.STDOUT)

        def ask_for_a_stop() -> None:
            while len(list(tmp_path.glob("begun*"))) < len(codes):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGUSR1)

        monkeypatch.setattr(jobs, "_started", started)
        stop_request.hear()
        if ask:
            threading.Thread(target=ask_for_a_stop).start()
        plan = SimpleNamespace(seeds=[SimpleNamespace(seed=seed) for seed in range(len(codes))], stages=[],
                               recipe=SimpleNamespace(run=SimpleNamespace(name="matrix")))
        jobs.run_in_jobs(plan, tmp_path / "recipe.yaml", len(codes))

    yield run
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.timeout(60)
def test_processes_stop_in_order(matrix, tmp_path):
    with pytest.raises(stop_request.StopRequested, match="with all processes of the matrix"):
        matrix(HEARS, HEARS)
    assert [(tmp_path / f"job{job}.log").read_text() for job in (0, 1)] == ["stopped in order\n"] * 2


@pytest.mark.timeout(60)
def test_a_process_that_cannot_hear_yet_is_stopped_too(matrix):
    with pytest.raises(stop_request.StopRequested):
        matrix(HEARS, DEAF)


@pytest.mark.timeout(60)
def test_a_process_that_breaks_off_by_itself_is_no_stop(matrix):
    with pytest.raises(EngineError, match=r"1 of 2 processes failed; last lines of .*job1\.log:\nno more"):
        matrix("", "import sys; print('no more'); sys.exit(3)", ask=False)


@pytest.mark.parametrize("visible, count, shown", [
    (None, 8, ["0,1", "2,3,4", "5,6,7"]), ("4,5,GPU-a,7", 4, ["4", "5", "GPU-a,7"])])
def test_gpus_of_a_machine_are_dealt_out(monkeypatch, visible, count, shown):
    given_gpus(monkeypatch, count, visible)
    assert [gpus["CUDA_VISIBLE_DEVICES"] for gpus in jobs.gpus_of_jobs(3)] == shown
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # Ray deals them out
    assert jobs.gpus_of_jobs(3) == [{}, {}, {}]


def test_more_jobs_than_gpus_are_refused_and_none_is_dealt_without_cuda(monkeypatch):
    given_gpus(monkeypatch, 2)
    with pytest.raises(ConfigError, match=r"--jobs 3: this machine shows 2 GPU\(s\)"):
        jobs.gpus_of_jobs(3)
    given_gpus(monkeypatch, 0)
    assert jobs.gpus_of_jobs(3) == [{}, {}, {}]


def given_gpus(monkeypatch, count, visible=None):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
