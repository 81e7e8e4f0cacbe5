"""The classes of which Ray makes processes: a learner rank and a rollout engine.

Ray imports this module before it makes an object. Large packages are imported by `__init__`, quickly.
"""
from __future__ import annotations

from typing import Any

import ray

from frpo.cluster.actor_logs import begin_in
from frpo.cluster.rank import RankHost
from frpo.cluster.runtime import Node, node_here
from frpo.config.loader import recipe_from_dict
from frpo.imports import keep_imported, quick_imports
from frpo.rollout.engine import RolloutEngine


class LearnerActor(RankHost):
    """A RankHost that has imported its packages and tells where it runs."""

    def __init__(self, folder: str, log: str | None):
        """See `begin_in`."""
        begin_in(folder, log)
        with quick_imports():
            import frpo.learner.learner  # noqa: F401
        keep_imported()

    def host(self) -> str:
        return ray.util.get_node_ip_address()

    def node(self) -> Node:
        return node_here()

    def seat(self) -> tuple[str, str]:
        """Return (id of the node, this rank's GPU as CUDA_VISIBLE_DEVICES names it)."""
        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_accelerator_ids()["GPU"][0]


class EngineActor(RolloutEngine):
    """A RolloutEngine built from a dumped recipe, because Ray constructs actors from plain values."""

    def __init__(self, recipe: dict[str, Any], model_path: str, device: str, index: int, folder: str = ".",
                 log: str | None = None):
        """folder, log: see `begin_in`."""
        begin_in(folder, log)
        super().__init__(recipe_from_dict(recipe), model_path, device, index)

    def node(self) -> Node:
        return node_here()
