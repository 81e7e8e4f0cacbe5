"""A training run that outlives the death of a learner rank: everything is taken down and goes on from a checkpoint.

The ranks of one learner share a collective, so that none can be replaced alone. Engines are healed without this
(`cluster.recovery`).
"""
from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from frpo.cluster.learner_group import LearnerGroup
from frpo.config.loader import AnyRecipe
from frpo.errors import EngineError
from frpo.run.journal import Journal
from frpo.types import RunState

logger = logging.getLogger(__name__)


class LiveRun(Protocol):
    """What any run is made of."""

    @property
    def learner(self) -> LearnerGroup: ...

    @property
    def journal(self) -> Journal: ...


def run_with_restarts(recipe: AnyRecipe, build: Callable[[Any], AbstractContextManager[LiveRun]],
            fit: Callable[[Any], RunState]) -> RunState:
    """Fit to the last step, from the newest checkpoint of the run again where a rank dies: `run.max_restarts` times.

    A run that has saved nothing yet begins again as it began. build: live parts of a recipe. Raises the EngineError of
    one death too many, and every other error at once.
    """
    for left in reversed(range(recipe.run.max_restarts + 1)):
        with build(recipe) as parts:
            try:
                return fit(parts)
            except EngineError as error:
                ranks = parts.learner.dead()
                if not ranks or left == 0:
                    raise
                logger.warning("%s; starting again from the newest checkpoint, %d more restarts allowed "
                               "(run.max_restarts)", error, left - 1)
        if recipe.run.resume != "force" and parts.journal.checkpoints.saved:
            recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"resume": "auto"})})
    raise AssertionError("the last attempt returns or raises")
