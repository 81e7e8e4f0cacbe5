"""What the receiving ends of staged backends share: hold what arrives, load it all at once before the push finishes.

How a bucket arrives is the business of `shm_receiver` and `gloo_receiver`.
"""
from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from frpo.rollout.load_check import Readings, problem


class StagedReceiver(WeightTransferEngine):
    """Lives in a vLLM worker. The model does not change before `load_weight_update`; then comes `finish_weight_update`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.staged: dict[str, torch.Tensor] = {}
        self.known: frozenset[str] = frozenset()
        """Names of the last push that was found to reach every parameter."""

    @abstractmethod
    def bucket(self, update_info: Any) -> dict[str, torch.Tensor]:
        """Whole parameters by checkpoint name, in memory that nobody else will change."""

    def start_weight_update(self) -> None:
        self.staged = {}

    def receive_weights(self, update_info: Any) -> None:
        self.staged |= self.bucket(update_info)

    def load_weight_update(self) -> str | None:
        """Swap the staged weights in. Returns what of them or of the model was left out, in words, if anything was.

        Raises ValueError, with the model untouched, if nothing was received. Looked at when other names arrive than
        last time.
        """
        if not self.staged:
            raise ValueError("weight update finished without a single parameter received")
        drop_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)
        found = None
        if self.staged.keys() == self.known:
            self.model.load_weights(self.staged.items())
        else:
            with Readings(self.staged) as readings:
                loaded = self.model.load_weights(self.staged.items())
            found = problem(self.model, loaded, readings.unread, len(self.staged))
            self.known = frozenset() if found else frozenset(self.staged)
        self.staged = {}
        return found

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        refresh_output_head(self.model)

    def abort_weight_update(self) -> None:
        """Forget an update that its sender never finished."""
        self.staged = {}

    def shutdown(self) -> None:
        self.staged = {}


def drop_expert_kernels(model: torch.nn.Module) -> None:
    """Let the reload that follows build the kernels of experts anew.

    On CPU, vLLM packs the experts into the kernel's layout only as it builds the kernel. A reload that keeps the kernel
    hands it plain weights, which it takes for packed ones, silently.
    """
    if not current_platform.is_cpu():
        return
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


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
