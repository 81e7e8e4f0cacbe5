"""The worker processes of one reward function, and how a call's completions are dealt out to them.

Knows no prompts, weights or sums (see `suite`); what a process does and how it ends is `worker`'s business.
"""
from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np

from frpo.rewards.stop import Stop
from frpo.rewards.worker import RewardCallError, RewardWorker


class RewardPool:
    """`processes` workers of one function. A caller holds one at a time; callers beyond their number wait."""

    def __init__(self, *, name: str, function: str, timeout_s: float, processes: int) -> None:
        self.workers = [RewardWorker(name=name, function=function, timeout_s=timeout_s) for _ in range(processes)]
        self._idle = list(self.workers)
        self._changed = threading.Condition()

    @contextmanager
    def worker(self, stop: Stop) -> Iterator[RewardWorker]:
        """A worker that nobody else holds, once there is one. Raises RewardCallError if told to stop before."""
        with stop.calls(self._wake), self._changed:
            self._changed.wait_for(lambda: self._idle or stop.is_set())
            if stop.is_set():
                raise RewardCallError(f"{self.workers[0].label}: the call was ended before it began")
            held = self._idle.pop()
        try:
            yield held
        finally:
            with self._changed:
                self._idle.append(held)
                self._changed.notify_all()  # not just one: it may be a caller that has been told to stop

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


def shares(sizes: Sequence[int], count: int) -> list[slice]:
    """Contiguous parts of the completions of groups of these sizes, at most `count`, none of them empty.

    Groups stay whole. Cuts lie at the group boundaries nearest to equal numbers of completions, the earlier one of two
    that are equally near.
    """
    ends = np.cumsum([0, *sizes])
    cuts = sorted({int(ends[np.abs(ends - ends[-1] * k / count).argmin()]) for k in range(count + 1)})
    return [slice(start, stop) for start, stop in pairwise(cuts)]
