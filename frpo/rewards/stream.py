"""Rewards of groups that arrive one by one, scored while others are still generated.

A call scores whatever has arrived since the one before, so a fast reward is called for single groups and a slow one for
many at a time. Values do not depend on that as long as a function judges each group by itself. What is scored, and
what an error means, is the suite's business.
"""
from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from types import TracebackType
from typing import Self

from frpo.rewards.stop import Stop
from frpo.rewards.suite import RewardSuite, ScoreReport
from frpo.types import RolloutGroup


class ScoreStream:
    """One step's groups on their way through a suite. A context: leaving it early drops what has not been scored.

    As many calls run at the same time as a reward has processes, each on the groups that waited when it began: a call
    of one group needs one process, and another must not wait for it.
    """

    def __init__(self, suite: RewardSuite):
        self._suite = suite
        self._stop = Stop()
        self._executor = ThreadPoolExecutor(suite.processes, thread_name_prefix="score")
        self._waiting: list[RolloutGroup] = []
        self._calls: list[Future[ScoreReport]] = []
        self._reports: list[ScoreReport] = []

    def add(self, group: RolloutGroup) -> None:
        """Take one group; returns at once. Raises what an earlier call has raised since."""
        self._waiting.append(group)
        self._collect()
        self._start()

    def result(self) -> ScoreReport:
        """All groups, sorted by id, once the last one is scored; counts are sums over all calls."""
        while self._calls or self._waiting:
            self._collect()
            self._start()
            wait(self._calls, return_when=FIRST_COMPLETED)
        report = ScoreReport.joined(self._reports)
        return replace(report, groups=sorted(report.groups, key=lambda scored: scored.group.group_id))

    def _collect(self) -> None:
        """Take the reports of the calls that have ended; raises what one has raised."""
        for call in [call for call in self._calls if call.done()]:
            self._calls.remove(call)
            self._reports.append(call.result())

    def _start(self) -> None:
        """Call on everything that waits, unless as many calls run as may."""
        if self._waiting and len(self._calls) < self._suite.processes:
            groups, self._waiting = self._waiting, []
            self._calls.append(self._executor.submit(self._suite.score, groups, self._stop))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stop.set()
        self._executor.shutdown()
