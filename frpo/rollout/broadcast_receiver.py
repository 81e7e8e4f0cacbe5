"""Receive broadcast weights inside a vLLM worker, as one member of the sender's process group."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo

from frpo.rollout.receiver import InitInfo, Receiver
from frpo.weight_sync import gloo, nccl
from frpo.weight_sync.group import BroadcastGroup, Transport
from frpo.weight_sync.packing import Layout, packed_size, unpack


@dataclass(kw_only=True)
class BroadcastInitInfo(InitInfo):
    """Address of the group (host, port), its number of members (size), and the rank of this engine's first worker."""

    host: str
    port: int
    rank_offset: int
    size: int
    timeout_s: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """layout: layout of the bucket that is broadcast next, see `weight_sync.packing`."""

    layout: Layout


class BroadcastReceiver(Receiver[BroadcastInitInfo, UpdateInfo]):
    """Receive buckets by broadcast. After a failure the worker is in no group until the sender forms a new group."""

    init_info_cls = BroadcastInitInfo
    update_info_cls = UpdateInfo
    transport: type[Transport]
    group: BroadcastGroup | None = None

    def init_transfer_engine(self, init_info: BroadcastInitInfo) -> None:
        self.shutdown()
        super().init_transfer_engine(init_info)
        rank = init_info.rank_offset + self.parallel_config.rank
        self.group = BroadcastGroup(self.transport, init_info.host, init_info.port, rank, init_info.size,
                                    init_info.timeout_s)

    def bucket(self, update_info: UpdateInfo) -> dict[str, torch.Tensor]:
        if self.group is None:
            raise RuntimeError("this worker is in no process group: it has not joined one, or its last one failed")
        try:
            return unpack(self.group.receive(packed_size(update_info.layout)), update_info.layout)
        except BaseException:
            self.shutdown()  # members that wait for data from this worker fail now, too
            raise

    def shutdown(self) -> None:
        super().shutdown()
        if self.group is not None:
            self.group.close()
            self.group = None


class GlooReceiver(BroadcastReceiver):
    transport: Any = gloo.Transport


class NcclReceiver(BroadcastReceiver):
    transport: Any = nccl.Transport
