"""Sample batches ahead: a thread collects the batches of the next steps while the learner works on the current step.

Batch j may begin once step j - k is done, where k = `rollout.max_staleness`. So no token is more than k steps older
than the policy that learns from it. Weights pushed while a batch is sampled serve the rest of that batch. Finished
batches wait in a queue of at most k + 1, which a checkpoint keeps. An unfinished batch is not kept: a resumed run
samples that batch again, from the same prompts and seeds. The loss decides whether to correct for old samples.
"""
from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from frpo.cluster.recovery import RecoveringEngines
from frpo.data.selection import save_selection
from frpo.loops.collect import collect
from frpo.run.build import SamplingParts
from frpo.run.traces import scored_group, scored_row
from frpo.telemetry.progress import ProgressBar
from frpo.telemetry.timer import PhaseTimer
from frpo.types import RunState, ScoredBatch

FILE = "batches.jsonl"
JOIN_S, LEAVE_S = 1.0, 60.0
"""Seconds in which the thread may end by itself, and after it was told to leave its batch."""


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The batch of one step, and the seconds that each phase of collecting it took."""

    step: int
    batch: ScoredBatch
    seconds: Mapping[str, float]


class AsyncBatches:
    """A queue of batches and the thread that fills it.

    The main thread holds the lock of the learner, except while it waits in `next` for a batch. Only then may the
    filling thread, if an engine has died, push the weights to a new engine.
    """

    def __init__(self, sampling: SamplingParts, engines: RecoveringEngines):
        self.sampling, self.engines, self.limit = sampling, engines, sampling.recipe.rollout.max_staleness
        self.changed = threading.Condition()
        self.queue: deque[Collected] = deque()
        self.newest: RunState | None = None
        self.failure: BaseException | None = None
        self.ending = False

    def start(self, state: RunState, checkpoint: Path | None) -> None:
        if checkpoint is not None and (checkpoint / FILE).is_file():
            with (checkpoint / FILE).open(encoding="utf-8") as file:
                self.queue.extend(_collected(json.loads(line)) for line in file)
        self.selection: Mapping[str, Sequence[float]] = self.sampling.stream.state
        for collected in self.queue:
            self.sampling.stream.record(collected.batch.drawn)
        cursor = state.data_cursor + sum(collected.batch.positions for collected in self.queue)
        first = replace(state, step=state.step + len(self.queue), data_cursor=cursor)
        self.newest = state
        self.engines.learner_lock.acquire()
        self.bar: ProgressBar  # set by `next`, which starts the thread
        self.thread = threading.Thread(target=self._fill, args=(first,), name="rollouts ahead", daemon=True)

    def next(self, state: RunState, bar: ProgressBar) -> ScoredBatch:
        """Return the batch of this step; wait for the batch if needed. Raises any error of collecting the batch."""
        self.bar = bar
        with self.changed:
            self.newest = state
            self.changed.notify_all()
        if self.thread.ident is None:
            self.thread.start()
        self.engines.learner_lock.release()
        try:
            with self.sampling.timer.phase("wait"), self.changed:
                self.changed.wait_for(lambda: self.queue or self.failure)
        finally:
            self.engines.learner_lock.acquire()
        if not self.queue:
            assert self.failure is not None  # `wait_for` returns when there is a batch or a failure
            raise self.failure
        with self.changed:
            collected = self.queue.popleft()
            self.changed.notify_all()
        assert collected.step == state.step, (collected.step, state.step)
        self.selection = collected.batch.selection
        for phase, seconds in collected.seconds.items():
            self.sampling.timer.seconds[phase] = self.sampling.timer.seconds.get(phase, 0.0) + seconds
        return collected.batch

    def save(self, checkpoint: Path) -> None:
        with self.changed:
            waiting = list(self.queue)
        with (checkpoint / FILE).open("w", encoding="utf-8") as file:
            for collected in waiting:
                file.write(json.dumps(_row(collected)) + "\n")
        save_selection(checkpoint, self.selection)

    def close(self) -> None:
        """Begin no further batch, and leave a batch under way. A thread that outlived Ray would start another one."""
        with self.changed:
            self.ending = True
            self.changed.notify_all()
        if self.thread.is_alive():
            self.thread.join(timeout=JOIN_S)
        if self.thread.is_alive():
            self.engines.give_up()
        self.engines.learner_lock.release()
        if self.thread.is_alive():
            self.thread.join(timeout=LEAVE_S)

    def _fill(self, state: RunState) -> None:
        try:
            while self._may_begin(state.step):
                assert self.newest is not None  # by `start`
                timer = PhaseTimer()
                least = replace(state, policy_version=self.newest.policy_version)
                batch = collect(replace(self.sampling, timer=timer), least, self.bar)
                with self.changed:
                    self.queue.append(Collected(step=state.step, batch=batch, seconds=timer.seconds))
                    self.changed.notify_all()
                state = replace(state, step=state.step + 1, data_cursor=state.data_cursor + batch.positions)
        except BaseException as error:  # `next` raises the error
            with self.changed:
                self.failure = error
                self.changed.notify_all()

    def _reached(self) -> int:
        """Return the number of steps that are done."""
        assert self.newest is not None  # by `start`
        return self.newest.step

    def _may_begin(self, step: int) -> bool:
        """Wait until this step's batch may begin. Return True then, and False at the end of the run."""
        with self.changed:
            self.changed.wait_for(lambda: self.ending or self._reached() >= step - self.limit)
            return not self.ending and step < self.sampling.recipe.run.num_steps


def _row(collected: Collected) -> dict[str, Any]:
    batch = collected.batch
    return {"step": collected.step, "chosen": [scored_row(scored) for scored in batch.chosen],
            "replaced": [scored_row(scored) for scored in batch.replaced], "positions": batch.positions,
            "counts": dict(batch.counts), "selection": dict(batch.selection), "seconds": dict(collected.seconds)}


def _collected(row: Mapping[str, Any]) -> Collected:
    batch = ScoredBatch(chosen=tuple(map(scored_group, row["chosen"])), positions=row["positions"],
                        replaced=tuple(map(scored_group, row["replaced"])), counts=row["counts"],
                        selection=row["selection"])
    return Collected(step=row["step"], batch=batch, seconds=row["seconds"])
