"""Run learner ranks as Ray actors, each in its own process."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray

from frpo.cluster.learner_group import LearnerGroup
from frpo.cluster.placement import OnCpu, Places, SharedGpus
from frpo.cluster.rank import RankHost, rank_environment
from frpo.cluster.runtime import GRACE_S, ActorDeadError, NamedActor, log_path, result_of, wait_for
from frpo.config.loader import AnyRecipe
from frpo.telemetry.progress import phase


class _LearnerActor(RankHost):
    def host(self) -> str:
        return ray.util.get_node_ip_address()

    def seat(self) -> tuple[str, str]:
        """Return (id of the node, this rank's GPU as CUDA_VISIBLE_DEVICES names it)."""
        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_accelerator_ids()["GPU"][0]


class RayRanks:
    """Learner ranks as Ray actors. Construction starts their processes; no model is loaded yet."""

    def __init__(self, recipe: AnyRecipe, device: str, places: Places | None = None):
        """places: None means the CPU."""
        places, actor = places or OnCpu(), ray.remote(_LearnerActor)
        handles = [actor.options(**places.of_rank(rank)).remote() for rank in range(recipe.learner.num_ranks)]
        anonymous = [NamedActor(name=f"learner rank {rank}", handle=handle, log_path="not started")
                     for rank, handle in enumerate(handles)]
        with phase(f"starting {len(handles)} learner process(es)"):
            addresses = wait_for("start learner", [(a, a.handle.address.remote()) for a in anonymous],
                              recipe.learner.startup_timeout_s)
        if isinstance(places, SharedGpus):
            places.seats = wait_for("find the ranks' GPUs", [(a, a.handle.seat.remote()) for a in anonymous],
                                    recipe.learner.startup_timeout_s)
        self.actors = [NamedActor(name=a.name, handle=a.handle, log_path=log_path(pid))
                       for a, (_, _, pid) in zip(anonymous, addresses)]
        host, port, _ = addresses[0]
        self.environments = [
            rank_environment(rank, host, port, device, recipe) for rank in range(recipe.learner.num_ranks)]

    def call(self, phase: str, method: str, arguments: Sequence[tuple[Any, ...]], kwargs: Mapping[str, Any],
             timeout_s: float) -> list[Any]:
        return wait_for(f"learner {phase}", [
            (actor, getattr(actor.handle, method).remote(*given, **kwargs))
            for actor, given in zip(self.actors, arguments, strict=True)], timeout_s)

    def dead(self) -> list[int]:
        """List the ranks whose process is gone. A rank that does not answer now counts as alive, because it may wait
        for a dead rank.
        """
        calls = {actor.handle.address.remote(): rank for rank, actor in enumerate(self.actors)}
        answered, _ = ray.wait(list(calls), num_returns=len(calls), timeout=GRACE_S)
        return sorted(calls[reference] for reference in answered if not _succeeded(self.actors[0], reference))

    def close(self) -> None:
        """End the processes."""
        for actor in self.actors:
            ray.kill(actor.handle)


def ray_learner(recipe: AnyRecipe, model_path: str, device: str) -> LearnerGroup:
    """Start, connect and load all ranks of a learner."""
    return LearnerGroup(recipe, model_path, device, RayRanks(recipe, device))


def _succeeded(actor: NamedActor, reference: Any) -> bool:
    try:
        result_of("is it alive", actor, reference)
    except ActorDeadError:
        return False
    return True
