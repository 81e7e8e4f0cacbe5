"""An interrupt that a library has caught ends a run after its step all the same."""
from __future__ import annotations

import signal
import threading
from contextlib import suppress

import pytest

from frpo import interrupts
from frpo.journal import Journal
from frpo.telemetry import JsonlFile, ProgressBar


def swallowed() -> None:
    with suppress(BaseException):
        signal.raise_signal(signal.SIGINT)


def test_a_lost_interrupt_comes_out_after_the_step_and_its_metrics(tmp_path):
    file = JsonlFile(tmp_path / "metrics.jsonl")
    journal = Journal(recipe=None, checkpoints=None, resume=None, files={"metrics": file}, sinks=())
    with interrupts.remembered(), ProgressBar(2, 0, "run") as bar:
        journal.write(1, {"a": 1.0}, bar)
        swallowed()
        with pytest.raises(KeyboardInterrupt):
            journal.write(2, {"a": 2.0}, bar)
    file.close()
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").count("\n") == 2
    with interrupts.remembered():
        interrupts.check()  # another command's was that


def test_it_is_raised_where_it_comes_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts.remembered():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_is_ignored_stays_so_and_other_threads_are_left_alone():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.remembered():
            signal.raise_signal(signal.SIGINT)
            interrupts.check()
    finally:
        signal.signal(signal.SIGINT, before)
    failures = []

    def elsewhere() -> None:
        try:
            with interrupts.remembered():
                interrupts.check()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(timeout=10)
    assert not failures and not thread.is_alive()
