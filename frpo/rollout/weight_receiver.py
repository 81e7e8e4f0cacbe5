"""Register the backends of `frpo.weight_sync` in a vLLM worker, so that the worker can receive weights.

The engine names `WorkerExtension` as its `worker_extension_cls`, so workers in their own processes import this module
too. The import registers the backends.
"""
from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngineFactory

from frpo.config.model import LoraSection
from frpo.rollout.broadcast_receiver import GlooReceiver, NcclReceiver
from frpo.rollout.construction import adapter_config
from frpo.rollout.ipc_receiver import IpcReceiver
from frpo.rollout.receiver import Receiver
from frpo.rollout.shm_receiver import SharedMemoryReceiver
from frpo.weight_sync.protocol import engine_backend

RECEIVERS: Mapping[str, type[Receiver]] = {
    "cpu_shm": SharedMemoryReceiver, "gloo": GlooReceiver, "nccl": NcclReceiver, "ipc": IpcReceiver}


class WorkerExtension:
    """Methods that vLLM's worker lacks. The annotated attributes are those of vLLM's worker."""

    vllm_config: VllmConfig
    weight_transfer_engine: Receiver
    rank: int

    def load_weight_update(self) -> str | None:
        """Load the pushed weights, before `finish_weight_update`. See `Receiver.load_weight_update`."""
        with set_current_vllm_config(self.vllm_config):
            return self.weight_transfer_engine.load_weight_update()

    def write_adapter(self, folder: str, lora: LoraSection) -> None:
        """Write the staged adapters as peft's files into `folder`, from the engine's first worker."""
        staged = self.weight_transfer_engine.take_staged()
        if self.rank == 0:
            save_file(staged, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
            (Path(folder) / "adapter_config.json").write_text(json.dumps(
                adapter_config(lora, staged)), encoding="utf-8")

    def abort_weight_update(self) -> None:
        """Drop a staged update that its sender never finished. No part of it has reached the model."""
        self.weight_transfer_engine.abort_weight_update()
        self._weight_update_active = False

    def unname_shared_memory(self) -> None:
        """Remove the names of the memory in which vLLM's CPU workers exchange tensors (8 MB), once all have mapped it.

        The kernel then frees the memory when the last worker ends, however it ends, so no files are left over.
        """
        for file in Path("/dev/shm").glob(f"{os.environ['VLLM_DIST_IDENT']}-*-cpushm*"):
            file.unlink(missing_ok=True)


for _backend, _receiver in RECEIVERS.items():
    if engine_backend(_backend) not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(engine_backend(_backend), _receiver)
