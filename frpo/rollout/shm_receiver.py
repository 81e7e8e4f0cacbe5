"""Receive the weights of `weight_sync.cpu_shm` inside a vLLM worker: map buckets, which are files in shared memory."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo

from frpo.errors import EngineError
from frpo.rollout.receiver import InitInfo, Receiver
from frpo.weight_sync.cpu_shm import memory_id


@dataclass(kw_only=True)
class SharedInfo(InitInfo):
    """memory: id of the shared memory in which the sender writes (`weight_sync.cpu_shm.memory_id`)."""

    memory: str


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """path: a safetensors file in shared memory with one bucket of whole parameters under checkpoint names."""

    path: str


class SharedMemoryReceiver(Receiver[SharedInfo, UpdateInfo]):
    """Map the files. All workers share one copy in memory, and no tensor is on a GPU before it is loaded."""

    init_info_cls = SharedInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: SharedInfo) -> None:
        if init_info.memory != memory_id():
            raise EngineError("weight_sync.backend: cpu_shm needs the engines on the machine of learner rank 0, with "
                              "the same /dev/shm, but this engine sees another one; set weight_sync.backend to gloo")
        super().init_transfer_engine(init_info)

    def bucket(self, update_info: UpdateInfo) -> dict[str, torch.Tensor]:
        with safe_open(update_info.path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
