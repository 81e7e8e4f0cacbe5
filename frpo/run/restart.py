"""Restart a training run that has lost a learner rank: end everything, then continue from a checkpoint.

A rank is lost if it dies, hangs, or cannot reach the others. The ranks of one learner share a collective, so no rank
can be replaced alone. Dead engines are replaced without a restart (`cluster.recovery`), unless the node of their GPUs
is gone: then the run needs a new reservation. A node that goes while a run starts is a restart too.
"""
from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from frpo.cluster.learner_group import LearnerGroup
from frpo.config.loader import AnyRecipe
from frpo.errors import CollectiveError, EngineError, LostNodeError
from frpo.run.journal import Journal
from frpo.types import RunState

logger = logging.getLogger(__name__)


class LiveRun(Protocol):
    """The parts that every run has."""

    @property
    def learner(self) -> LearnerGroup: ...

    @property
    def journal(self) -> Journal: ...


def run_with_restarts(recipe: AnyRecipe, build: Callable[[Any], AbstractContextManager[LiveRun]],
            fit: Callable[[Any], RunState]) -> RunState:
    """Fit to the last step. If a rank or a node that the run needs is lost, start again from the newest checkpoint.

    There are at most `run.max_restarts` restarts.

    A run without a saved checkpoint begins again from its start. build: makes the live parts of a recipe. fit: trains
    with these parts. Raises the EngineError of a loss when no restart is left. Raises every other error at once.
    """
    for left in reversed(range(recipe.run.max_restarts + 1)):
        parts, died = None, list[int]()
        try:
            with build(recipe) as parts:
                try:
                    return fit(parts)
                except EngineError:
                    died = parts.learner.dead()
                    raise
        except EngineError as error:
            if left == 0 or not (died or isinstance(error, (LostNodeError, CollectiveError))):
                raise
            logger.warning("%s; starting again from the newest checkpoint, %d more restarts allowed "
                           "(run.max_restarts)", error, left - 1)
        if parts and parts.journal.checkpoints.saved and recipe.run.resume != "force":
            recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"resume": "auto"})})
    raise AssertionError("the last attempt returns or raises")
