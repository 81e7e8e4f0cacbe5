"""Weights by NCCL broadcast from learner rank 0 to engines on other GPUs. NEVER EXECUTED, see `vllm_native`."""
from __future__ import annotations

import socket
from typing import Any

from frpo.weight_sync.protocol import WeightSyncClient
from frpo.weight_sync.vllm_native import NativeSender


class Sender(NativeSender):
    """Opens one NCCL group of the sender and all engine workers; buckets travel packed."""

    def __init__(self, rank: int, client: WeightSyncClient | None):
        def build(versioned: Any, source: Any) -> Any:
            from vllm.distributed.weight_transfer.nccl_engine import (
                NCCLTrainerInitInfo,
                NCCLTrainerWeightTransferEngine,
            )

            workers = client.num_workers() if rank == 0 else 0
            host, port = _endpoint()
            info = NCCLTrainerInitInfo(
                master_address=host, master_port=port, world_size=1 + workers, packed=True, rank=rank)
            return NCCLTrainerWeightTransferEngine.trainer_init(info, client=versioned, source=source)

        super().__init__(rank, client, build)


def _endpoint() -> tuple[str, int]:
    """This host's address and a free port; only rank 0's is used."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return socket.gethostbyname(socket.gethostname()), probe.getsockname()[1]
