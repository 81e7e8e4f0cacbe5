"""What a vLLM worker imports to receive weights by the backends of `frpo.weight_sync` that vLLM does not have.

The engine names `WorkerExtension` as its `worker_extension_cls`, so that workers in their own processes import this
module too; that registers the backends.
"""
from __future__ import annotations

import os
from pathlib import Path

from vllm.distributed.weight_transfer import WeightTransferEngineFactory

from frpo.rollout.gloo_receiver import GlooReceiver
from frpo.rollout.shm_receiver import SharedMemoryReceiver

RECEIVERS = {"cpu_shm": SharedMemoryReceiver, "gloo": GlooReceiver}


class WorkerExtension:
    """Adds to vLLM's worker what its interface lacks."""

    def abort_weight_update(self) -> None:
        """Forget a staged update that its sender never finished; nothing of it has reached the model."""
        self.weight_transfer_engine.abort_weight_update()
        self._weight_update_active = False

    def unname_shared_memory(self) -> None:
        """Remove the names of the memory in which vLLM's CPU workers exchange tensors (8 MB), once all have mapped it.

        The kernel then frees it with the last of them, however they end, and nobody has to look for leftovers.
        """
        for file in Path("/dev/shm").glob(f"{os.environ['VLLM_DIST_IDENT']}-*-cpushm_*"):
            file.unlink(missing_ok=True)


for _name, _receiver in RECEIVERS.items():
    if _name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(_name, _receiver)
