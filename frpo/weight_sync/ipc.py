"""Weights through the memory of a GPU that a learner rank and an engine's worker share. NEVER EXECUTED.

Every rank has the whole bucket after its gather and offers a copy to the worker on its own GPU. This backend exists
because NCCL cannot join two processes on one GPU. The receiving end is `frpo.rollout.ipc_receiver`.
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
"""Index of the argument of `rebuild_cuda_tensor` that is the device number, as the receiving process counts devices."""


class Sender:
    """Sender with one buffer per rank, which lasts for one push. Rank 0 sends the layout of all buffers to the engines.
    """

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
            failure = _shared(failure)  # every worker has read its own buffer
        if failure is None and self.client is not None:
            self.client.finish_weight_update(str(version))
        if failure is not None:
            raise failure

    @staticmethod
    def _tried(step: Any, *arguments: Any) -> BaseException | None:
        """Run the step and return the error that it raises, or None.

        This rank has to go on after an error, since the others wait in the next collective.
        """
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
    """Gather the value of every rank. Return when all ranks have called this function."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _shared(failure: BaseException | None) -> BaseException | None:
    """Return this rank's failure, or else an error that lists the failures of other ranks; None if there is no failure.

    No worker may take a bucket that only some ranks could offer.
    """
    texts = _of_all(None if failure is None else repr(failure))
    others = [f"learner rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
    return failure or (RuntimeError("; ".join(others)) if others else None)


def handle_of(buffer: torch.Tensor) -> tuple[str, tuple[Any, ...]]:
    """Return the GPU's UUID and the arguments with which another process calls `open_buffer`."""
    _, arguments = reduce_tensor(buffer)
    return uuid_of(buffer.device), arguments


def open_buffer(arguments: tuple[Any, ...], device: torch.device) -> torch.Tensor:
    """Open the buffer of another process. `device` is that buffer's GPU as this process counts GPUs."""
    arguments = (*arguments[:STORAGE_DEVICE], device.index, *arguments[STORAGE_DEVICE + 1:])
    return rebuild_cuda_tensor(*arguments)


def uuid_of(device: torch.device) -> str:
    """Return the UUID of a GPU, which is the same in processes that count GPUs differently."""
    return str(torch.cuda.get_device_properties(device).uuid)
