"""Weights through shared memory on one host: each bucket is a safetensors file that the engines map.

Engines only note the mapped buckets until the push finishes, so the files are the staging copy, one for all engines of
the host, and an interrupted push changes nothing. It does not cross hosts. The receiving end is
`frpo.rollout.weight_receiver`.
"""
from __future__ import annotations

import os
import re
import uuid
from pathlib import Path

from safetensors.torch import save_file

from frpo.weight_sync.protocol import WeightStream, WeightSyncClient, drained

SHARED_MEMORY = Path("/dev/shm")
NAME = re.compile(r"frpo-weights-(\d+)-.*")


class Sender:
    """Writes buckets from rank 0; the other ranks take part in the gathers and write nothing."""

    def __init__(self, rank: int, client: WeightSyncClient | None):
        self.rank = rank
        self.client = client
        if rank == 0:
            remove_leftovers()
            client.init_weight_transfer_engine({})

    def send(self, weights: WeightStream, version: int) -> None:
        if self.rank != 0:
            drained(weights)
            return
        remaining = iter(weights)
        files: list[Path] = []
        prefix = f"frpo-weights-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            self.client.start_weight_update()
            for index, bucket in enumerate(remaining):
                files.append(SHARED_MEMORY / f"{prefix}-{index}.safetensors")
                save_file({name: tensor.detach().cpu().contiguous() for name, tensor in bucket}, files[-1])
                self.client.update_weights({"path": str(files[-1])})
            self.client.finish_weight_update(str(version))
        finally:
            drained(remaining)
            for file in files:
                file.unlink(missing_ok=True)


def remove_leftovers() -> None:
    """Delete bucket files of senders that no longer live (killed in the middle of a push)."""
    for file in SHARED_MEMORY.glob("frpo-weights-*"):
        match = NAME.fullmatch(file.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            file.unlink(missing_ok=True)
