"""Computations of a model family that depend on position and length.

These are LongRoPE, dynamic NTK scaling, and scales of queries without positions. transformers chooses their values by
the largest position of a whole micro-batch, and for dynamic NTK also by earlier batches. Here every sequence gets the
values for its own length, as if it were alone.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from frpo.errors import ModelError
from frpo.learner.attention import arrangement

KINDS = ("dynamic", "longrope")


def follow_own_lengths(network: nn.Module) -> None:
    """Make every rotary embedding of `network` that scales by length scale sequence by sequence. In place."""
    for module in network.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else (kinds,)
        if any(kind in str(each) for each in kinds for kind in KINDS):
            module.forward = _by_sequence(module, module.forward)


def scale_within_sequences(network: nn.Module, longest: int) -> None:
    """Switch off a scale of queries that transformers computes from the position in a pack (Llama 4). In place.

    The scale begins at `floor_scale` tokens, so sequences below that length have none. longest: tokens of the longest
    sequence.
    Raises ModelError where a sequence may be longer.
    """
    module: Any  # Any, since its attributes are the family's own
    for module in network.modules():
        if not (getattr(module, "attn_temperature_tuning", False) and hasattr(module, "floor_scale")):
            continue
        if longest >= module.floor_scale:
            raise ModelError(f"{type(module).__name__} scales queries from {module.floor_scale} tokens on, and counts "
                             f"the tokens of a whole pack; lower model.max_length ({longest}) below that, or set "
                             "learner.packing to false")
        module.attn_temperature_tuning = False


def _by_sequence(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def separately(x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        current, found = arrangement(), {}
        if current is None:
            _forget(module)
            return forward(x, position_ids, *args, **kwargs)
        longest = max(current.lengths)
        position_L = torch.arange(longest, device=position_ids.device)[None]
        for length in sorted(set(current.lengths)):
            _forget(module)
            width = length if current.bounds is not None else longest
            # The padding of a row is never read.
            found[length] = _tuple(forward(x, position_L[:, :width].clamp(max=length - 1), *args, **kwargs))
        dim = 0 if current.bounds is None else 1
        parts = zip(*(found[length] for length in current.lengths))
        joined = tuple(torch.cat(part, dim=dim) for part in parts)
        return joined if len(joined) > 1 else joined[0]

    return separately


def _forget(module: nn.Module) -> None:
    """Restore the initial frequencies of a dynamic embedding."""
    for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
        setattr(module, name, module.original_max_seq_len)
    buffers = dict(module.named_buffers(recurse=False))
    for name in [name for name in (*vars(module), *buffers) if name.endswith("original_inv_freq")]:
        target = name.replace("original_inv_freq", "inv_freq")
        setattr(module, target, getattr(module, name).to(buffers[target].device))


def _tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
