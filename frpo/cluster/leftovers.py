"""Shared memory that killed runs have left on this machine, removed once nobody uses it."""
from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
LEFTOVER_AGE_S = 60.0
"""Younger buffers may belong to a run whose ranks are just opening them."""


def remove_buffers_of(port: int) -> None:
    """Delete what DeepSpeed shared between ranks that met at this port."""
    for leftover in SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        leftover.unlink(missing_ok=True)


def remove_leftovers() -> None:
    """Delete what killed runs have left on this machine: old buffers of ours that nobody maps.

    DeepSpeed's (67 MB a rank), and those of vLLM engines with several workers (8 MB).
    """
    old = [file for pattern in ("deepspeed_allreduce_buffer_*", "vllm_dist_*") for file in SHARED_MEMORY.glob(pattern)
           if file.stat().st_uid == os.getuid() and time.time() - file.stat().st_mtime > LEFTOVER_AGE_S]
    if not old:
        return
    maps = []
    for process in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # ended just now, or another user's, who cannot map what is ours alone
            maps.append(process.read_text(encoding="utf-8", errors="replace"))
    for file in old:
        if not any(str(file) in text for text in maps):
            file.unlink(missing_ok=True)
