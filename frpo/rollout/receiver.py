"""Load the weights that arrive in a vLLM worker. All receivers share this code.

Staged weights are held until the push is complete, then loaded all at once. In place, each bucket is loaded as it
arrives. `shm_receiver`, `broadcast_receiver` and `ipc_receiver` define how a bucket arrives.
"""
from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from frpo.rollout.load_check import Readings, problem


@dataclass(kw_only=True)
class InitInfo(WeightTransferInitInfo):
    """staged: whether the model stays unchanged until a push is complete. adapters: whether LoRA adapters are pushed,
    which the engine adds to the model, instead of the model's weights.
    """

    staged: bool
    adapters: bool = False


logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
"""At every push it warns about layers without parameters. `load_check` finds what really stays unread."""

Info = TypeVar("Info", bound=InitInfo)
Update = TypeVar("Update", bound=WeightTransferUpdateInfo)


class Receiver(WeightTransferEngine[Info, Update]):
    """Receiver in a vLLM worker. A push is: start, buckets, `load_weight_update`, finish. vLLM lacks the third step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.staging, self.adapters = True, False
        self.known: frozenset[str] = frozenset()
        """Names of the last push whose check found that it reached every parameter."""
        self._forget()

    def init_transfer_engine(self, init_info: Info) -> None:
        self.staging, self.adapters = init_info.staged, init_info.adapters

    @abstractmethod
    def bucket(self, update_info: Update) -> dict[str, torch.Tensor]:
        """Return whole parameters by checkpoint name. If staged, their memory must not be changed by others."""

    def start_weight_update(self) -> None:
        self._forget()
        if not self.staging:
            self._begin_reload()

    def receive_weights(self, update_info: Update) -> None:
        bucket = self.bucket(update_info)
        self.names |= bucket.keys()
        if self.staging:
            self.staged |= bucket
        else:
            self._load(bucket)

    def load_weight_update(self) -> str | None:
        """Load the staged weights, if any. Return in words what of the push or of the model was left out.

        The check runs only if the pushed names differ from those of the last correct push. Raises ValueError, with
        staged weights untouched, if nothing was received.
        """
        if not self.names:
            raise ValueError("the weight update finished, but no parameter was received")
        if self.adapters:  # taken by `take_staged`
            return None
        if self.staging:
            self._begin_reload()
            self._load(self.staged)
        found = None
        if self.names != self.known:
            found = problem(self.model, self.loaded, self.unread, len(self.names))
            self.known = frozenset() if found else frozenset(self.names)
        self._forget()
        return found

    def take_staged(self) -> dict[str, torch.Tensor]:
        """Return the staged tensors, on the CPU, and drop them here."""
        staged = {name: tensor.cpu().contiguous() for name, tensor in self.staged.items()}
        self._forget()
        return staged

    def _begin_reload(self) -> None:
        drop_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)

    def _forget(self) -> None:
        self.staged: dict[str, torch.Tensor] = {}
        self.names: set[str] = set()
        self.unread: set[str] = set()
        self.loaded: set[str] | None = set()
        """Names that the model reports as loaded; None: the model reports nothing."""

    def _load(self, weights: Mapping[str, torch.Tensor]) -> None:
        known = weights.keys() <= self.known
        readings = None if known else Readings(weights)
        with readings or nullcontext():
            loaded = cast(Any, self.model).load_weights(weights.items())
        if readings is not None:
            self.unread |= readings.unread
        self.loaded = None if loaded is None or self.loaded is None else self.loaded | set(loaded)

    def finish_weight_update(self) -> None:
        if self.adapters:
            return
        finalize_layerwise_reload(self.model, self.model_config)
        refresh_output_head(self.model)

    def abort_weight_update(self) -> None:
        """Drop a staged update that its sender never finished."""
        self._forget()

    def shutdown(self) -> None:
        self._forget()


def drop_expert_kernels(model: torch.nn.Module) -> None:
    """Drop the kernels of experts, so that the next reload builds them anew.

    On CPU, vLLM packs the experts into the kernel's layout only while it builds the kernel. A reload that keeps the
    kernel would give it plain weights, and the kernel would silently use them as packed weights.
    """
    if not current_platform.is_cpu():
        return
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def refresh_output_head(model: torch.nn.Module) -> None:
    """Rebuild the packed matrix of the output head. vLLM's reload leaves the old values in a tied head.

    On CPU, vLLM packs linear weights into a private layout. A tied head is a separate module, and no reloaded layer
    owns its packed copy. Without this call the embeddings are new and the logits are silently old.
    """
    if not current_platform.is_cpu():
        return
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
