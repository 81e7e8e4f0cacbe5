"""Ray itself: start or join a cluster, check that it is large enough, wait for calls with a limit.

It does not know what its actors do.
"""
from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from frpo.config.sections import Recipe
from frpo.errors import ConfigError, EngineError, FrpoError

RAY_ENVIRONMENT = {"RAY_DEDUP_LOGS": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_AUTH_MODE": "token",
                   "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True, kw_only=True)
class NamedActor:
    """A Ray actor, the name by which errors call it, and where its log lies."""

    name: str
    handle: Any
    log_path: str

    def __str__(self) -> str:
        return f"{self.name} (log: {self.log_path})"


@contextmanager
def ray_session() -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS, or start one on this machine that ends with the context."""
    for key, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        os.environ.pop("RAY_AUTH_MODE", None)  # tokens guard clusters that others can reach
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error")
    else:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    try:
        yield
    finally:
        ray.shutdown()


def choose_device(recipe: Recipe) -> str:
    """"cuda" or "cpu" for this cluster, as run.device asks. Raises ConfigError if it has fewer GPUs than the recipe needs."""
    present = int(ray.cluster_resources().get("GPU", 0))
    if recipe.run.device == "cpu" or (recipe.run.device == "auto" and present == 0):
        return "cpu"
    engines = recipe.rollout.num_engines * recipe.rollout.tensor_parallel_size
    needed = engines + recipe.learner.num_ranks
    if needed > present:
        raise ConfigError(
            f"the recipe needs {needed} GPUs (rollout.num_engines x tensor_parallel_size = {engines}, "
            f"learner.num_ranks = {recipe.learner.num_ranks}), the cluster has {present}; lower them or add nodes")
    return "cuda"


def log_path(pid: int) -> str:
    """The file that holds the standard error of an actor's process, on its node."""
    logs = f"{ray._private.worker._global_node.get_session_dir_path()}/logs"
    found = glob.glob(f"{logs}/worker-*-{pid}.err")
    return found[0] if found else f"{logs}/worker-*-{pid}.err on the actor's node"


def wait_for(phase: str, calls: Sequence[tuple[NamedActor, Any]], timeout_s: float) -> list[Any]:
    """Results of one call an actor, in order.

    Raises EngineError naming phase and actor when one dies or the limit passes; an error of frpo's own raised inside an
    actor comes out as itself.
    """
    waiting = {reference: actor for actor, reference in calls}
    done, late = ray.wait(list(waiting), num_returns=len(waiting), timeout=timeout_s, fetch_local=False)
    results = {}
    for reference in done:
        results[reference] = result_of(phase, waiting[reference], reference)
    if late:
        names = ", ".join(str(waiting[reference]) for reference in late)
        raise EngineError(f"{phase}: no answer within {timeout_s:g} s from {names}")
    return [results[reference] for _, reference in calls]


def result_of(phase: str, actor: NamedActor, reference: Any) -> Any:
    try:
        return ray.get(reference, timeout=60)
    except RayTaskError as error:
        if isinstance(error.cause, FrpoError):
            raise error.cause from None
        raise EngineError(f"{phase}: {actor} raised {error.cause!r}") from error
    except (RayActorError, GetTimeoutError) as error:
        raise EngineError(f"{phase}: {actor} died: {str(error).splitlines()[0]}") from None
