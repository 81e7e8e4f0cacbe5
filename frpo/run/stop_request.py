"""Stop a training in order when a batch system asks for it by SIGUSR1, as before a time limit.

The step in progress ends and is saved, then the process ends with EXIT_CODE: the same command continues.
"""
from __future__ import annotations

import signal
import threading

EXIT_CODE = 75
"""Exit code of a training that stopped on request (EX_TEMPFAIL of sysexits.h)."""

_asked = threading.Event()


class StopRequested(KeyboardInterrupt):
    """Raised when the training has stopped. It passes all handlers of errors, as an interruption does."""


def hear() -> None:
    """From now on, note a SIGUSR1 instead of dying by it. Call this in the main thread."""
    signal.signal(signal.SIGUSR1, lambda number, frame: _asked.set())


def asked() -> bool:
    """Return whether a stop has been asked for."""
    return _asked.is_set()


def stop_if_asked(place: str) -> None:
    """Raise StopRequested if a stop has been asked for. place: where the work stops, for the message."""
    if asked():
        raise StopRequested(place)
