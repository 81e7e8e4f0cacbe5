"""Run learner ranks as Ray actors, each in its own process."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from frpo.cluster.actors import LearnerActor
from frpo.cluster.learner_group import LearnerGroup
from frpo.cluster.placement import OnCpu, Places, SharedGpus
from frpo.cluster.rank import GRACE_S, rank_environments
from frpo.cluster.runtime import ActorDeadError, NamedActor, log_path, wait_for
from frpo.config.loader import AnyRecipe
from frpo.errors import LostRankError
from frpo.telemetry.progress import phase


class RankDeadError(ActorDeadError, LostRankError):
    """The process of a learner rank is gone."""


class _Rank(NamedActor):
    DEAD = RankDeadError
    SILENT = LostRankError


class RayRanks:
    """Learner ranks as Ray actors. Construction starts their processes; no model is loaded yet."""

    def __init__(self, recipe: AnyRecipe, device: str, places: Places | None = None, logs: Path | None = None):
        """places: None means the node of this process, on the CPU. logs: a folder that all nodes share; None: the
        ranks' output stays in Ray's logs.
        """
        places, actor = places or OnCpu(), ray.remote(LearnerActor)
        files = [None if logs is None else str(logs.absolute() / f"learner_rank_{rank}.log")
                 for rank in range(recipe.learner.num_ranks)]
        handles = [actor.options(**places.of_rank(rank)).remote(os.getcwd(), file) for rank, file in enumerate(files)]
        anonymous = [_Rank(name=f"learner rank {rank}", handle=handle, log_path=file or "not started")
                     for rank, (handle, file) in enumerate(zip(handles, files))]
        with phase(f"starting {len(handles)} learner process(es)"):
            addresses = wait_for("start learner", [(a, a.handle.address.remote()) for a in anonymous],
                              recipe.learner.startup_timeout_s)
        if isinstance(places, SharedGpus):
            places.seats = wait_for("find the ranks' GPUs", [(a, a.handle.seat.remote()) for a in anonymous],
                                    recipe.learner.startup_timeout_s)
        where = wait_for("start learner", [(a, a.handle.node.remote()) for a in anonymous],
                         recipe.learner.startup_timeout_s)
        self.actors = [_Rank(name=a.name, handle=a.handle, log_path=file or log_path(pid), node=node)
                       for a, file, (_, _, pid), node in zip(anonymous, files, addresses, where)]
        self.environments = rank_environments([host for host, _, _ in addresses], addresses[0][1], device, recipe)

    def call(self, phase: str, method: str, arguments: Sequence[tuple[Any, ...]], kwargs: Mapping[str, Any],
             timeout_s: float) -> list[Any]:
        return wait_for(f"learner {phase}", [
            (actor, getattr(actor.handle, method).remote(*given, **kwargs))
            for actor, given in zip(self.actors, arguments, strict=True)], timeout_s, GRACE_S)

    def close(self) -> None:
        """End the processes."""
        for actor in self.actors:
            ray.kill(actor.handle)


def ray_learner(recipe: AnyRecipe, model_path: str, device: str) -> LearnerGroup:
    """Start, connect and load all ranks of a learner."""
    return LearnerGroup(recipe, model_path, device, RayRanks(recipe, device))
