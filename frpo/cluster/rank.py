"""Run one learner rank in a process (`RankHost`), and define the calls on all ranks together (`Ranks`)."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from frpo.cluster.launcher import INTERFACE, interface_towards
from frpo.config.learner import LearnerSection
from frpo.config.loader import AnyRecipe, recipe_from_dict
from frpo.config.rollout import WeightSyncSection
from frpo.weight_sync.addresses import reserved_port
from frpo.weight_sync.group import served_store

GRACE_S = 30.0
"""Seconds that a call on the ranks has beyond its limit, so that a collective or an engine that hangs is told first."""


class RankHost:
    """A process of one rank. The process starts without a learner, so rank 0 can offer its address before others
    connect.
    """

    def address(self) -> tuple[str, int, int]:
        """Return (host, a free port, process id). The port stays reserved: only a process that asks for its number, as
        the ranks' store does, gets it.
        """
        self.reserved = reserved_port(self.host())
        return self.host(), self.reserved.getsockname()[1], os.getpid()

    def host(self) -> str:
        """Return the address at which other ranks reach this rank."""
        return "127.0.0.1"

    def build(self, kind: type, recipe: dict[str, Any], model_path: str, device: str, environment: Mapping[str, str]
              ) -> None:
        """Load the learner of the rank that `environment` describes. Collective."""
        os.environ.update(environment)
        if interface := interface_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])):
            os.environ.setdefault(INTERFACE, interface)
        self._join(recipe_from_dict(recipe, kind).learner, device)
        from frpo.learner.learner import Learner

        self.learner = Learner(recipe_from_dict(recipe, kind).learner_spec, model_path, device)

    def _join(self, learner: LearnerSection, device: str) -> None:
        """Join the process group of all ranks, unless this process has joined it before. Rank 0 serves the store."""
        if dist.is_initialized():
            return
        host, rank = os.environ["MASTER_ADDR"], int(os.environ["RANK"])
        if rank == 0:
            store = served_store(self.reserved, host, learner.startup_timeout_s)
        else:
            store = TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False,
                             timeout=timedelta(seconds=learner.startup_timeout_s))
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank,
                                world_size=int(os.environ["WORLD_SIZE"]), timeout=timedelta(seconds=learner.timeout_s))

    def connect_engines(self, client: Any, section: WeightSyncSection) -> None:
        """Connect the learner to the rollout engines. client: the engines' client on rank 0, None on other ranks."""
        from frpo.weight_sync.protocol import make_sender

        self.learner.connect(make_sender(section, self.learner.rank, client))

    def call(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        """Call the learner's method `verb`."""
        return getattr(self.learner, verb)(*args, **kwargs)


class Ranks(Protocol):
    """All ranks of one learner, wherever they run.

    environments: for each rank, the variables by which it finds the other ranks; an argument of `RankHost.build`.
    """

    environments: list[dict[str, str]]

    def call(self, phase: str, method: str, arguments: Sequence[tuple[Any, ...]], kwargs: Mapping[str, Any],
             timeout_s: float) -> list[Any]:
        """Call `RankHost.method` on every rank at once, on rank i with arguments[i]. Return the results in rank order.

        Raises the error that a rank raises. Raises LostRankError if a rank dies, does not answer within `timeout_s` and
        GRACE_S, or cannot exchange data with the others.
        """
        ...

    def close(self) -> None:
        """End all ranks."""
        ...


def rank_environments(hosts: Sequence[str], port: int, device: str, recipe: AnyRecipe) -> list[dict[str, str]]:
    """Return, for each rank, the variables by which the rank finds the others. hosts: the address of each rank's
    machine. Each rank has one device of its own, or the CPU.
    """
    environments = []
    for rank, place in enumerate(local_places(hosts)):
        environment = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(len(hosts)), "MASTER_ADDR": hosts[0],
                       "MASTER_PORT": str(port)}
        environments.append(environment | (local_environment(*place, recipe) if device == "cpu" else {}))
    return environments


def local_places(machines: Sequence[str]) -> list[tuple[int, int]]:
    """Return (number among the ranks of its machine, number of these ranks) of each rank. machines: a name for each."""
    return [(machines[:rank].count(machine), machines.count(machine)) for rank, machine in enumerate(machines)]


def local_environment(local_rank: int, local_size: int, recipe: AnyRecipe) -> dict[str, str]:
    """Return the variables that DeepSpeed needs on a CPU."""
    return {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(local_rank), "LOCAL_SIZE": str(local_size),
            "OMP_NUM_THREADS": str(recipe.learner.threads)}
