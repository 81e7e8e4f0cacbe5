"""Check how a vLLM model loaded the pushed weights: which tensors it did not read, which parameters stayed unwritten.

vLLM's models silently skip unknown names and silently keep unwritten parameters. The check inspects vLLM's layerwise
reload after loading and before its end. The caller decides what to do about a problem.
"""
from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS, SKIP_TENSORS

NAMED = 4
"""Most names in a message."""


class Readings(TorchDispatchMode):
    """Record, within this context, which of the given tensors are read. Taking a view of a tensor is not reading it."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        super().__init__()
        ordered = sorted((tensor.data_ptr(), tensor.nbytes, name) for name, tensor in tensors.items())
        self.starts = [start for start, _, _ in ordered]
        self.ordered = ordered
        self.unread = {name for _, size, name in ordered if size}

    def __torch_dispatch__(self, function: Any, types: Any, args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        if not function.is_view:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, torch.Tensor) and not value.is_meta:
                    self._note(value.data_ptr())
        return function(*args, **(kwargs or {}))

    def _note(self, address: int) -> None:
        place = bisect_right(self.starts, address) - 1
        if place >= 0:
            start, size, name = self.ordered[place]
            if address < start + size:
                self.unread.discard(name)


def unwritten(model: torch.nn.Module, loaded: Collection[str] | None) -> list[str]:
    """List the names of the parameters that were not written since the reload began.

    A parameter with several names counts as written if one of its names was. loaded: names that the model reports as
    loaded, used only for tensors that the reload does not track; None: the model reports nothing. For a multimodal
    model, only its language model is checked.
    """
    language: torch.nn.Module = cast(Any, model).get_language_model() if hasattr(model, "get_language_model") else model
    missing: dict[str, torch.Tensor] = {}
    written: set[int] = set()
    for prefix, layer in language.named_modules():
        info = get_layerwise_info(layer)
        kept = layer._parameters if info.kernel_tensors is None else info.kernel_tensors[0]
        begun = {name for name, _ in info.loaded_weights}
        # Parameters of the layer before its kernel was built. Kernels add parameters that are derived from these.
        stored = info.restore_metadata[0].keys() | SKIP_TENSORS
        for name, parameter in kept.items():
            if parameter is None or name not in stored:
                continue
            full = f"{prefix}.{name}" if prefix else name
            told = name in SKIP_LOAD_TENSORS and (loaded is None or full in loaded)
            if not info.can_load() or name in begun or told:
                written.add(id(parameter))
            else:
                missing[full] = parameter
    return [name for name, parameter in missing.items() if id(parameter) not in written]


def problem(model: torch.nn.Module, loaded: Collection[str] | None, unread: Collection[str], pushed: int) -> str | None:
    """Describe in words what went wrong with a push of `pushed` tensors; None if nothing went wrong."""
    missing = unwritten(model, loaded)
    found = []
    if unread:
        found.append(f"{len(unread)} of {pushed} pushed tensors were not read: {_some(unread)}")
    if missing:
        found.append(f"{len(missing)} of its parameters were not written: {_some(missing)}")
    return f"{type(model).__name__}: {'; '.join(found)}" if found else None


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
