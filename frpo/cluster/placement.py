"""Assign GPUs to learner ranks and engines: plan from the free GPUs of nodes, reserve from Ray, print a table.

split: one bundle for each learner rank and one for each engine, in one reservation. A bundle lies on one node, so all
workers of an engine share a node. Bundles fill as few nodes as possible. colocate: one bundle for each engine. The
ranks of the bundle own its GPUs; the engine starts beside them and sees the same GPUs.

CPUs are never reserved: all processes share them. A run on the CPU is on the driver's node, unless the recipe names
hosts; then ranks and engines are spread evenly over their hosts.
"""
from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from frpo.config.loader import AnyRecipe
from frpo.config.placement import PlacementSection
from frpo.config.sections import Recipe
from frpo.errors import ConfigError, EngineError, LostNodeError
from frpo.telemetry.progress import remark

logger = logging.getLogger(__name__)

GRACE_S = 5.0
"""Seconds to wait for GPUs that are not free."""

RESERVE_S = 60.0
"""Seconds that Ray may take to reserve free GPUs."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of the cluster. address: as Ray names the node. gpus: number of free GPUs."""

    address: str
    gpus: int


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """GPUs on one node for one holder: `learner rank 0`, an engine, or an engine with the ranks that share its GPUs.

    hosts: addresses of the allowed nodes; None: any node.
    """

    holder: str
    gpus: int
    hosts: tuple[str, ...] | None


def bundles_of(recipe: AnyRecipe, *, ranks: bool = True, engines: bool = True) -> list[Bundle]:
    """List the bundles that a run on GPUs reserves. ranks: False if a launcher has started them. engines: False if the
    run needs none.

    Raises ConfigError if engines and ranks cannot share GPUs.
    """
    placement = recipe.placement if isinstance(recipe, Recipe) else PlacementSection()
    count = recipe.learner.num_ranks if ranks else 0
    on_hosts, engine_hosts = (None if hosts is None else tuple(hosts)
                              for hosts in (placement.learner_hosts, placement.engine_hosts))
    if not isinstance(recipe, Recipe) or not engines:
        return [Bundle(holder=f"learner rank {rank}", gpus=1, hosts=on_hosts) for rank in range(count)]
    size, num_engines = recipe.rollout.tensor_parallel_size, recipe.rollout.num_engines
    if placement.mode == "split" or not ranks:
        return [*(Bundle(holder=f"learner rank {rank}", gpus=1, hosts=on_hosts) for rank in range(count)),
                *(Bundle(holder=f"engine {index}", gpus=size, hosts=engine_hosts) for index in range(num_engines))]
    if num_engines * size != count:
        raise ConfigError(
            f"placement: colocate gives every rank's GPU one worker of an engine, but rollout.num_engines x "
            f"tensor_parallel_size = {num_engines} x {size} = {num_engines * size} and learner.num_ranks = {count}; "
            "make them equal, or set placement to split")
    return [Bundle(holder=f"engine {index} and learner rank"
                          f"{'s' if size > 1 else ''} {_span(index * size, (index + 1) * size)}", gpus=size,
                   hosts=on_hosts) for index in range(num_engines)]


def reward_gpus(recipe: AnyRecipe) -> int:
    """Return the number of GPUs that the actors of rewards need. Parts of a GPU share one where they fit."""
    actors = [reward.actor for reward in recipe.rewards if reward.actor] if isinstance(recipe, Recipe) else []
    whole, rooms = 0, list[float]()
    for share in sorted((actor.gpus for actor in actors for _ in range(actor.count)), reverse=True):
        fitting = [number for number, room in enumerate(rooms) if room >= share - 1e-9]
        if share >= 1:
            whole += int(share)
        elif fitting:
            rooms[fitting[0]] -= share
        elif share > 0:
            rooms.append(1 - share)
    return whole + len(rooms)


def assign(bundles: Sequence[Bundle], nodes: Sequence[Node], held: int = 0) -> list[tuple[Bundle, str]]:
    """Pair each bundle with the address of a node that has room. Use few nodes in all.

    held: number of GPUs that reward actors hold, for messages.
    Raises ConfigError if a bundle does not fit. The message names the bundle, the free GPUs and the keys to change.
    """
    free = {node.address: node.gpus for node in nodes}
    places: dict[str, str] = {}
    for bundle in sorted(bundles, key=lambda each: (-each.gpus, each.hosts is None)):
        allowed = [address for address in free if bundle.hosts is None or address in bundle.hosts]
        room = [address for address in allowed if free[address] >= bundle.gpus]
        if not room:
            raise ConfigError(_does_not_fit(bundle, bundles, nodes, allowed, held))
        # Prefer a node in use already, then the node with the fewest free GPUs.
        begun = set(places.values())
        chosen = min(room, key=lambda address: (address not in begun, free[address]))
        places[bundle.holder] = chosen
        free[chosen] -= bundle.gpus
    return [(bundle, places[bundle.holder]) for bundle in bundles]


def table(placed: Sequence[tuple[Bundle, str]]) -> list[str]:
    """Return one line for each node: address, number of GPUs taken, and their holders."""
    lines: dict[str, list[Bundle]] = {}
    for bundle, address in placed:
        lines.setdefault(address, []).append(bundle)
    return [f"{address}: {sum(bundle.gpus for bundle in held)} GPU(s): "
            + ", ".join(f"{bundle.holder} ({bundle.gpus})" if bundle.gpus > 1 else bundle.holder for bundle in held)
            for address, held in lines.items()]


def free_nodes() -> list[Node]:
    """List the cluster's nodes with their GPUs that are not reserved."""
    available = ray._private.state.available_resources_per_node()
    return [Node(address=address, gpus=int(available.get(node, {}).get("GPU", 0)))
            for address, node in known_nodes().items() if node]


def known_nodes() -> dict[str, str | None]:
    """Return address -> id of the nodes that the cluster has had. None: the node is gone."""
    nodes: dict[str, str | None] = {}
    for node in ray.nodes():
        nodes[node["NodeManagerAddress"]] = node["NodeID"] if node["Alive"] else nodes.get(node["NodeManagerAddress"])
    return nodes


def own_node() -> str:
    """Return the id of the node of this process."""
    return ray.get_runtime_context().get_node_id()


def bundle_nodes(group: PlacementGroup) -> list[str]:
    """Return the id of the node of each bundle of a reservation."""
    places = placement_group_table(group)["bundles_to_node_id"]
    return [places[number] for number in range(len(places))]


def _check_alive(node: str, holder: str) -> None:
    """Raise LostNodeError if the node is gone. Ray would wait for its GPUs."""
    gone = next((each for each in ray.nodes() if each["NodeID"] == node and not each["Alive"]), None)
    if gone:
        name = f"{gone['NodeManagerHostname']} ({gone['NodeManagerAddress']})"
        raise LostNodeError(f"node {name}, where GPUs are reserved for {holder}, is gone")


def on_cpu(recipe: AnyRecipe, nodes: Mapping[str, str | None], *, ranks: bool = True) -> OnCpu:
    """Place ranks and engines on the recipe's hosts. nodes: address -> id; None: the node is gone.

    ranks: False if a launcher has started them. Warns about hosts that are gone and does without them; this process's
    node takes the place of the last one. Raises ConfigError for a host that the cluster never had.
    """
    if not isinstance(recipe, Recipe):
        return OnCpu()
    where, here, count = recipe.placement, own_node(), recipe.learner.num_ranks
    return OnCpu(ranks=_spread("learner_hosts", where.learner_hosts, count, nodes, here) if ranks else (here,),
                 engines=_spread("engine_hosts", where.engine_hosts, recipe.rollout.num_engines, nodes, here))


def _spread(key: str, hosts: Sequence[str] | None, count: int, nodes: Mapping[str, str | None], here: str
            ) -> tuple[str, ...]:
    """Return the node of each of `count` processes, in blocks of equal size. hosts: value of placement.`key`."""
    if hosts is None:
        return (here,) * count
    unknown = [host for host in hosts if host not in nodes]
    if unknown:
        raise ConfigError(f"placement.{key} = {list(hosts)}: the cluster has no node {unknown[0]}; choose among its "
                          f"nodes: {', '.join(address for address, node in nodes.items() if node)}")
    gone = [host for host in hosts if nodes[host] is None]
    if gone:
        logger.warning("placement.%s: the run goes on without %s, which is gone", key, ", ".join(gone))
    usable = [node for host in hosts if (node := nodes[host]) is not None] or [here]
    return tuple(usable[number * len(usable) // count] for number in range(count))


class Places(Protocol):
    """Options of Ray actors: the place of each actor and the resources that it reserves."""

    def of_rank(self, rank: int) -> dict[str, Any]: ...

    def of_engine(self, index: int) -> dict[str, Any]: ...

    def nodes(self) -> set[str]:
        """Return the ids of all nodes with a place."""
        ...


@dataclass(frozen=True)
class OnCpu:
    """Places on the CPU. ranks, engines: id of the node of each; none: all are on the node of this process."""

    ranks: Sequence[str] = ()
    engines: Sequence[str] = ()

    def of_rank(self, rank: int) -> dict[str, Any]:
        return self._on(self.ranks[rank] if self.ranks else own_node())

    def of_engine(self, index: int) -> dict[str, Any]:
        """Return the engine's place. In place of a node that is gone, take another engine's, or this process's node."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        wanted = [*self.engines[index:index + 1], *self.engines, own_node()]
        return self._on(next(node for node in wanted if node in alive))

    def nodes(self) -> set[str]:
        return {*self.ranks, *self.engines} or {own_node()}

    def beside_first_rank(self) -> bool:
        """Return whether all engines are on the node of learner rank 0."""
        return set(self.engines) <= {self.ranks[0] if self.ranks else own_node()}

    @staticmethod
    def _on(node: str) -> dict[str, Any]:
        return {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


@dataclass
class OnGpus:
    """Places in a reservation: first one bundle for each rank, then one for each engine.

    bundles: id of the node of each bundle.
    """

    group: PlacementGroup
    ranks: int
    engine_gpus: int
    bundles: Sequence[str]

    def nodes(self) -> set[str]:
        return set(self.bundles)

    def of_rank(self, rank: int) -> dict[str, Any]:
        return self._in(rank, 1)

    def of_engine(self, index: int) -> dict[str, Any]:
        """Return the engine's place. Raises LostNodeError if its node is gone."""
        _check_alive(self.bundles[self.ranks + index], f"engine {index}")
        return self._in(self.ranks + index, self.engine_gpus)

    def _in(self, bundle: int, gpus: int) -> dict[str, Any]:
        return {"num_cpus": 0, "num_gpus": gpus, "scheduling_strategy": PlacementGroupSchedulingStrategy(
            self.group, placement_group_bundle_index=bundle)}


@dataclass
class SharedGpus:
    """Places on shared GPUs. Ranks own the GPUs of a bundle; the bundle's engine sees the same GPUs.

    Engines can start only after `seats` is filled.
    bundles: id of the node of each bundle. seats: (id of the node, GPU as CUDA_VISIBLE_DEVICES names it) of each rank.
    """

    group: PlacementGroup
    engine_gpus: int
    bundles: Sequence[str]
    seats: list[tuple[str, str]] = field(default_factory=list)

    def nodes(self) -> set[str]:
        return set(self.bundles)

    def of_rank(self, rank: int) -> dict[str, Any]:
        return {"num_cpus": 0, "num_gpus": 1, "scheduling_strategy": PlacementGroupSchedulingStrategy(
            self.group, placement_group_bundle_index=rank // self.engine_gpus)}

    def of_engine(self, index: int) -> dict[str, Any]:
        """Return the engine's place. Raises LostNodeError if its node is gone."""
        _check_alive(self.bundles[index], f"engine {index}")
        own = self.seats[index * self.engine_gpus:(index + 1) * self.engine_gpus]
        return {"num_cpus": 0, "num_gpus": 0,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(own[0][0], soft=False),
                "runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ",".join(gpu for _, gpu in own)}}}


@contextmanager
def reserved(recipe: AnyRecipe, device: str, *, ranks: bool = True, engines: bool = True) -> Iterator[Places]:
    """Reserve places for a run until the context ends. Raises ConfigError or EngineError if they are not available."""
    if device == "cpu":
        yield on_cpu(recipe, known_nodes(), ranks=ranks)
        return
    bundles = bundles_of(recipe, ranks=ranks, engines=engines)
    placed = _planned(bundles, reward_gpus(recipe))
    remark(table(placed))
    # Each bundle is bound to its node by the resource that Ray gives every node, so that the table holds.
    group = placement_group([{"GPU": bundle.gpus, f"node:{address}": 0.001} for bundle, address in placed])
    try:
        if not group.wait(RESERVE_S):
            if gone := [address for _, address in placed if known_nodes()[address] is None]:
                raise LostNodeError(f"node {gone[0]}, where GPUs were to be reserved, is gone")
            raise EngineError(f"Ray did not reserve {sum(bundle.gpus for bundle in bundles)} GPUs within {RESERVE_S:g} "
                              "s, since another job took them; see `ray status`, and start again when they are free")
        if isinstance(recipe, Recipe) and ranks and engines and recipe.placement.mode == "colocate":
            yield SharedGpus(group, recipe.rollout.tensor_parallel_size, bundle_nodes(group))
        else:
            size = recipe.rollout.tensor_parallel_size if isinstance(recipe, Recipe) and engines else 0
            yield OnGpus(group, recipe.learner.num_ranks if ranks else 0, size, bundle_nodes(group))
    finally:
        remove_placement_group(group)


def has_room(recipe: AnyRecipe, *, ranks: bool, engines: bool) -> bool:
    """Return whether the cluster has free GPUs for all that the run reserves, and for its reward actors."""
    others = [Bundle(holder="a reward actor", gpus=1, hosts=None)] * reward_gpus(recipe)
    try:
        assign([*bundles_of(recipe, ranks=ranks, engines=engines), *others], free_nodes())
    except ConfigError:
        return False
    return True


def _planned(bundles: Sequence[Bundle], held: int) -> list[tuple[Bundle, str]]:
    """Assign the bundles to free nodes, retrying for GRACE_S. Ray registers late that an earlier run freed its GPUs."""
    deadline = time.monotonic() + GRACE_S
    while True:
        try:
            return assign(bundles, free_nodes(), held)
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _does_not_fit(bundle: Bundle, bundles: Sequence[Bundle], nodes: Sequence[Node], allowed: Sequence[str], held: int
                  ) -> str:
    needed = sum(each.gpus for each in bundles)
    free = ", ".join(f"{node.address} has {node.gpus}" for node in nodes) or "no node is alive"
    free += f" (reward actors hold {held} more, rewards[].actor.gpus)" if held else ""
    if bundle.hosts and not allowed:
        return (f"placement puts {bundle.holder} on {', '.join(bundle.hosts)}, but the cluster has no such node; "
                f"choose among its nodes: {', '.join(node.address for node in nodes)}")
    largest = max((node.gpus for node in nodes if node.address in allowed), default=0)
    if bundle.gpus > largest:
        return (f"{bundle.holder} needs {bundle.gpus} GPUs on one node (rollout.tensor_parallel_size = {bundle.gpus}), "
                f"but no node has that many free: {free}; lower it, use larger nodes, or wait until GPUs become "
                "free")
    return (f"no GPU is free for {bundle.holder}: the recipe needs {needed} (learner.num_ranks, rollout.num_engines x "
            f"tensor_parallel_size), but {sum(node.gpus for node in nodes)} are free: {free}; lower them, set "
            "placement to colocate, or wait until GPUs become free")


def _span(begin: int, end: int) -> str:
    return str(begin) if end - begin == 1 else f"{begin} to {end - 1}"
