"""A training run that outlives the death of a learner rank: everything is taken down and goes on from a checkpoint.

The ranks of one learner share a collective, so that none can be replaced alone. Engines are healed without this
(`cluster.recovery`).
"""
from __future__ import annotations

import logging

from frpo.builder import build
from frpo.checkpoint import CheckpointStore
from frpo.config.sections import Recipe
from frpo.errors import EngineError
from frpo.trainer import Trainer
from frpo.types import RunState

logger = logging.getLogger(__name__)


def train(recipe: Recipe) -> RunState:
    """Train to the last step, from the newest checkpoint of the run again where a rank dies: `run.max_restarts` times.

    Raises the EngineError of one death too many, and every other error at once.
    """
    for left in reversed(range(recipe.run.max_restarts + 1)):
        with build(recipe) as parts:
            try:
                return Trainer(parts).fit()
            except EngineError as error:
                ranks = parts.learner.dead()
                if not ranks or left == 0:
                    raise
                logger.warning("%s; starting again from the newest checkpoint, %d more restarts allowed "
                               "(run.max_restarts)", error, left - 1)
        recipe = _going_on(recipe, parts.checkpoints)
    raise AssertionError("the last attempt returns or raises")


def _going_on(recipe: Recipe, checkpoints: CheckpointStore) -> Recipe:
    """The recipe that resumes this run; unchanged while it has no checkpoint of its own."""
    if not checkpoints.complete():
        return recipe
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"resume": "auto"})})
