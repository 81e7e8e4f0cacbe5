"""Keep the workers of one reward function, and divide a call's completions among them.

For prompts, weights and sums see `suite`. For the work and the end of a process see `worker`.
"""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np

from frpo.rewards.protocol import RewardSpec
from frpo.rewards.stop import Stop
from frpo.rewards.worker import RewardCallError, RewardWorker, Worker

WorkersOf = Callable[[RewardSpec], Sequence[Worker]]
"""Function that makes the workers of a reward; none of them is started."""


def processes_of(spec: RewardSpec) -> list[Worker]:
    """Make the reward's worker processes on this machine."""
    return [RewardWorker(name=spec.name, function=spec.function, timeout_s=spec.timeout_s)
            for _ in range(spec.processes)]


class RewardPool:
    """Pool of the workers of one function. Each caller holds one worker; further callers wait."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = list(workers)
        self._idle = list(self.workers)
        self._changed = threading.Condition()

    @contextmanager
    def worker(self, stop: Stop) -> Iterator[Worker]:
        """Wait for a free worker and hold it. Raises RewardCallError if `stop` is set before a worker is free."""
        with stop.calls(self._wake), self._changed:
            self._changed.wait_for(lambda: self._idle or stop.is_set())
            if stop.is_set():
                raise RewardCallError(f"{self.workers[0].label}: the call was stopped before it began")
            held = self._idle.pop()
        try:
            yield held
        finally:
            with self._changed:
                self._idle.append(held)
                self._changed.notify_all()  # not just one: that one may be a caller whose stop is set

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


def shares(sizes: Sequence[int], count: int) -> list[slice]:
    """Cut the completions of groups of these sizes into at most `count` contiguous parts, none of them empty.

    Groups stay whole. Each cut is at the group boundary nearest to equal numbers of completions. Of two boundaries that
    are equally near, the earlier one is taken.
    """
    ends = np.cumsum([0, *sizes])
    cuts = sorted({int(ends[np.abs(ends - ends[-1] * k / count).argmin()]) for k in range(count + 1)})
    return [slice(start, stop) for start, stop in pairwise(cuts)]
