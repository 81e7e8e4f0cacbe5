"""Run reward functions in Ray actors: anywhere in the cluster, with CPUs and GPUs of their own.

An `ActorWorker` takes the place of a worker process in a `RewardPool`. Its actor runs one call at a time, on the main
thread of its process. The actor's death ends one call; the next call starts another actor.
"""
from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from frpo.cluster.placement import reward_gpus
from frpo.cluster.runtime import GRACE_S, log_path
from frpo.config.sections import Recipe
from frpo.errors import ConfigError, RewardError
from frpo.loading import load_function, parameters_of, path_without_siblings
from frpo.rewards.pool import processes_of
from frpo.rewards.protocol import ActorSpec, RewardSpec
from frpo.rewards.serving import Loaded, Raised, Returned, answer_to
from frpo.rewards.stop import Stop
from frpo.rewards.worker import RewardCallError, RewardTimeoutError, Worker


def workers_of(spec: RewardSpec) -> Sequence[Worker]:
    """Make the actors of a reward, or its worker processes if it has no `actor`."""
    if spec.actor is None:
        return processes_of(spec)
    return [ActorWorker(name=spec.name, function=spec.function, timeout_s=spec.timeout_s, actor=spec.actor)
            for _ in range(spec.actor.count)]


def check_actors(recipe: Recipe) -> None:
    """Raise ConfigError if the running cluster has fewer GPUs or CPUs than the actors of the recipe's rewards need."""
    actors = {reward.name: reward.actor for reward in recipe.rewards if reward.actor is not None}
    needed = {"gpus": reward_gpus(recipe), "cpus": sum(actor.count * actor.cpus for actor in actors.values())}
    for key, name in (("gpus", "GPU"), ("cpus", "CPU")):
        present = ray.cluster_resources().get(name, 0.0)
        if needed[key] > present:
            each = ", ".join(f"{reward}: {actor.count} x {getattr(actor, key):g}" for reward, actor in actors.items())
            raise ConfigError(f"rewards[].actor.{key}: the actors of rewards need {needed[key]:g} {name}(s) ({each}), "
                              f"but the cluster has {present:g}; set {key} to 0 or lower, lower count, or add nodes")


class _FunctionActor:
    """A reward function in the process of an actor."""

    def __init__(self) -> None:
        self._function: Callable[..., Any] | None = None

    def pid(self) -> int:
        return os.getpid()

    def load(self, function: str, folder: str, path: Sequence[str]) -> Loaded | Raised:
        """Import the function. folder: where relative paths begin, if this node has it. path: modules of the run."""
        with suppress(OSError):
            os.chdir(folder)
        sys.path.extend(entry for entry in path if entry not in sys.path)
        try:
            self._function = load_function(function)
        except RewardError as error:
            return Raised(text=str(error))
        return Loaded(parameters=parameters_of(self._function))

    def call(self, message: bytes) -> Returned | Raised | None:
        assert self._function is not None  # the worker calls only what it has loaded
        return answer_to(self._function, message)


class ActorWorker(Worker):
    """Reward function in an actor of its own."""

    def __init__(self, *, name: str, function: str, timeout_s: float, actor: ActorSpec) -> None:
        super().__init__(name=name, function=function, timeout_s=timeout_s)
        self._spec = actor
        self._actor: Any = None
        self._log = "it has not started"

    def kill(self) -> None:
        actor = self._actor
        if actor is not None and ray.is_initialized():
            ray.kill(actor)

    def _gone(self) -> str | None:
        if self._actor is None:
            return None
        try:
            ray.get(self._actor.pid.remote(), timeout=GRACE_S)
        except RayError as error:
            return f"died ({_cause(error)})"
        return None

    def _spawn(self) -> None:
        options: dict[str, Any] = {"num_cpus": self._spec.cpus, "num_gpus": self._spec.gpus}
        if not self._spec.gpus and ray.cluster_resources().get("GPU"):  # else it would see the GPUs of others
            options["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
        self._actor = ray.remote(_FunctionActor).options(**options).remote()

    def _exchange(self, message: dict[str, Any] | None, timeout_s: float, what: str, stop: Stop) -> Any:
        if message is not None:
            return self._answer(self._actor.call.remote(pickle.dumps(message)), timeout_s, what, stop)
        actor = self._actor
        try:
            self._log = log_path(self._answer(actor.pid.remote(), timeout_s, "the start of its actor", stop))
        except RewardTimeoutError:
            free = ray.available_resources()
            raise RewardCallError(
                f"{self.label}: Ray did not start its actor within {timeout_s:g} s; it reserves {self._spec.gpus:g} "
                f"GPU(s) and {self._spec.cpus:g} CPU(s), and {free.get('GPU', 0):g} and {free.get('CPU', 0):g} are "
                "free; lower rewards[].actor, or add nodes") from None
        return self._answer(actor.load.remote(self._function, self._folder, path_without_siblings()), timeout_s, what,
                            stop)

    def _answer(self, reference: Any, timeout_s: float, what: str, stop: Stop) -> Any:
        """Wait for one answer of the actor. See `_exchange` for the errors."""
        answer = error = None
        with stop.calls(self.kill):
            try:
                answer = ray.get(reference, timeout=timeout_s)
            except RayError as raised:
                error = raised
        if error is None and not stop.is_set():
            return answer
        self._discard()
        if stop.is_set():
            raise self._stopped(what)
        if isinstance(error, GetTimeoutError):
            raise self._too_long(what, timeout_s)
        raise RewardCallError(f"{self.label}: its actor failed during {what}: {_cause(error)}; its log: {self._log}")

    def _end(self) -> None:
        if self._actor is not None:
            self._discard()

    def _discard(self) -> None:
        self.kill()
        self._actor = self._parameters = None


def _cause(error: BaseException | None) -> str:
    """Return Ray's words in one line."""
    return " ".join(str(error).split())
