"""Weights through the memory of a GPU that a learner rank and an engine's worker share. NEVER EXECUTED.

Every rank has the whole bucket after its gather, and offers a copy to the worker on its own GPU. NCCL cannot join two
processes on one GPU. The receiving end is `frpo.rollout.ipc_receiver`.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from frpo.config.rollout import WeightSyncSection
from frpo.weight_sync.packing import layout_of, pack
from frpo.weight_sync.protocol import Bucket, WeightStream, WeightSyncClient

STORAGE_DEVICE = 6
"""Which argument of `rebuild_cuda_tensor` is the number of the device, as the receiving process counts."""


class Sender:
    """Each rank has one buffer, which lasts for one push; rank 0 tells the engines what lies in all of them."""

    def __init__(self, rank: int, client: WeightSyncClient | None, section: WeightSyncSection):
        self.rank, self.client, self.section = rank, client, section

    def send(self, weights: WeightStream, version: int) -> None:
        failure: BaseException | None = None
        try:
            buffer = torch.empty(weights.largest_bucket(), dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            failure, buffer = error, None
        handles = _of_all(None if buffer is None else handle_of(buffer))
        failure = _shared(failure) or self._tried(self._open, dict(filter(None, handles)))
        for bucket in weights:
            failure = failure or self._tried(self._offer, bucket, buffer)
            torch.cuda.synchronize()
            failure = _shared(failure)  # from here on every buffer is whole
            failure = failure or self._tried(self._announce, bucket)
            failure = _shared(failure)  # every worker has read its own
        if failure is None and self.client is not None:
            self.client.finish_weight_update(str(version))
        if failure is not None:
            raise failure

    @staticmethod
    def _tried(step: Any, *arguments: Any) -> BaseException | None:
        """What the step raises: the others wait in the next collective, so that this rank has to go on."""
        try:
            step(*arguments)
        except BaseException as error:
            return error
        return None

    def _open(self, handles: dict[str, Any]) -> None:
        if self.client is not None:
            self.client.init_weight_transfer_engine({**self.section.for_engines, "handles": handles})
            self.client.start_weight_update()

    def _offer(self, bucket: Bucket, buffer: torch.Tensor) -> None:
        pack(bucket, buffer)

    def _announce(self, bucket: Bucket) -> None:
        if self.client is not None:
            self.client.update_weights({"layout": layout_of(bucket)})


def _of_all(value: Any) -> list[Any]:
    """Of every rank. Returns when all have come here."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _shared(failure: BaseException | None) -> BaseException | None:
    """This rank's failure, or another's: no worker may take what only some ranks could offer."""
    texts = _of_all(None if failure is None else repr(failure))
    others = [f"learner rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
    return failure or (RuntimeError("; ".join(others)) if others else None)


def handle_of(buffer: torch.Tensor) -> tuple[str, tuple[Any, ...]]:
    """(the GPU's UUID, what another process takes to `open_buffer`)."""
    _, arguments = reduce_tensor(buffer)
    return uuid_of(buffer.device), arguments


def open_buffer(arguments: tuple[Any, ...], device: torch.device) -> torch.Tensor:
    """The buffer of another process, whose GPU is `device` here."""
    arguments = (*arguments[:STORAGE_DEVICE], device.index, *arguments[STORAGE_DEVICE + 1:])
    return rebuild_cuda_tensor(*arguments)


def uuid_of(device: torch.device) -> str:
    """By which processes that count GPUs differently know one."""
    return str(torch.cuda.get_device_properties(device).uuid)
