"""Receive the weights of `weight_sync.cpu_shm` inside a vLLM worker: map buckets, which are files in shared memory."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo

from frpo.rollout.receiver import InitInfo, Receiver


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """path: a safetensors file in shared memory with one bucket of whole parameters under checkpoint names."""

    path: str


class SharedMemoryReceiver(Receiver[InitInfo, UpdateInfo]):
    """Map the files. All workers share one copy in memory, and no tensor is on a GPU before it is loaded."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def bucket(self, update_info: UpdateInfo) -> dict[str, torch.Tensor]:
        with safe_open(update_info.path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
