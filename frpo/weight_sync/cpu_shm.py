"""Weights through shared memory on one host: each bucket is a safetensors file that the engines map.

When staged, engines only note the mapped buckets until the push finishes. The files are then the staging copy, one copy
for all engines of the host. This backend does not cross hosts. The receiving end is `frpo.rollout.shm_receiver`.

    /dev/shm/frpo-weights-PID-ID.lock             held by the sender while it pushes
    /dev/shm/frpo-weights-PID-ID-N.safetensors    bucket N
    /dev/shm/frpo-weights-PID-ID.folder/          files that an engine writes for itself, held by the engine
"""
from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors.torch import save_file

from frpo.config.rollout import WeightSyncSection
from frpo.held import HeldByAnotherError, HeldFile
from frpo.storage import writing
from frpo.weight_sync.protocol import WeightStream, WeightSyncClient, drained

SHARED_MEMORY = Path("/dev/shm")
PREFIX, FOLDER = "frpo-weights-", ".folder"


class Sender:
    """Writer of buckets from rank 0. The other ranks take part in the gathers and write nothing."""

    def __init__(self, rank: int, client: WeightSyncClient | None, section: WeightSyncSection):
        self.rank, self.client, self.section = rank, client, section
        if rank == 0:
            assert client is not None
            remove_leftovers()
            client.init_weight_transfer_engine({**section.for_engines, "memory": memory_id()})

    def send(self, weights: WeightStream, version: int) -> None:
        if self.rank != 0:
            drained(weights)
            return
        assert self.client is not None  # rank 0 has one
        remaining = iter(weights)
        lock: HeldFile | None = None
        try:
            lock = own_lock()
            self.client.start_weight_update()
            for index, bucket in enumerate(remaining):
                file = lock.path.with_name(f"{lock.path.stem}-{index}.safetensors")
                with writing(file, f"Make {SHARED_MEMORY} larger, as by docker's --shm-size, or lower "
                                   "weight_sync.bucket_mb"):
                    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in bucket}, file)
                self.client.update_weights({"path": str(file)})
            self.client.finish_weight_update(str(version))
        finally:
            drained(remaining)
            if lock:
                remove_held(lock)


def memory_id() -> str:
    """Return an id of the shared memory that this process sees. Two processes have the same id if they see the same.

    On a system without /dev/shm it is the name of the machine.
    """
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{kernel}:{SHARED_MEMORY.stat().st_dev}"
    except OSError:
        return socket.gethostname()


def own_lock() -> HeldFile:
    """Create and hold a lock whose name gives the files of one push their names."""
    while True:
        name = f"{PREFIX}{os.getpid()}-{uuid.uuid4().hex[:8]}.lock"
        with suppress(HeldByAnotherError):  # held for a moment by a process that looks for leftovers
            return HeldFile.take(SHARED_MEMORY / name)


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Give a folder in shared memory within the context."""
    lock = own_lock()
    folder = lock.path.with_suffix(FOLDER)
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        remove_held(lock)


def remove_held(lock: HeldFile) -> None:
    """Delete the buckets and the folder that belong to a held lock, then delete the lock."""
    for file in lock.path.parent.glob(f"{lock.path.stem}-*.safetensors"):
        file.unlink(missing_ok=True)
    shutil.rmtree(lock.path.with_suffix(FOLDER), ignore_errors=True)
    lock.remove()


def remove_leftovers() -> None:
    """Delete what processes left that were killed in the middle of a push. Nobody holds the locks of such processes."""
    for path in SHARED_MEMORY.glob(f"{PREFIX}*.lock"):
        with suppress(HeldByAnotherError, OSError):  # the lock of a living sender, or of another user
            remove_held(HeldFile.take(path))
