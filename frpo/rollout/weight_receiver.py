"""The receiving end of `weight_sync.cpu_shm`, inside a vLLM worker.

Importing this module registers the backend with vLLM (the engine names it as `worker_extension_cls`, so that workers in
their own processes import it too). Buckets are mapped and held; the model changes only in `finish_weight_update`.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

BACKEND = "cpu_shm"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to agree on: every update names its file."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """path: a safetensors file in shared memory with one bucket of whole parameters under checkpoint names."""

    path: str


class SharedMemoryReceiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Stages mapped buckets and loads them all at once."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.staged: dict[str, torch.Tensor] = {}

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.staged = {}

    def start_weight_update(self) -> None:
        self.staged = {}

    def receive_weights(self, update_info: UpdateInfo) -> None:
        with safe_open(update_info.path, framework="pt", device=str(self.device)) as bucket:
            self.staged |= {name: bucket.get_tensor(name) for name in bucket.keys()}  # noqa: SIM118  (no mapping)

    def finish_weight_update(self) -> None:
        """Swap the staged weights in. Raises ValueError, with the model untouched, if there are none."""
        if not self.staged:
            raise ValueError("weight update finished without a single parameter received")
        initialize_layerwise_reload(self.model)
        self.model.load_weights(self.staged.items())
        finalize_layerwise_reload(self.model, self.model_config)
        self.staged = {}
        refresh_output_head(self.model)

    def shutdown(self) -> None:
        self.staged = {}


class WorkerExtension:
    """Adds to vLLM's worker what its interface lacks."""

    def abort_weight_update(self) -> None:
        """Forget an update that its sender never finished; nothing of it has reached the model."""
        self.weight_transfer_engine.shutdown()
        self._weight_update_active = False


def refresh_output_head(model: torch.nn.Module) -> None:
    """Rebuild the packed matrix of the output head, which vLLM's reload leaves at its old values if it is tied.

    On CPU, vLLM packs linear weights into a private layout; a tied head is a module of its own whose packed copy no
    reloaded layer owns, so without this the embeddings are new and the logits old, silently.
    """
    if not current_platform.is_cpu():
        return
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryReceiver)
