"""Weights by NCCL, from GPU to GPU, to engines on any host that have GPUs of their own.

NEVER EXECUTED on a GPU. All code but `Transport` is shared with `gloo`, which runs on CPU, both staged and in place.
"""
from __future__ import annotations

import torch
from torch.distributed import TCPStore

from frpo.weight_sync.broadcast import BroadcastSender
from frpo.weight_sync.group import SENDER


class Transport:
    """vLLM's NCCL communicator, which needs no default group. NCCL never reports the death of another member."""

    def __init__(self, store: TCPStore, rank: int, size: int, timeout_s: float, meeting: tuple[str, int],
                 device: torch.device):
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup
        from vllm.utils.nccl import unpinned_nccl_env

        self.device = device
        with unpinned_nccl_env(), torch.cuda.device(device):
            self.communicator = PyNcclCommunicator(
                StatelessProcessGroup(rank=rank, world_size=size, store=store), device=device)
            self.stream = torch.cuda.Stream(device)
        if self.communicator.disabled:
            raise RuntimeError("NCCL's library cannot be loaded in this process; set VLLM_NCCL_SO_PATH to its path")

    @staticmethod
    def own_device() -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def broadcast(self, data: torch.Tensor) -> None:
        with torch.cuda.device(self.device):
            self.communicator.broadcast(data, src=SENDER, stream=self.stream)
            self.stream.synchronize()

    def close(self) -> None:
        """Abort. This also ends a broadcast that waits for a member that is gone."""
        self.communicator.destroy()


class Sender(BroadcastSender):
    transport = Transport
