"""Measure the seconds of every phase of a step."""
from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from frpo.telemetry.progress import activity


class PhaseTimer:
    """Seconds of each phase, summed over a step, and the name of the current phase (None between phases)."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.current: str | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer, self.current, started = self.current, name, time.perf_counter()
        try:
            with activity(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self.current = outer

    def collect(self) -> dict[str, float]:
        """Return `time/<phase>` in seconds since the last `collect`, and start again from zero."""
        seconds, self.seconds = self.seconds, {}
        return {f"time/{name}": value for name, value in seconds.items()}
