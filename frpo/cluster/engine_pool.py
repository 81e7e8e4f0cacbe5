"""Start all rollout engines and stream groups from them. `EngineClient` carries weights from the learner to them."""
from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray

from frpo.cluster.actors import EngineActor
from frpo.cluster.device import check_backend, check_cpu_engines
from frpo.cluster.gpu_turns import GpuTurns, NoTurns
from frpo.cluster.learner_group import LearnerGroup
from frpo.cluster.placement import OnCpu, Places, SharedGpus, known_nodes
from frpo.cluster.runtime import ActorDeadError, NamedActor, log_path, result_of, wait_for
from frpo.config.loader import dump_recipe
from frpo.config.sections import Recipe
from frpo.errors import ConfigError, EngineError, LostNodeError
from frpo.rollout.assignment import Assignment
from frpo.rollout.construction import environment
from frpo.rollout.engine import GroupRequest, Sampling
from frpo.types import RolloutGroup

SAMPLING, SAMPLERS = "sampling", 32
"""Ray concurrency group of the calls that sample, and its number of threads.

These calls have their own threads, so that an engine can receive weights and other calls while it samples.
"""

HEALTH, ANSWER_S = "health", 10.0
"""Concurrency group of a call that waits for no other call, and seconds after which an engine that does not answer it
counts as hung.
"""

LOOK_S = 1.0
"""Seconds between two looks whether the run is ending, while no group finishes."""


class EnginesLostError(ActorDeadError):
    """Engines died or hung while they sampled. engines: their indices."""

    def __init__(self, errors: Mapping[int, ActorDeadError]):
        super().__init__("; ".join(map(str, errors.values())))
        self.engines = tuple(sorted(errors))


class EnginePool:
    """N engines, each its own actor. Construction starts all engines. No engine samples before its weights have a
    version.
    """

    def __init__(self, recipe: Recipe, model_path: str, device: str, num_engines: int | None = None,
                 places: Places | None = None, logs: Path | None = None):
        """num_engines: replaces the recipe's number, such as 0 if nothing is sampled. places: None means the node of
        this process, on the CPU. logs: a folder that all nodes share; None: the engines' output stays in Ray's logs.
        """
        count = recipe.rollout.num_engines if num_engines is None else num_engines
        if count and device == "cpu":
            check_cpu_engines()
        self.places, self.logs = places or OnCpu(), logs
        self.recipe, self.model_path, self.device = with_backend(recipe, device, self.places), model_path, device
        self.turns: NoTurns | GpuTurns = NoTurns()
        self.awake = True
        self.starting = [self._start(index) for index in range(count)]

    def _start(self, index: int) -> tuple[NamedActor, Any]:
        """Start engine `index` in its own process. Return its actor and a Ray reference that is done once it is ready.
        """
        recipe, options = self.recipe, self.places.of_engine(index)
        shown = options.get("runtime_env", {}).get("env_vars", {})
        options["runtime_env"] = {"env_vars": environment(recipe.rollout, self.device) | shown}
        threads = {SAMPLING: SAMPLERS, HEALTH: 1}
        actor = cast(Any, ray.remote)(concurrency_groups=threads)(EngineActor).options(**options)
        log = None if self.logs is None else str(self.logs.absolute() / f"rollout_engine_{index}.log")
        handle = actor.remote(dump_recipe(recipe), self.model_path, self.device, index, os.getcwd(), log)
        named = NamedActor(name=f"rollout engine {index}", handle=handle,
                           log_path=log or "the newest worker-*.err of Ray")
        return named, handle.ready.remote()

    def wait_until_ready(self) -> None:
        """Wait until all engines are loaded. Until this call they load in the background.

        Raises LostNodeError if an engine is gone with its node.
        """
        try:
            pids = wait_for("start rollout engines", self.starting, self.recipe.rollout.startup_timeout_s)
        except ActorDeadError as error:
            if self.places.nodes() - {node for node in known_nodes().values() if node}:
                raise LostNodeError(str(error)) from error
            raise
        actors = [actor for actor, _ in self.starting]
        nodes = wait_for("find the engines' nodes", [(a, a.handle.node.remote()) for a in actors],
                         self.recipe.rollout.startup_timeout_s)
        self.engines = [NamedActor(name=a.name, handle=a.handle, log_path=log_path(pid) if self.logs is None else
                                   a.log_path, node=node) for a, pid, node in zip(actors, pids, nodes)]

    def dead(self) -> list[int]:
        """List the indices of engines whose process is gone or hangs. Call this only while no engine samples."""
        return [index for index, actor in enumerate(self.engines) if _usable(actor) is None]

    def lost(self) -> list[int]:
        """List the indices of engines that can no longer sample: dead or hung engines, and engines with a mixture of
        weights.
        """
        return [index for index, actor in enumerate(self.engines) if not _usable(actor)]

    def restart(self, engines: Sequence[int]) -> None:
        """Start new processes for these engines and wait for them. The new engines do not sample before a push."""
        for index in engines:
            ray.kill(self.engines[index].handle)
            self.starting[index] = self._start(index)
        self.wait_until_ready()

    def serve_loaded(self, version: int) -> None:
        """Label the weights that all engines loaded from disk as `version`. See `RolloutEngine.serve_loaded`."""
        calls = [(a, a.handle.serve_loaded.remote(version)) for a in self.engines]
        wait_for("serve loaded weights", calls, self.recipe.rollout.timeout_s)

    def client(self) -> EngineClient:
        """Return the client through which learner rank 0 pushes weights."""
        return EngineClient(self.engines, self.recipe.rollout.tensor_parallel_size, self.recipe.weight_sync.timeout_s)

    def stream(self, assignment: Assignment, sampling: Sampling, version: int, or_newer: bool = False,
               ending: Callable[[], bool] = lambda: False) -> Iterator[RolloutGroup]:
        """Yield groups of all engines as they finish. See `RolloutEngine.generate` for `version` and `or_newer`.

        ending: asked every LOOK_S whether to leave the rest. Raises EngineError then, and if no group finishes within
        the limit on an engine that still answers. Raises EnginesLostError if engines died or hang, after the other
        engines have finished.
        """
        self.turns.sample()
        streams: dict[Any, int] = {}
        lost: dict[int, ActorDeadError] = {}

        def ask(index: int, requests: Sequence[GroupRequest]) -> None:
            method = self.engines[index].handle.generate.options(num_returns="streaming", concurrency_group=SAMPLING)
            streams[method.remote(requests, sampling, version, or_newer)] = index

        for index, share in assignment.shares.items():
            ask(index, share)
        limit = self.recipe.rollout.timeout_s
        while streams:
            ready, deadline = list[Any](), time.monotonic() + limit
            while not ready and time.monotonic() < deadline:
                if ending():
                    raise EngineError("generate: the run is ending")
                ready, _ = ray.wait(list(streams), num_returns=1, timeout=min(LOOK_S, limit), fetch_local=False)
            if not ready:
                late = {index: f"generate: no group finished within {limit:g} s on {self.engines[index]}"
                        for index in sorted(set(streams.values()))}
                if any(_usable(self.engines[index]) is not None for index in late):
                    raise EngineError("; ".join(late.values()))
                raise EnginesLostError(lost | {index: ActorDeadError(told) for index, told in late.items()})
            index = streams[ready[0]]
            try:
                yield result_of("generate", self.engines[index], next(cast("Iterator[Any]", ready[0])))
            except StopIteration:
                del streams[ready[0]]
                continue
            except ActorDeadError as error:
                del streams[ready[0]]
                lost[index] = error
                continue
            if index not in lost and (more := assignment.after_one(index)):
                ask(index, more)
        if lost:
            raise EnginesLostError(lost)

    def score(self, sequences: Sequence[tuple[Sequence[int], int]], version: int) -> list[list[np.ndarray]]:
        """Return every engine's log-probabilities of the same sequences. See `RolloutEngine.score`."""
        self.turns.sample()
        calls = [(a, a.handle.score.options(concurrency_group=SAMPLING).remote(sequences, version))
                 for a in self.engines]
        return wait_for("score on engines", calls, self.recipe.rollout.timeout_s)

    def policy_versions(self) -> list[int | None]:
        calls = [(a, a.handle.policy_version.remote()) for a in self.engines]
        return wait_for("read policy version", calls, self.recipe.rollout.timeout_s)

    def give_way(self) -> None:
        """Make room for a learner to load. On shared GPUs, wait until the engines are loaded, then put them to sleep
        if the placement lets engines sleep.
        """
        if isinstance(self.places, SharedGpus):
            self.wait_until_ready()
            if self.recipe.placement.sleeps and self.awake:
                self.sleep()

    def share(self, learner: LearnerGroup) -> None:
        """Take turns with the learner from now on, if engines sleep on shared GPUs. Call `give_way` before the learner
        loads, and this method after.
        """
        if isinstance(self.places, SharedGpus) and self.recipe.placement.sleeps:
            self.turns = learner.turns = GpuTurns(self, learner, self.recipe.placement.offload_optimizer)

    def sleep(self) -> None:
        """Free the memory of weights and KV cache in all engines. Call this only while no engine samples."""
        self._all("sleep")
        self.awake = False

    def wake(self, tag: str) -> None:
        """Allocate memory again for "weights" or "kv_cache" in all engines."""
        self._all("wake", tag)
        self.awake = True

    def _all(self, method: str, *arguments: Any) -> None:
        calls = [(a, getattr(a.handle, method).remote(*arguments)) for a in self.engines]
        wait_for(f"{method} engines", calls, self.recipe.weight_sync.timeout_s)

    def close(self) -> None:
        for actor, _ in self.starting:
            ray.kill(actor.handle)


def with_backend(recipe: Recipe, device: str, places: Places) -> Recipe:
    """Return the recipe with `weight_sync.backend: auto` resolved by device and places.

    Raises ConfigError for a backend that does not reach the engines.
    """
    check_backend(recipe, device)
    near = isinstance(places, OnCpu) and places.beside_first_rank()
    if recipe.weight_sync.backend == "cpu_shm" and isinstance(places, OnCpu) and not near:
        raise ConfigError("weight_sync.backend: cpu_shm reaches only engines on the node of learner rank 0, but "
                          "placement.engine_hosts puts engines on other nodes; set it to auto or gloo")
    if recipe.model.lora is None and recipe.weight_sync.adapters:  # engines of another model than the one trained
        recipe = recipe.model_copy(update={"weight_sync": recipe.weight_sync.model_copy(update={"adapters": False})})
    if recipe.weight_sync.backend != "auto":
        return recipe
    if device == "cuda":
        backend = "ipc" if recipe.placement.mode == "colocate" else "nccl"
    else:
        backend = "cpu_shm" if near else "gloo"
    return recipe.model_copy(update={"weight_sync": recipe.weight_sync.model_copy(update={"backend": backend})})


class EngineClient:
    """Make vLLM's weight-transfer calls on all engines at once, from inside a learner rank."""

    def __init__(self, engines: list[NamedActor], tensor_parallel_size: int, timeout_s: float):
        self.engines = engines
        self.tensor_parallel_size = tensor_parallel_size
        self.timeout_s = timeout_s

    def host(self) -> str:
        return ray.util.get_node_ip_address()

    def num_workers(self) -> int:
        return len(self.engines) * self.tensor_parallel_size

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.begin_init_weight_transfer_engine(init_info)()

    def begin_init_weight_transfer_engine(self, init_info: dict[str, Any]) -> Callable[[], None]:
        calls = []
        for index, actor in enumerate(self.engines):
            own = dict(init_info)
            if "rank_offset" in own:  # engines share one process group with the sender: each has ranks of its own
                own["rank_offset"] += index * self.tensor_parallel_size
            calls.append((actor, actor.handle.init_weight_transfer_engine.remote(own)))
        return self._wait("connect weight transfer", calls)

    def start_weight_update(self) -> None:
        self._begin("start_weight_update")()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.begin_update_weights(update_info)()

    def begin_update_weights(self, update_info: dict[str, Any]) -> Callable[[], None]:
        return self._begin("update_weights", update_info)

    def finish_weight_update(self, weight_version: str) -> None:
        self._begin("finish_weight_update", weight_version)()

    def _begin(self, method: str, *args: Any) -> Callable[[], None]:
        calls = [(a, getattr(a.handle, method).remote(*args)) for a in self.engines]
        return self._wait(f"push weights: {method}", calls)

    def _wait(self, phase: str, calls: list[tuple[NamedActor, Any]]) -> Callable[[], None]:
        """Return a function that waits for these calls. It raises EngineError at the first call that fails."""
        def wait() -> None:
            wait_for(phase, calls, self.timeout_s)

        return wait


def _usable(actor: NamedActor) -> bool | None:
    """Return `RolloutEngine.usable` of this engine; None if its process is gone or hangs."""
    alive = actor.handle.ready.options(concurrency_group=HEALTH).remote()
    if not ray.wait([alive], timeout=ANSWER_S)[0]:
        return None
    try:
        return result_of("is it alive", actor, actor.handle.usable.remote())  # behind a push that still ends
    except ActorDeadError:
        return None
