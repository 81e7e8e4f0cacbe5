"""Ctrl-C that is not lost. A library may catch it with a bare `except:` while it is imported or waits; whoever works in
steps therefore asks here, once a step, whether one came.
"""
from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_came = threading.Event()


@contextmanager
def remembered() -> Iterator[None]:
    """Within it an interrupt is raised where it comes, as always, and remembered. Without effect outside the main
    thread and where interrupts are ignored, as in a shell's background.
    """
    def press(number: int, frame: FrameType | None) -> None:
        _came.set()
        raise KeyboardInterrupt

    _came.clear()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def check() -> None:
    """Raise KeyboardInterrupt if one came and the work went on all the same."""
    if _came.is_set():
        raise KeyboardInterrupt
