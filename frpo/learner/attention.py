"""Attention over packed sequences: each token attends to its own sequence only, as if the sequence were alone.

Registered with transformers as `packed_sdpa`, `packed_eager` and in place of its `flash_attention_2`. On a GPU in bf16
one kernel of torch computes the whole pack. Elsewhere sequences are regrouped by length inside attention, so that
padding stays below a factor of two. The mask is the model's own for one sequence (causal, sliding window, chunks). The
model's own eager function handles the features that SDPA does not compute (a cap on scores, sinks).

The places where sequences begin are not handed from layer to layer, since some families drop them on the way. `arrange`
sets them once for each forward pass. They stay valid until the next forward pass, so that a backward pass that
recomputes layers finds them too.
"""
from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from frpo.errors import ModelError

SDPA, EAGER, FLASH = "packed_sdpa", "packed_eager", "flash_attention_2"

HARMLESS = frozenset({
    "attentions", "cu_seq_lens_k", "cu_seq_lens_q", "dropout", "layer_idx", "layer_type", "max_length_k",
    "max_length_q", "output_attentions", "output_hidden_states", "output_router_logits", "past_key_values",
    "position_embeddings", "position_ids", "return_dict", "shared_kv_states", "sliding_window", "use_cache"})
"""Arguments of an attention function that can be ignored here: dropout is 0, a window is in the mask."""

BY_HEAD = frozenset({"s_aux", "softcap"})
"""Arguments that only the model's eager function applies. They do not depend on positions, so a pack can take them."""


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """Sequences of the micro-batch that is computed now. lengths: tokens of each, in order.

    bounds: int32, where each sequence begins in a pack, and the pack's length; None where each sequence has its own
    row.
    layers: attention modules that have kept the sequences of this pack apart.
    windows: the result of `_window` for each mask, by the mask's id. The mask is kept too, so that no other mask gets
    its id.
    """

    lengths: tuple[int, ...]
    bounds: torch.Tensor | None
    layers: set[torch.nn.Module] = field(default_factory=set)
    windows: dict[int, tuple[tuple[int, int] | None, torch.Tensor]] = field(default_factory=dict)


_current: list[Arrangement | None] = [None]


def arrange(arrangement: Arrangement | None) -> None:
    """Set the layout of the micro-batch that follows. None: one sequence or rows of one length, nothing packed.

    The layout is one value for the process and no context variable, since autograd recomputes layers in threads of its
    own.
    """
    _current[0] = arrangement


def arrangement() -> Arrangement | None:
    """Return the layout that `arrange` set last."""
    return _current[0]


def packed_sdpa(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                attention_mask: torch.Tensor | None, **options: Any) -> tuple[torch.Tensor, None]:
    """Compute attention as transformers' layers call it.

    query (B, H, S, d), key and value (B, Hkv, S, d); returns (B, S, H, d).
    attention_mask: the result of `packed_mask`. A pack has B = 1 and S tokens in all.
    Raises ModelError where a layer gives attention an argument that a pack cannot take.
    """
    if _special(options):
        return packed_eager(module, query, key, value, attention_mask, **options)
    pack = _pack()
    if pack is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=options.get("scaling"))

    if _has_kernel(query, value) and (window := _window(pack, attention_mask)) is not None:
        return _whole_pack(pack, module, query, key, value, window, options.get("scaling")), None

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=options.get("scaling"),
            enable_gqa=k.shape[1] != q.shape[1]).transpose(1, 2)

    return _by_length(pack, module, query, key, value, attention_mask, attend), None


def packed_eager(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                 attention_mask: torch.Tensor | None, **options: Any) -> tuple[torch.Tensor, None]:
    """Compute the same by the model's own eager function, with all arguments that the layer gives."""
    eager, pack = _eager_function(module), _pack()
    if pack is None:
        mask = _additive(attention_mask, query.shape[2], query)
        return eager(module, query, key, value, mask, **options)[0], None
    unknown = sorted(_special(options).keys() - BY_HEAD)
    if unknown:
        raise ModelError(f"{type(module).__name__} passes {', '.join(unknown)} to attention, which would treat the "
                         "sequences of a pack as one; set learner.packing to false")
    options = {name: option for name, option in options.items() if name in BY_HEAD or name == "scaling"}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return eager(module, q, k, v, _additive(mask, q.shape[2], q), **options)[0]

    return _by_length(pack, module, query, key, value, attention_mask, attend), None


def packed_flash(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                 attention_mask: torch.Tensor | None, **options: Any) -> tuple[torch.Tensor, None]:
    """Call transformers' flash attention with the boundaries, to compute a whole pack at once. Never executed."""
    pack = _pack()
    if pack is not None:
        pack.layers.add(module)
        attention_mask, longest = None, max(pack.lengths)
        options |= {"cu_seq_lens_q": pack.bounds, "cu_seq_lens_k": pack.bounds, "max_length_q": longest,
                    "max_length_k": longest}
    return flash_attention_forward(module, query, key, value, attention_mask, **options)


def packed_mask(*args: Any, **options: Any) -> torch.Tensor | None:
    """Make a boolean mask (B, 1, S, S), True where a token is attended to; None: plain causal.

    For a pack the mask is (1, 1, L, L), where L is the length of its longest sequence. A shorter sequence uses the
    first rows and columns of the mask.
    """
    return sdpa_mask(*args, **options | _of_longest())


def packed_eager_mask(*args: Any, **options: Any) -> torch.Tensor:
    """Make the mask in the form of eager functions: values to add to scores.

    The mask is never None, since some families add to it.
    """
    return eager_mask(*args, **options | _of_longest())


def _of_longest() -> dict[str, Any]:
    """Return the arguments of a mask for the longest sequence of a pack; an empty dict without a pack."""
    pack = _pack()
    if pack is None:
        return {}
    longest = max(pack.lengths)
    return {"batch_size": 1, "q_length": longest, "kv_length": longest, "q_offset": 0, "kv_offset": 0,
            "attention_mask": None}


def _pack() -> Arrangement | None:
    current = arrangement()
    return None if current is None or current.bounds is None else current


def _special(options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of attention that SDPA would drop."""
    return {name: option for name, option in options.items()
            if option is not None and name not in HARMLESS and name != "scaling"
            and not (name == "is_causal" and option is True)}


def _eager_function(module: torch.nn.Module) -> Callable[..., tuple[torch.Tensor, Any]]:
    """Return the eager attention function from the file that defines the model's family."""
    found = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if found is None:
        raise ModelError(f"{type(module).__name__} has no eager attention function, but its scores need one; "
                         "frpo cannot train this model")
    return found


def _has_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether torch's flash attention computes these heads."""
    width = query.shape[-1]
    return (query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and width == value.shape[-1]
            and width <= 256 and width % 8 == 0)


def _window(pack: Arrangement, mask: torch.Tensor | None) -> tuple[int, int] | None:
    """Return the window of a causal mask: (number of tokens to the left that a token attends to, 0); -1 for all tokens.

    None where the mask is not causal with one window. Computed once for each mask of a pass, since the computation has
    to wait for the GPU.
    """
    if mask is None:
        return -1, 0
    known, longest = pack.windows, max(pack.lengths)
    if mask.shape[-2:] != (longest, longest):
        return None
    if id(mask) not in known:
        length = longest
        width = int(mask[..., -1, :].sum(-1).max())
        ones = torch.ones((length, length), dtype=torch.bool, device=mask.device)
        band = ones.tril() & ones.triu(1 - width)
        exact = mask.dtype == torch.bool and bool((mask == band).all())
        known[id(mask)] = ((-1, 0) if width == length else (width - 1, 0)) if exact else None, mask
    return known[id(mask)][0]


def _whole_pack(pack: Arrangement, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor,
                value: torch.Tensor, window: tuple[int, int], scaling: float | None) -> torch.Tensor:
    """Compute (1, S, H, d) by one kernel that takes the places where sequences begin."""
    assert pack.bounds is not None  # since this is a pack
    pack.layers.add(module)
    longest, (q, k, v) = max(pack.lengths), (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output = varlen_attn(q, k, v, pack.bounds, pack.bounds, longest, longest, scale=scaling, window_size=window,
                         enable_gqa=key.shape[1] != query.shape[1])
    return cast(torch.Tensor, output)[None]


def _by_length(pack: Arrangement, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor,
               value: torch.Tensor, mask: torch.Tensor | None, attend: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Call `attend` on groups of sequences of similar length; returns (1, S, H, d)."""
    longest = max(pack.lengths)
    if mask is not None and mask.shape[-2:] != (longest, longest):
        raise ModelError(f"{type(module).__name__} masks attention with a tensor of shape {tuple(mask.shape)}, which "
                         "does not fit the single sequences of a pack; set learner.packing to false")
    pack.layers.add(module)
    heads = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    outputs, places = [], []
    for starts, lengths in _buckets(pack.lengths):
        grid_BL, real_BL = _grid(starts, lengths, query.device)
        q, k, v = (tensor[grid_BL].transpose(1, 2) for tensor in heads)
        width = grid_BL.shape[1]
        outputs.append(attend(q, k, v, None if mask is None else mask[..., :width, :width])[real_BL])
        places.append(grid_BL[real_BL])
    return torch.cat(outputs)[torch.argsort(torch.cat(places))][None]


def _buckets(lengths: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Group sequences whose lengths have the same number of binary digits. Returns (starts, lengths) of each group."""
    buckets: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    start = 0
    for length in lengths:
        starts, same = buckets[length.bit_length()]
        starts.append(start)
        same.append(length)
        start += length
    return list(buckets.values())


def _grid(starts: list[int], lengths: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the places in the pack of B sequences padded to L, and which places are real.

    The other places repeat the last token of their sequence.
    """
    starts_B, lengths_B = torch.tensor(starts, device=device), torch.tensor(lengths, device=device)
    column_L = torch.arange(max(lengths), device=device)
    real_BL = column_L < lengths_B[:, None]
    return starts_B[:, None] + torch.minimum(column_L, lengths_B[:, None] - 1), real_BL


def _additive(mask: torch.Tensor | None, length: int, like: torch.Tensor) -> torch.Tensor:
    """Return the values that eager functions add to scores; causal where there is no mask."""
    if mask is None:
        mask = torch.ones((length, length), dtype=torch.bool, device=like.device).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(
        ~mask, torch.finfo(like.dtype).min)


AttentionInterface.register(SDPA, packed_sdpa)
AttentionInterface.register(EAGER, packed_eager)
AttentionInterface.register(FLASH, packed_flash)
AttentionMaskInterface.register(SDPA, packed_mask)
AttentionMaskInterface.register(EAGER, packed_eager_mask)
