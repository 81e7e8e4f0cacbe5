"""Log-probs and entropies of target tokens from hidden states and the LM head, both differentiable.

Use this module for losses that are not a sum over tokens, or that need inputs unknown in the forward pass. For a sum
over tokens `token_loss` is cheaper, since it need not make the logits twice.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from frpo.kernels.chunks import CHUNK_ROWS, ChunkedLogits, nothing
from frpo.kernels.stats import LogitScale, RowStats, joined, slope


def linear_logprobs(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, *, temperature: float = 1.0,
                    softcap: float | None = None, chunk_rows: int = CHUNK_ROWS) -> tuple[Tensor, Tensor]:
    """Compute log-probs (N,) of the targets and entropies (N,) in nats.

    The distribution is softmax(cap tanh(h W^T / cap) / temperature). Both results are float32 (float64 for float64
    operands). About chunk_rows * V logits exist at a time. Backward recomputes the logits in blocks of the vocabulary
    and reads the head again: under ZeRO-3 the head must be gathered in both passes. A frozen head gets no gradient and
    adds no cost.
    Raises ValueError for operands of different types or shapes, or of a type other than bfloat16, float32, float64.
    """
    pieces = ChunkedLogits(
        hidden_ND=hidden_ND, head_VD=head_VD, target_N=target_N, reference=None, chunk_rows=chunk_rows,
        scale=LogitScale(temperature=temperature, softcap=softcap))
    if len(hidden_ND) == 0:
        return nothing(hidden_ND, head_VD), nothing(hidden_ND, head_VD)
    return _LinearLogprobs.apply(hidden_ND, head_VD, target_N, pieces.scale, chunk_rows)


class _LinearLogprobs(torch.autograd.Function):
    """Autograd function of four matrix products with gradients; a function that keeps the logits needs three."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, scale: LogitScale,
                chunk_rows: int) -> tuple[Tensor, Tensor]:
        pieces = ChunkedLogits(hidden_ND=hidden_ND, head_VD=head_VD, target_N=target_N, reference=None, scale=scale,
                        chunk_rows=chunk_rows)
        stats = _statistics(pieces)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_ND, head_VD, target_N, stats.z_max_N, stats.z_log_sum_N, stats.logprobs_N,
                              stats.entropy_N)
        ctx.scale, ctx.chunk_rows = scale, chunk_rows
        return stats.logprobs_N, stats.entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs_N: Tensor | None, d_entropy_N: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_logprobs_N is None and d_entropy_N is None:
            return None, None, None, None, None
        hidden_ND, head_VD, target_N, z_max_N, z_log_sum_N, logprobs_N, entropy_N = ctx.saved_tensors
        pieces = ChunkedLogits(hidden_ND=hidden_ND, head_VD=head_VD, target_N=target_N, reference=None, scale=ctx.scale,
                        chunk_rows=ctx.chunk_rows)
        stats = RowStats(z_max_N=z_max_N, z_log_sum_N=z_log_sum_N, logprobs_N=logprobs_N, entropy_N=entropy_N)
        grads = pieces.sweep(stats, slope(stats, d_logprobs_N, d_entropy_N), ctx.needs_input_grad[:2])
        return *grads, None, None, None


def _statistics(pieces: ChunkedLogits) -> RowStats:
    parts = []
    for rows in pieces.row_chunks():
        z_CV, _ = pieces.logits(*pieces.operands(rows))
        parts.append(pieces.row_ops.statistics(z_CV, pieces.target_N[rows], pieces.scale, None))
    return joined(parts)
