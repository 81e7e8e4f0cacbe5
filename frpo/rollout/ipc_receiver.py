"""Receive the weights of `weight_sync.ipc` inside a vLLM worker on a learner rank's GPU. NEVER EXECUTED."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo

from frpo.rollout.receiver import InitInfo, Receiver
from frpo.weight_sync.ipc import open_buffer, uuid_of
from frpo.weight_sync.packing import Layout, unpack


@dataclass(kw_only=True)
class IpcInitInfo(InitInfo):
    """handles: UUID of a GPU -> argument of `open_buffer` for the buffer of the rank on that GPU."""

    handles: dict[str, tuple[Any, ...]]


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """layout: layout of the bucket that is now in every buffer, see `weight_sync.packing`."""

    layout: Layout


class IpcReceiver(Receiver[IpcInitInfo, UpdateInfo]):
    """Read the buffer of the rank on the worker's own GPU. The buffer holds another bucket after each answer."""

    init_info_cls = IpcInitInfo
    update_info_cls = UpdateInfo
    buffer: torch.Tensor | None = None

    def init_transfer_engine(self, init_info: IpcInitInfo) -> None:
        self.shutdown()
        super().init_transfer_engine(init_info)
        uuid = uuid_of(self.device)
        if uuid not in init_info.handles:
            raise RuntimeError(f"no learner rank is on this worker's GPU {uuid}; the ranks are on "
                               f"{', '.join(init_info.handles)}; set placement to colocate, or weight_sync.backend to "
                               "nccl")
        self.buffer = open_buffer(init_info.handles[uuid], self.device)

    def bucket(self, update_info: UpdateInfo) -> dict[str, torch.Tensor]:
        assert self.buffer is not None  # by init_transfer_engine
        shared = unpack(self.buffer, update_info.layout)
        return {name: tensor.clone() for name, tensor in shared.items()} if self.staging else shared

    def receive_weights(self, update_info: UpdateInfo) -> None:
        super().receive_weights(update_info)
        torch.cuda.current_stream(self.device).synchronize()  # the sender overwrites the buffer after the answer

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self.buffer = None

    def shutdown(self) -> None:
        super().shutdown()
        self.buffer = None
