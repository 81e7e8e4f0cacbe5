"""What a vLLM worker imports to receive weights by the backends of `frpo.weight_sync` that vLLM does not have.

The engine names `WorkerExtension` as its `worker_extension_cls`, so that workers in their own processes import this
module too; that registers the backends.
"""
from __future__ import annotations

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


for _name, _receiver in RECEIVERS.items():
    if _name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(_name, _receiver)
