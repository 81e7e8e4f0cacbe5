"""Interface of a weight-sync backend: one sender on every learner rank, which drives vLLM's own update sequence.

One push = start, one update per bucket, finish under a new version label. Rank 0 calls the engines. The other ranks
only take part in the gathers. Backends differ in how the bytes of a bucket travel:

    cpu_shm     one host: files in shared memory that the engines map
    gloo        any hosts, over TCP
    nccl        GPUs that learner and engines have each for themselves, on any hosts
    ipc         GPUs that a learner rank and an engine's worker share

`weight_sync.staged` decides the state after a failed push. Staged: buckets are swapped in at the end, so the engine
goes on serving the old weights. In place: an engine serves nothing until it is rebuilt and synced.
"""
from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch

from frpo.config.rollout import WeightSyncSection

Bucket = list[tuple[str, torch.Tensor]]
"""Whole parameters by checkpoint name. The tensors are valid only until the next bucket is taken."""


class WeightStream(Protocol):
    """The policy's parameters, gathered bucket by bucket. Iterating is a collective over the learner's ranks."""

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Return (name, dtype, whole shape) of every parameter, in the order of iteration, without gathering."""
        ...

    def largest_bucket(self) -> int:
        """Return the bytes of the largest bucket, packed (`weight_sync.packing`), without gathering."""
        ...

    def __iter__(self) -> Iterator[Bucket]: ...


class WeightSyncClient(Protocol):
    """Rank 0's connection to the engines. Every call reaches all engines and returns when all of them are done.

    All methods but `host` and `num_workers` belong to vLLM's weight-transfer interface. A method whose name starts with
    `begin_` returns at once, for work that engines can do only together with rank 0. Call its result to wait for the
    engines.
    timeout_s: limit of each call.
    """

    timeout_s: float

    def host(self) -> str:
        """Return an address of this process's machine that the engines reach."""
        ...

    def num_workers(self) -> int:
        """Return the number of worker processes of all engines together."""
        ...

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def begin_init_weight_transfer_engine(self, init_info: dict[str, Any]) -> Callable[[], None]: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def begin_update_weights(self, update_info: dict[str, Any]) -> Callable[[], None]: ...

    def finish_weight_update(self, weight_version: str) -> None: ...


class WeightSender(Protocol):
    """One rank's end of a backend."""

    section: WeightSyncSection

    def send(self, weights: WeightStream, version: int) -> None:
        """Push all buckets under label `version`. Collective.

        After a failure, take all remaining buckets, then raise.
        """
        ...


def make_sender(section: WeightSyncSection, rank: int, client: WeightSyncClient | None) -> WeightSender:
    """Make the sender of the recipe's backend. Only rank 0 needs `client`."""
    backend = importlib.import_module(f"frpo.weight_sync.{section.backend}")
    return backend.Sender(rank=rank, client=client, section=section)


def engine_backend(backend: str) -> str:
    """Return the name under which vLLM registers the receiving end. vLLM has backends of its own called nccl and ipc.
    """
    return f"frpo.{backend}"


def drained(buckets: Iterable[object]) -> None:
    """Take the remaining buckets and drop them. The gathers behind them are collectives in which other ranks wait."""
    for _ in buckets:
        pass
