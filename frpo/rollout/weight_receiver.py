"""What a vLLM worker imports to receive weights by the backends of `frpo.weight_sync` that vLLM does not have.

The engine names `WorkerExtension` as its `worker_extension_cls`, so that workers in their own processes import this
module too; that registers the backends.
"""
from __future__ import annotations

import os
from pathlib import Path

from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngineFactory

from frpo.rollout.gloo_receiver import GlooReceiver
from frpo.rollout.load_check import problem
from frpo.rollout.shm_receiver import SharedMemoryReceiver
from frpo.rollout.staged_receiver import StagedReceiver

RECEIVERS = {"cpu_shm": SharedMemoryReceiver, "gloo": GlooReceiver}


class WorkerExtension:
    """Adds to vLLM's worker what its interface lacks."""

    def load_weight_update(self) -> str | None:
        """What comes before `finish_weight_update`: load what is staged, if it is.

        Returns what of it, or of the model, was left out. Of weights that land in place only what was not written is
        known; that part was never executed, as `frpo.weight_sync.vllm_native` was not.
        """
        receiver = self.weight_transfer_engine
        if isinstance(receiver, StagedReceiver):
            with set_current_vllm_config(self.vllm_config):
                return receiver.load_weight_update()
        return problem(receiver.model, None, (), 0)

    def abort_weight_update(self) -> None:
        """Forget a staged update that its sender never finished; nothing of it has reached the model."""
        self.weight_transfer_engine.abort_weight_update()
        self._weight_update_active = False

    def unname_shared_memory(self) -> None:
        """Remove the names of the memory in which vLLM's CPU workers exchange tensors (8 MB), once all have mapped it.

        The kernel then frees it with the last of them, however they end, and nobody has to look for leftovers.
        """
        for file in Path("/dev/shm").glob(f"{os.environ['VLLM_DIST_IDENT']}-*-cpushm*"):
            file.unlink(missing_ok=True)


for _name, _receiver in RECEIVERS.items():
    if _name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(_name, _receiver)
