"""Rollout engines that outlive a death: a dead one is started again, given the policy, and sampled from again.

What it had been asked for is sampled again from the beginning and what had arrived already is dropped, so that the
batches inside the engine, and with them every bit of every log-probability, are those of an undisturbed run. A dead
learner rank is not healed here.
"""
from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

from frpo.cluster.engine_pool import EnginePool, EnginesLostError
from frpo.cluster.learner_group import LearnerGroup
from frpo.errors import EngineError
from frpo.rollout.engine import GroupRequest, Sampling
from frpo.types import GroupId, RolloutGroup

logger = logging.getLogger(__name__)


class RecoveringEngines:
    """A pool whose engines the learner pushes to. At most `max_restarts` engines are restarted in a run."""

    def __init__(self, pool: EnginePool, learner: LearnerGroup, max_restarts: int):
        self.pool, self.learner = pool, learner
        self.restarts_left = max_restarts

    def stream(self, requests: Mapping[int, Sequence[GroupRequest]], sampling: Sampling, version: int
               ) -> Iterator[RolloutGroup]:
        """Groups of all engines as they finish, each once. See `EnginePool.stream` for what else may be raised."""
        pending, seen = dict(requests), set[GroupId]()
        while pending:
            try:
                for group in self.pool.stream(pending, sampling, version):
                    if group.group_id not in seen:
                        seen.add(group.group_id)
                        yield group
                return
            except EnginesLostError as error:
                self._revive(error.engines, version, error)
                pending = {index: requests[index] for index in error.engines}

    def push(self, version: int) -> None:
        """The learner's weights to all engines under label `version`; to new ones where some have died."""
        try:
            self.learner.push_weights(version)
        except EngineError as error:
            dead = self.pool.dead()
            if not dead:
                raise
            self._revive(dead, version, error)

    def _revive(self, engines: Sequence[int], version: int, cause: EngineError) -> None:
        if len(engines) > self.restarts_left:
            raise cause
        self.restarts_left -= len(engines)
        logger.warning("%s; starting engine %s again, %d more restarts allowed (rollout.max_restarts)", cause,
                       ", ".join(map(str, engines)), self.restarts_left)
        self.pool.restart(engines)
        self.learner.connect_engines(self.pool.client())
        self.learner.push_weights(version)
