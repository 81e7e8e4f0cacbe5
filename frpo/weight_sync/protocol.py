"""What a weight-sync backend is: a sender on every learner rank, driving vLLM's own update sequence on the engines.

One push = start, one update per bucket, finish under a new version label. Rank 0 talks to the engines; the other ranks
only take part in the gathers. Backends differ in how a bucket's bytes travel:

    cpu_shm     one host: files in shared memory that the engines map
    gloo        any hosts, over TCP
    nccl        GPUs that learner and engines have each for themselves, on any hosts
    ipc         GPUs that a learner rank and an engine's worker share

`weight_sync.staged` says what a failed push leaves. Staged, buckets are swapped in at the end, so that the old weights
go on serving. In place, an engine serves nothing until it is rebuilt and synced.
"""
from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch

from frpo.config.rollout import WeightSyncSection

Bucket = list[tuple[str, torch.Tensor]]
"""Whole parameters by checkpoint name; the tensors are valid only until the next bucket is taken."""


class WeightStream(Protocol):
    """The policy's parameters, gathered bucket by bucket; iterating is a collective over the learner's ranks."""

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, whole shape) of every parameter, in the order of iteration, without gathering."""
        ...

    def largest_bucket(self) -> int:
        """Bytes of the largest bucket, packed (`weight_sync.packing`), without gathering."""
        ...

    def __iter__(self) -> Iterator[Bucket]: ...


class WeightSyncClient(Protocol):
    """Rank 0's hold on the engines; every call reaches all of them and returns when all have done it.

    All but the first method are those of vLLM's weight-transfer interface. What begins with `begin_` returns at once,
    for what engines can do only together with rank 0; calling its result waits.
    timeout_s: limit of each call.
    """

    timeout_s: float

    def host(self) -> str:
        """An address of this process's machine that the engines reach."""
        ...

    def num_workers(self) -> int:
        """Worker processes of all engines together."""
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
        """Push all buckets under label `version`. Collective: takes every bucket even after a failure, then raises."""
        ...


def make_sender(section: WeightSyncSection, rank: int, client: WeightSyncClient | None) -> WeightSender:
    """The sender of the recipe's backend; `client` is needed on rank 0 only."""
    backend = importlib.import_module(f"frpo.weight_sync.{section.backend}")
    return backend.Sender(rank=rank, client=client, section=section)


def engine_backend(backend: str) -> str:
    """The name under which vLLM knows the receiving end; it has some of its own called nccl and ipc."""
    return f"frpo.{backend}"


def drained(buckets: Iterable[object]) -> None:
    """Take the remaining buckets and drop them: the gathers behind them are collectives that other ranks wait in."""
    for _ in buckets:
        pass
