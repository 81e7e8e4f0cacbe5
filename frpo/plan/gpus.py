"""Compute the memory that each kind of GPU of a run needs at each turn, and assign GPUs to nodes.

split: each rank and each worker has a GPU of its own. colocate: a rank and a worker share a GPU. If engines sleep,
they take turns (`frpo.cluster.gpu_turns`); otherwise both use the GPU all the time.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from frpo.cluster.placement import Bundle, Node, assign, bundles_of
from frpo.config.loader import AnyRecipe
from frpo.config.placement import PlacementSection
from frpo.config.sections import Recipe
from frpo.plan import engine, learner
from frpo.plan.parts import GB, Part, total
from frpo.plan.shape import Shape

RANK, WORKER, SHARED = "learner rank", "engine worker", "shared GPU"


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Nodes of a cluster. gpus: number in each node. memory: bytes of each GPU."""

    nodes: int
    gpus: int
    memory: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """A recipe, the shapes of its models, and the memory of a GPU in bytes."""

    recipe: AnyRecipe
    shape: Shape
    reference_shape: Shape
    memory: float

    @property
    def sampling(self) -> Recipe | None:
        """The recipe, if the run has engines, else None."""
        recipe = self.recipe
        return recipe if isinstance(recipe, Recipe) and recipe.rollout.replay is None else None

    @property
    def sharing(self) -> PlacementSection | None:
        """The placement, if ranks and engines share GPUs, else None."""
        placement = None if self.sampling is None else self.sampling.placement
        return None if placement is None or placement.mode != "colocate" else placement

    @property
    def samples(self) -> bool:
        """Whether the run has engines."""
        return self.sampling is not None

    @property
    def shares(self) -> bool:
        return self.sharing is not None

    @property
    def backend(self) -> str | None:
        """Backend of the push, as `frpo.cluster.engine_pool` chooses it on GPUs; None without engines."""
        if self.sampling is None:
            return None
        asked = self.sampling.weight_sync.backend
        return ("ipc" if self.shares else "nccl") if asked == "auto" else asked

    @property
    def job(self) -> learner.Job:
        return learner.job_of(self.recipe, self.shape, self.reference_shape, self.backend)

    @property
    def worker(self) -> engine.Worker | None:
        if self.sampling is None or self.backend is None:
            return None
        return engine.worker_of(self.sampling, self.shape, self.memory, self.backend)


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Memory that one kind of GPU needs at the fullest moment of one turn. available: bytes."""

    role: str
    turn: str
    parts: tuple[Part, ...]
    available: float

    @property
    def needed(self) -> float:
        return total(self.parts)

    @property
    def left(self) -> float:
        return self.available - self.needed

    @property
    def fits(self) -> bool:
        return self.left >= 0


def demands(run: Run) -> list[Demand]:
    """List the demands of every kind of GPU at every turn."""
    worker = run.worker
    if worker is not None and run.shares:
        return [*_shared(run), _starting(run, worker)]
    turn, parts = learner.peak(run.job)
    found = [Demand(role=RANK, turn=turn, parts=parts, available=run.memory)]
    if worker is not None:
        awake = (*engine.sampling(worker), engine.receiving(worker))
        found += [Demand(role=WORKER, turn="sampling", parts=awake, available=run.memory), _starting(run, worker)]
    return found


def _starting(run: Run, worker: engine.Worker) -> Demand:
    """Return the demand that vLLM's share of the GPU must hold for vLLM to start."""
    return Demand(role=WORKER, turn="start, vLLM's share", parts=engine.smallest(worker),
                  available=worker.utilization * run.memory)


def _shared(run: Run) -> list[Demand]:
    job, worker, placement = run.job, run.worker, run.sharing
    assert worker is not None and placement is not None  # an engine and a rank share
    turn, busy = learner.peak(job)
    idle = learner.kept(job, offloaded=placement.sleeps and placement.offload_optimizer)
    awake, arriving = engine.sampling(worker), (learner.pushing(job), engine.receiving(worker))
    if placement.sleeps:
        turns = {f"learning: {turn}": (*busy, engine.ASLEEP),
                 "push": (*idle, engine.weights(worker), engine.WORKSPACE, *arriving),
                 "sampling": (*idle, *awake)}
    else:
        turns = {f"learning: {turn}": (*busy, *awake), "push": (*idle, *awake, *arriving)}
    return [Demand(role=SHARED, turn=name, parts=parts, available=run.memory) for name, parts in turns.items()]


def tightest(found: Sequence[Demand]) -> Demand:
    return min(found, key=lambda demand: demand.left)


def variants(run: Run) -> list[tuple[bool, bool, float]]:
    """List (sleep, offload_optimizer, bytes at the fullest turn) of a colocated run.

    offload_optimizer is possible under ZeRO-3 only.
    """
    found = []
    for sleep, offload in ((True, False), (True, True), (False, False)):
        if offload and run.job.strategy.stage < 3:
            continue
        changed = with_value(run, "placement", sleep=sleep, offload_optimizer=offload)
        found.append((sleep, offload, max(demand.needed for demand in _shared(changed))))
    return found


def with_value(run: Run, section: str, **values: object) -> Run:
    """Return the same run with other values in a section of its recipe. The values are not checked."""
    changed = getattr(run.recipe, section).model_copy(update=values)
    return Run(recipe=run.recipe.model_copy(update={section: changed}), shape=run.shape,
               reference_shape=run.reference_shape, memory=run.memory)


# --- nodes ------------------------------------------------------------------------------------------------------------

def bundles(run: Run) -> list[Bundle]:
    return bundles_of(run.recipe, engines=run.samples)


def machines(run: Run, nodes: int | None, gpus: int | None, memory: float) -> Machines:
    """Return the machines of a run. nodes: None means one. gpus: number in each node; None: as many as the recipe asks
    for. memory: GB of each GPU.
    """
    wanted, nodes = bundles(run), nodes or 1
    least = max(bundle.gpus for bundle in wanted)
    asked = math.ceil(sum(bundle.gpus for bundle in wanted) / nodes)
    return Machines(nodes=nodes, gpus=gpus or max(least, asked), memory=memory * GB)


def placed(run: Run, on: Machines) -> list[tuple[Bundle, str]]:
    """Pair each bundle with its node. Nodes get the placement's host names first, then numbers. Raises ConfigError."""
    wanted = bundles(run)
    named = list(dict.fromkeys(host for bundle in wanted for host in bundle.hosts or ()))
    names = [*named, *(f"node {number}" for number in range(1, on.nodes + 1))][:on.nodes]
    return assign(wanted, [Node(address=name, gpus=on.gpus) for name in names])


def host_memory(run: Run, where: Sequence[tuple[Bundle, str]]) -> dict[str, float]:
    """Return node -> bytes of CPU memory for its ranks and workers, without the processes' own memory."""
    found: dict[str, float] = {}
    worker, sharing = run.worker, run.sharing
    for bundle, node in where:
        ranks = bundle.gpus if "rank" in bundle.holder else 0
        workers = bundle.gpus if bundle.holder.startswith("engine") else 0
        size = ranks * learner.host(run.job).size + (workers * engine.host(worker).size if worker else 0)
        found[node] = found.get(node, 0) + size
    if sharing is not None and sharing.offload_optimizer and run.job.strategy.stage == 3:
        moved = total([learner.optimizer(run.job), learner.gradients(run.job)])
        for bundle, node in where:
            found[node] += bundle.gpus * moved
    return found
