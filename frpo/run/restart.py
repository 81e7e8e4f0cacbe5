"""Restart a training run that has lost a learner rank or a node: end everything, then continue from a checkpoint.

A rank is lost if it dies, hangs, or cannot reach the others. The ranks of one learner share a collective, so no rank
can be replaced alone. Dead engines are replaced without a restart (`cluster.recovery`), unless the node of their GPUs
is gone: then the run needs a new reservation. A loss while a run starts is a restart too.

The ranks of a launcher end with the launcher, which may start the same command again.
"""
from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from frpo.cluster.launcher import launched
from frpo.cluster.learner_group import LearnerGroup
from frpo.cluster.placement import has_room
from frpo.cluster.runtime import ray_session
from frpo.cluster.team import in_team
from frpo.config.loader import AnyRecipe
from frpo.config.sections import Recipe
from frpo.errors import LostNodeError, LostRankError
from frpo.run.journal import Journal
from frpo.run.stop_request import stop_if_asked
from frpo.telemetry.progress import phase
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

    There are at most `run.max_restarts` restarts, all on the device of the first start. A run without a saved
    checkpoint begins again from its start. build: makes the live parts of a recipe. fit: trains with these parts.
    Raises the LostRankError or LostNodeError when no restart is left. Raises every other error at once.
    """
    restarts = 0 if launched() else recipe.run.max_restarts
    for left in reversed(range(restarts + 1)):
        parts = None
        try:
            with build(recipe) as parts:
                return fit(parts)
        except (LostNodeError, LostRankError) as error:
            if left == 0:
                raise
            logger.warning("%s; starting again from the newest checkpoint, %d more restarts allowed "
                           "(run.max_restarts)", error, left - 1)
        stop_if_asked("after a loss")
        if parts:
            recipe = going_on(recipe, parts)
        await_gpus(recipe)
    raise AssertionError("the last attempt returns or raises")


def going_on(recipe: AnyRecipe, parts: LiveRun) -> AnyRecipe:
    """Return the recipe of the next start, after one that had these parts."""
    changes: dict[str, Any] = {"device": parts.learner.device}
    if parts.journal.checkpoints.saved and recipe.run.resume != "force":
        changes["resume"] = "auto"
    return recipe.model_copy(update={"run": recipe.run.model_copy(update=changes)})


def await_gpus(recipe: AnyRecipe) -> None:
    """Wait until the cluster of RAY_ADDRESS has free GPUs for this run, at most `run.gpu_wait_s`.

    If it still has none, the next start tells what is missing.
    """
    if recipe.run.device != "cuda" or "RAY_ADDRESS" not in os.environ:
        return
    limit_s, samples = recipe.run.gpu_wait_s, isinstance(recipe, Recipe) and recipe.rollout.replay is None
    with ray_session(), phase(f"looking for free GPUs, at most {limit_s:g} s (run.gpu_wait_s)"):
        deadline = time.monotonic() + limit_s
        while not has_room(recipe, ranks=not in_team(recipe), engines=samples) and time.monotonic() < deadline:
            time.sleep(1.0)
            stop_if_asked("after a loss")
