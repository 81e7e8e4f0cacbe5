"""A Ray that does not start in time: what it has half started is ended before the next attempt, and nothing else."""
from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from frpo.cluster import runtime
from frpo.errors import EngineError

TOO_SLOW = "The current node timed out during startup. This could happen because some of the Ray processes failed"


@pytest.fixture
def attempts(monkeypatch):
    """Attempts of `ray.init`, each of which starts a process that has a child, as a raylet has agents, and fails."""
    started: list[psutil.Process] = []
    monkeypatch.setattr(runtime.ray, "shutdown", lambda: None)

    def begin(**options):
        sleep = "import time; time.sleep(60)"
        child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}])"
        code = f"{child}; print(flush=True); {sleep}"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        process.stdout.readline()
        started.append(psutil.Process(process.pid))
        started.extend(started[-1].children())
        raise RuntimeError(started.said)

    started = type("Attempts", (list,), {"said": TOO_SLOW})()
    monkeypatch.setattr(runtime.ray, "init", begin)
    return started


def test_nothing_is_left_of_attempts_that_were_too_slow(attempts):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(EngineError, match=r"Ray did not start on this machine \(attempt 3\): The current node timed"):
        runtime._start_local()
    assert len(attempts) == 6 and not any(process.is_running() for process in attempts)
    assert other.poll() is None, "what was there before is left alone"
    other.kill()
    other.wait()


def test_any_other_failure_is_told_at_once_and_leaves_nothing_either(attempts):
    attempts.said = "no such option"
    with pytest.raises(EngineError, match=r"\(attempt 1\): no such option"):
        runtime._start_local()
    assert len(attempts) == 2 and not any(process.is_running() for process in attempts)


def test_a_pipe_that_nobody_reads_any_more_is_no_failure_of_ray(monkeypatch):
    def init(**options):
        raise BrokenPipeError

    monkeypatch.setattr(runtime.ray, "init", init)
    with pytest.raises(BrokenPipeError):
        runtime._start_local()


def test_ray_does_not_take_this_processs_handler_of_sigterm(monkeypatch):
    def init(**options):
        signal.signal(signal.SIGTERM, lambda *told: None)

    def ours(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, ours)
    try:
        monkeypatch.setattr(runtime.ray, "init", init)
        runtime._start_local()
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)
