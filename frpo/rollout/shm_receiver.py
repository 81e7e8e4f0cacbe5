"""The receiving end of `weight_sync.cpu_shm`, inside a vLLM worker: buckets are files in shared memory, mapped here."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from frpo.rollout.staged_receiver import StagedReceiver


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to agree on: every update names its file."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """path: a safetensors file in shared memory with one bucket of whole parameters under checkpoint names."""

    path: str


class SharedMemoryReceiver(StagedReceiver):
    """Maps the files; its workers share one copy in memory."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.staged = {}

    def bucket(self, update_info: UpdateInfo) -> dict[str, torch.Tensor]:
        with safe_open(update_info.path, framework="pt", device=str(self.device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
