"""The receiving end of `weight_sync.gloo`, inside a vLLM worker: one member of the sender's process group."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import load
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from frpo.rollout.staged_receiver import StagedReceiver
from frpo.weight_sync.gloo_group import GlooGroup


@dataclass(kw_only=True)
class InitInfo(WeightTransferInitInfo):
    """Where the group meets, how many it has, and which of them is this engine's first worker."""

    host: str
    port: int
    rank_offset: int
    size: int
    timeout_s: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """size: bytes of the bucket that is about to be broadcast, a safetensors file of whole parameters."""

    size: int


class GlooReceiver(StagedReceiver):
    """Takes buckets by broadcast. After a failure it is in no group until the sender forms another."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    group: GlooGroup | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.shutdown()
        rank = init_info.rank_offset + self.parallel_config.rank
        self.group = GlooGroup(init_info.host, init_info.port, rank, init_info.size, init_info.timeout_s)

    def bucket(self, update_info: UpdateInfo) -> dict[str, torch.Tensor]:
        if self.group is None:
            raise RuntimeError("this worker is in no process group: it has not joined one, or its last one failed")
        try:
            return load(self.group.receive(update_info.size))
        except BaseException:
            self.shutdown()  # whoever waits for what this worker should have passed on fails now, too
            raise

    def shutdown(self) -> None:
        super().shutdown()
        if self.group is not None:
            self.group.close()
            self.group = None
