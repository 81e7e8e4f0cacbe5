"""Restart lost rollout engines: start a dead engine again, push the policy to it, and repeat its samples.

An engine with a mixture of weights is restarted too. Weights become a mixture if an in-place push breaks off.

The new engine samples all its requests again from the beginning, and groups that had already arrived are dropped. So
the batches inside the engine, and every bit of every log-probability, are those of an undisturbed run. Dead learner
ranks are not restarted here.

A restart calls the learner, and training may call the learner at the same time from another thread. `learner_lock`
keeps the two apart.
"""
from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from frpo.cluster.engine_pool import EnginePool, EnginesLostError
from frpo.cluster.learner_group import LearnerGroup
from frpo.errors import EngineError
from frpo.rollout.assignment import Assignment
from frpo.rollout.engine import Sampling
from frpo.types import GroupId, RolloutGroup

logger = logging.getLogger(__name__)


class RecoveringEngines:
    """A pool whose engines the learner pushes to. At most `max_restarts` engines are restarted in a run.

    learner_lock: hold this lock for every call on the learner while another thread samples.
    """

    def __init__(self, pool: EnginePool, learner: LearnerGroup, max_restarts: int):
        self.pool, self.learner = pool, learner
        self.restarts_left = max_restarts
        self.ending = False
        self.learner_lock = threading.RLock()
        self.pushed: int | None = None

    def stream(self, assignment: Assignment, sampling: Sampling, version: int, or_newer: bool = False
               ) -> Iterator[RolloutGroup]:
        """Yield groups of all engines as they finish, each once. See `EnginePool.stream` for other errors raised."""
        seen: set[GroupId] = set()
        while assignment.shares:
            try:
                for group in self.pool.stream(assignment, sampling, version, or_newer, lambda: self.ending):
                    if group.group_id not in seen:
                        seen.add(group.group_id)
                        yield group
                return
            except EnginesLostError as error:
                with self.learner_lock:
                    self._revive(error.engines, version if self.pushed is None else self.pushed, error)
                assignment = assignment.again(error.engines)

    def score(self, sequences: Sequence[tuple[Sequence[int], int]], version: int) -> list[list[np.ndarray]]:
        """Return every engine's log-probabilities of the same sequences. See `RolloutEngine.score`."""
        while True:
            before = self.restarts_left
            try:
                return self.pool.score(sequences, version)
            except EngineError as error:
                with self.learner_lock:
                    lost = self.pool.lost()
                    if not lost and self.restarts_left == before:  # else another thread has started the engine again
                        raise
                    self._revive(lost, version, error)

    def push(self, version: int) -> None:
        """Push the learner's weights to all engines under label `version`. Replace lost engines by new ones."""
        if not self.pool.engines:
            return
        try:
            self.learner.push_weights(version)
        except EngineError as error:
            lost = self.pool.lost()
            if not lost:
                raise
            self._revive(lost, version, error)
        self.pushed = version

    def give_up(self) -> None:
        """Restart no engine from now on, and leave what is sampled now, because the run is ending."""
        self.ending = True

    def _revive(self, engines: Sequence[int], version: int, cause: EngineError) -> None:
        if self.ending:
            raise cause
        engines = [index for index in self.pool.lost() if index in engines]
        if not engines:  # another thread was faster
            return
        deaths = max(1, len(self.pool.dead()))  # a push that broke off in all engines is one mishap
        if deaths > self.restarts_left:
            raise EngineError(f"{cause}; rollout.max_restarts is used up")
        self.restarts_left -= deaths
        logger.warning("%s; starting engine %s again, %d more restarts allowed (rollout.max_restarts)", cause,
                       ", ".join(map(str, engines)), self.restarts_left)
        self.pool.restart(engines)
        self.learner.connect_engines(self.pool.client(), self.pool.recipe.weight_sync)
        self.learner.push_weights(version)
