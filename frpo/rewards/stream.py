"""Rewards of groups that arrive one by one, scored while others are still generated.

A call scores whatever has arrived since the one before, so a fast reward is called for single groups and a slow one for
many at a time. Values do not depend on that as long as a function judges each completion by itself. What is scored, and
what an error means, is the suite's business.
"""
from __future__ import annotations

from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from frpo.rewards.suite import RewardSuite, ScoreReport
from frpo.types import RolloutGroup


class ScoreStream:
    """One step's groups on their way through a suite. A context: leaving it early drops what has not been scored."""

    def __init__(self, suite: RewardSuite):
        self._suite = suite
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._waiting: list[RolloutGroup] = []
        self._call: Future[ScoreReport] | None = None
        self._reports: list[ScoreReport] = []

    def add(self, group: RolloutGroup) -> None:
        """Take one group; returns at once. Raises what an earlier call has raised since."""
        self._waiting.append(group)
        if self._call is None or self._call.done():
            self._next_call()

    def result(self) -> ScoreReport:
        """All groups, sorted by id, once the last one is scored; counts are sums over all calls."""
        while self._call is not None or self._waiting:
            self._next_call()
        groups = [group for report in self._reports for group in report.groups]
        counts: Counter[str] = Counter()
        for report in self._reports:
            counts.update(report.counts)
        return ScoreReport(groups=sorted(groups, key=lambda scored: scored.group.group_id), counts=dict(counts))

    def _next_call(self) -> None:
        """Wait for the running call and start another on everything that waits."""
        if self._call is not None:
            call, self._call = self._call, None
            self._reports.append(call.result())
        if self._waiting:
            groups, self._waiting = self._waiting, []
            self._call = self._executor.submit(self._suite.score, groups)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
