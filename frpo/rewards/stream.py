"""Score groups that arrive one by one, while other groups are still generated.

A call scores all groups that arrived since the call before. So a fast reward is called for single groups, and a slow
reward for many groups at a time. Values do not depend on this as long as a function scores each group by itself. For
the scoring and the errors see `suite`.
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
    """Stream of one step's groups through a suite. A context: leaving it early drops groups that are not yet scored.

    As many calls run at the same time as a reward has processes, each on the groups that waited when the call began. A
    call of one group needs only one process, and the next call must not wait for it.
    """

    def __init__(self, suite: RewardSuite):
        self._suite = suite
        self._stop = Stop()
        self._executor = ThreadPoolExecutor(suite.processes, thread_name_prefix="score")
        self._waiting: list[RolloutGroup] = []
        self._calls: list[Future[ScoreReport]] = []
        self._reports: list[ScoreReport] = []

    def add(self, group: RolloutGroup) -> None:
        """Take one group and return at once. Raises the error of an earlier call, if one has failed."""
        self._waiting.append(group)
        self._collect()
        self._start()

    def result(self) -> ScoreReport:
        """Wait until the last group is scored. Return all groups, sorted by id; counts are sums over all calls."""
        while self._calls or self._waiting:
            self._collect()
            self._start()
            wait(self._calls, return_when=FIRST_COMPLETED)
        report = ScoreReport.joined(self._reports)
        return replace(report, groups=sorted(report.groups, key=lambda scored: scored.group.group_id))

    def _collect(self) -> None:
        """Take the reports of the calls that have ended. Raises the error of a call that failed."""
        for call in [call for call in self._calls if call.done()]:
            self._calls.remove(call)
            self._reports.append(call.result())

    def _start(self) -> None:
        """Start a call on all waiting groups, unless the most allowed calls already run."""
        if self._waiting and len(self._calls) < self._suite.processes:
            groups, self._waiting = self._waiting, []
            self._calls.append(self._executor.submit(self._suite.score, groups, self._stop))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stop.set()
        self._executor.shutdown()
