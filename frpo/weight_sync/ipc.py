"""Weights by CUDA IPC handles to engines on the learner's own GPUs. NEVER EXECUTED, see `vllm_native`."""
from __future__ import annotations

from typing import Any

from frpo.weight_sync.protocol import WeightSyncClient
from frpo.weight_sync.vllm_native import NativeSender


class Sender(NativeSender):
    """Shares the gathered parameters' memory; nothing is copied over a network."""

    def __init__(self, rank: int, client: WeightSyncClient | None):
        def build(versioned: Any, source: Any) -> Any:
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine

            return IPCTrainerWeightTransferEngine.trainer_init(
                IPCTrainerInitInfo(rank=rank, packed=True), client=versioned, source=source)

        super().__init__(rank, client, build)
