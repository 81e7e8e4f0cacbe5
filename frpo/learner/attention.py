"""Attention over packed sequences through SDPA, without the quadratic block mask of the whole pack.

Registered with transformers as `packed_sdpa`. Sequences of a pack are regrouped by length, so that a token only ever
meets its own sequence and padding stays below a factor of two, inside attention alone. Without packing it is
transformers' own SDPA. On CUDA, variable-length flash attention does the same without any padding.
"""
from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "packed_sdpa"


def packed_sdpa(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                attention_mask: torch.Tensor | None, *, scaling: float | None = None, sliding_window: int | None = None,
                cu_seq_lens_q: torch.Tensor | None = None, **options: Any) -> tuple[torch.Tensor, None]:
    """Causal attention as transformers' layers call it: query (1, H, S, d), key and value (1, Hkv, S, d).

    cu_seq_lens_q: starts of the sequences in the pack, and S; None: not packed. Returns (1, S, H, d).
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                      sliding_window=sliding_window, **options)
    heads = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    outputs, places = [], []
    for starts, lengths in _buckets(cu_seq_lens_q.tolist()):
        grid_BL, real_BL = _grid(starts, lengths, query.device)
        q, k, v = (tensor[grid_BL].transpose(1, 2) for tensor in heads)
        window = _window_mask(grid_BL.shape[1], sliding_window, query.device)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=window, is_causal=window is None, scale=scaling, enable_gqa=k.shape[1] != q.shape[1])
        outputs.append(attended.transpose(1, 2)[real_BL])
        places.append(grid_BL[real_BL])
    return torch.cat(outputs)[torch.argsort(torch.cat(places))][None], None


def packed_mask(*args: Any, attention_mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor | None:
    """SDPA's mask where sequences are padded; none where they are packed, which is where no padding mask is given."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **options)


def _buckets(bounds: list[int]) -> list[tuple[list[int], list[int]]]:
    """(starts, lengths) of sequences whose lengths share their number of binary digits."""
    buckets: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for start, end in pairwise(bounds):
        starts, lengths = buckets[(end - start).bit_length()]
        starts.append(start)
        lengths.append(end - start)
    return list(buckets.values())


def _grid(starts: list[int], lengths: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Places in the pack of B sequences padded to L, and which of them are real; the others repeat a last token."""
    starts_B, lengths_B = torch.tensor(starts, device=device), torch.tensor(lengths, device=device)
    column_L = torch.arange(max(lengths), device=device)
    real_BL = column_L < lengths_B[:, None]
    return starts_B[:, None] + torch.minimum(column_L, lengths_B[:, None] - 1), real_BL


def _window_mask(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """(L, L) causal band of a sliding window; None where it does not reach."""
    if sliding_window is None or length <= sliding_window:
        return None
    column_L = torch.arange(length, device=device)
    distance_LL = column_L[:, None] - column_L
    return (distance_LL >= 0) & (distance_LL < sliding_window)


AttentionInterface.register(NAME, packed_sdpa)
AttentionMaskInterface.register(NAME, packed_mask)
