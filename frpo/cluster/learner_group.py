"""All learner ranks behind the verbs of one: each call goes to every rank and returns when all have done it."""
from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import ray

from frpo.cluster.runtime import GRACE_S, ActorDeadError, NamedActor, log_path, result_of, wait_for
from frpo.config.loader import dump_recipe, recipe_from_dict
from frpo.config.sections import Recipe
from frpo.data.batcher import score_batches
from frpo.data.layout import Layout
from frpo.learner.model import hidden_size
from frpo.telemetry import MetricSums
from frpo.types import MicroBatch, OptimStepOutput, RolloutGroup, SampleId

SHARED_MEMORY = Path("/dev/shm")
LEFTOVER_AGE_S = 60.0
"""Younger buffers may belong to a run whose ranks are just opening them."""


class _LearnerActor:
    """A process of one rank. It is started empty, so that rank 0 can offer its address before anyone connects."""

    def address(self) -> tuple[str, int, int]:
        """(host, a free port, process id)."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1], os.getpid()

    def build(self, recipe: dict[str, Any], model_path: str, device: str, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        from frpo.learner.learner import Learner

        self.learner = Learner(recipe_from_dict(recipe), model_path, device)

    def connect_engines(self, client: Any) -> None:
        from frpo.weight_sync.protocol import make_sender

        self.learner.connect(make_sender(self.learner.recipe.weight_sync, self.learner.rank, client))

    def call(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.learner, verb)(*args, **kwargs)


class LearnerGroup:
    """The learner as the controller sees it. Construction starts and connects all ranks."""

    def __init__(self, recipe: Recipe, model_path: str, device: str):
        self.recipe = recipe
        self.layout = Layout(
            num_ranks=recipe.learner.num_ranks, micro_batch_tokens=recipe.learner.micro_batch_tokens,
            packed=recipe.learner.packing, attention_length=12 * hidden_size(recipe.model, model_path))
        remove_leftovers()
        count = recipe.learner.num_ranks
        options = {"num_cpus": 0 if device == "cpu" else 1, "num_gpus": 0 if device == "cpu" else 1}
        actor = ray.remote(_LearnerActor).options(**options)
        handles = [actor.remote() for _ in range(count)]
        anonymous = [NamedActor(name=f"learner rank {rank}", handle=handle, log_path="not started")
                     for rank, handle in enumerate(handles)]
        limit = recipe.learner.startup_timeout_s
        places = wait_for("start learner", [(a, a.handle.address.remote()) for a in anonymous], limit)
        self.ranks = [NamedActor(name=a.name, handle=a.handle, log_path=log_path(pid))
                      for a, (_, _, pid) in zip(anonymous, places)]
        host, port, _ = places[0]
        self.address = (host, port)
        wait_for("load learner", [
            (a, a.handle.build.remote(dump_recipe(recipe), model_path, device,
                                      _environment(rank, count, host, port, device, recipe)))
            for rank, a in enumerate(self.ranks)], limit)

    def connect_engines(self, client: Any) -> None:
        """Give rank 0 its hold on the rollout engines."""
        self._wait("connect engines", [
            (a, a.handle.connect_engines.remote(client if rank == 0 else None)) for rank, a in enumerate(self.ranks)])

    def score_groups(self, groups: Sequence[RolloutGroup], model: str, temperature: float | None = None
                     ) -> list[tuple[np.ndarray, ...]]:
        """Per group, per completion: T log-probabilities under "policy" or "reference". See `Learner.score`."""
        scores = self.score(score_batches(groups, self.layout), model, temperature)
        return [tuple(scores[(*group.group_id, i)][len(group.prompt.token_ids):] for i in range(len(group.completions)))
                for group in groups]

    def score(self, parts: Sequence[Sequence[MicroBatch]], model: str, temperature: float | None = None
              ) -> dict[SampleId, np.ndarray]:
        """Log-probabilities of every sample in `[rank][i]` micro-batches, over all its tokens. See `Learner.score`."""
        scores: dict[SampleId, np.ndarray] = {}
        for answer in self._each("score", parts, model=model, temperature=temperature):
            scores |= answer
        return scores

    def forward_backward(self, parts: Sequence[Sequence[MicroBatch]], *, watch_movement: bool = False) -> MetricSums:
        """Accumulate one update's gradient over all ranks; the metrics of all of them merged."""
        merged = MetricSums()
        for metrics in self._each("forward_backward", parts, watch_movement=watch_movement):
            merged.update(metrics)
        return merged

    def optim_step(self, total_updates: int, *, watch_movement: bool = False) -> OptimStepOutput:
        return self._all("optim_step", total_updates, watch_movement=watch_movement)[0]

    def movement_report(self) -> dict[str, tuple[bool, bool]]:
        """name -> (any rank got a gradient, the fp32 master moved)."""
        reports = self._all("movement_report")
        return {name: (any(r[name][0] for r in reports), any(r[name][1] for r in reports)) for name in reports[0]}

    def push_weights(self, version: int) -> None:
        calls = [(a, a.handle.call.remote("push_weights", version)) for a in self.ranks]
        wait_for("push weights", calls, self.recipe.weight_sync.timeout_s)

    def save(self, folder: str) -> None:
        self._all("save", folder)

    def load(self, folder: str) -> int:
        return self._all("load", folder)[0]

    def export(self, folder: str) -> None:
        self._all("export", folder)

    def dead(self) -> list[int]:
        """Ranks whose process is gone. A rank that does not answer now is not: it may wait for one that is."""
        calls = {actor.handle.address.remote(): rank for rank, actor in enumerate(self.ranks)}
        answered, _ = ray.wait(list(calls), num_returns=len(calls), timeout=GRACE_S)
        return sorted(calls[reference] for reference in answered if not _succeeded(self.ranks[0], reference))

    def close(self) -> None:
        """End the ranks' processes and what DeepSpeed left in shared memory under their port."""
        for actor in self.ranks:
            ray.kill(actor.handle)
        for leftover in SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_*_{self.address[1]}_*"):
            leftover.unlink(missing_ok=True)

    def _all(self, verb: str, *args: Any, **kwargs: Any) -> list[Any]:
        return self._wait(verb, [(a, a.handle.call.remote(verb, *args, **kwargs)) for a in self.ranks])

    def _each(self, verb: str, parts: Sequence[Any], **kwargs: Any) -> list[Any]:
        return self._wait(verb, [
            (a, a.handle.call.remote(verb, part, **kwargs)) for a, part in zip(self.ranks, parts, strict=True)])

    def _wait(self, phase: str, calls: list[tuple[NamedActor, Any]]) -> list[Any]:
        return wait_for(f"learner {phase}", calls, self.recipe.learner.timeout_s)


def _succeeded(actor: NamedActor, reference: Any) -> bool:
    try:
        result_of("is it alive", actor, reference)
    except ActorDeadError:
        return False
    return True


def remove_leftovers() -> None:
    """Delete what killed runs have left on this machine: old buffers of ours that nobody maps.

    DeepSpeed's (67 MB a rank), and those of vLLM engines with several workers (8 MB).
    """
    old = [file for pattern in ("deepspeed_allreduce_buffer_*", "vllm_dist_*") for file in SHARED_MEMORY.glob(pattern)
           if file.stat().st_uid == os.getuid() and time.time() - file.stat().st_mtime > LEFTOVER_AGE_S]
    if not old:
        return
    maps = []
    for process in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # ended just now, or another user's, who cannot map what is ours alone
            maps.append(process.read_text(encoding="utf-8", errors="replace"))
    for file in old:
        if not any(str(file) in text for text in maps):
            file.unlink(missing_ok=True)


def _environment(rank: int, count: int, host: str, port: int, device: str, recipe: Recipe) -> dict[str, str]:
    environment = {
        "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(count), "MASTER_ADDR": host, "MASTER_PORT": str(port)}
    if device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(count),
                        "OMP_NUM_THREADS": str(recipe.learner.threads)}
    return environment
