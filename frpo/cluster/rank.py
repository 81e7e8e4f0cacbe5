"""One learner rank as a process holds it, and what whoever holds all ranks can ask of them together."""
from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from frpo.config.loader import AnyRecipe, recipe_from_dict
from frpo.config.rollout import WeightSyncSection


class RankHost:
    """A process of one rank. It is started empty, so that rank 0 can offer its address before anyone connects."""

    def address(self) -> tuple[str, int, int]:
        """(host, a free port, process id). The port stays taken for everyone who does not ask for it by number, as the
        store of the ranks will.
        """
        self.reserved = socket.socket()
        self.reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.reserved.bind(("", 0))
        return self.host(), self.reserved.getsockname()[1], os.getpid()

    def host(self) -> str:
        """Where other ranks reach this one."""
        return "127.0.0.1"

    def build(self, kind: type, recipe: dict[str, Any], model_path: str, device: str, environment: Mapping[str, str]
              ) -> None:
        """Become the rank that `environment` says. Collective."""
        os.environ.update(environment)
        from frpo.learner.learner import Learner

        self.learner = Learner(recipe_from_dict(recipe, kind), model_path, device)

    def connect_engines(self, client: Any, section: WeightSyncSection) -> None:
        """client: rank 0's hold on the rollout engines, None elsewhere."""
        from frpo.weight_sync.protocol import make_sender

        self.learner.connect(make_sender(section, self.learner.rank, client))

    def call(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        """A verb of the learner."""
        return getattr(self.learner, verb)(*args, **kwargs)


class Ranks(Protocol):
    """All ranks of one learner, wherever they run.

    environments: what each of them needs to know of the others, for `RankHost.build`.
    """

    environments: list[dict[str, str]]

    def call(self, phase: str, method: str, arguments: Sequence[tuple[Any, ...]], kwargs: Mapping[str, Any],
             timeout_s: float) -> list[Any]:
        """`RankHost.method` on every rank at once, rank i with arguments[i]; its results in order.

        Raises what a rank raises, and EngineError where one dies or does not answer in time.
        """
        ...

    def dead(self) -> list[int]:
        """Ranks whose process is gone."""
        ...

    def close(self) -> None:
        """End them."""
        ...


def rank_environment(rank: int, host: str, port: int, device: str, recipe: AnyRecipe) -> dict[str, str]:
    """How a rank that has one device of its own, or the CPU, finds the others."""
    count = recipe.learner.num_ranks
    environment = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(count), "MASTER_ADDR": host,
                   "MASTER_PORT": str(port)}
    return environment | (cpu_environment(rank, recipe) if device == "cpu" else {})


def cpu_environment(rank: int, recipe: AnyRecipe) -> dict[str, str]:
    """What DeepSpeed wants to know on a CPU, all ranks being on one machine."""
    return {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(recipe.learner.num_ranks),
            "OMP_NUM_THREADS": str(recipe.learner.threads)}
