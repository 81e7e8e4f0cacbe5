"""Sums of per-token losses from hidden states and the LM head, with the gradient formed in the forward pass.

Valid only where the loss is a sum over tokens: the loss gets one chunk of rows at a time, and its derivatives there are
final. Backward then multiplies by the upstream scalar, and reads neither the head nor the reference.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from frpo.kernels.chunks import CHUNK_ROWS, ChunkedLogits, live_rows, nothing
from frpo.kernels.projection import ACCUMULATED, hidden_gradient_, weight_gradient_
from frpo.kernels.stats import LogitGradient, LogitScale, ReferenceHead, RowStats, TokenStats, joined, slope

Loss = Callable[[TokenStats, slice], Tensor]
"""Function from (statistics of the tokens of a chunk, slice of these tokens among the N) to their summed loss, a
scalar.
"""


def linear_token_loss(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, loss: Loss, *, temperature: float = 1.0,
                      softcap: float | None = None, reference: ReferenceHead | None = None,
                      chunk_rows: int = CHUNK_ROWS) -> Tensor:
    """Sum `loss` over all chunks. The result is a scalar with gradients of hidden states and head; call backward on it
    once.

    loss: called once per chunk with statistics that require grad (without gradients: that do not). The loss must be a
    sum of terms of one token each. For a token that does not count, the loss must give exactly 0, by selection. Such a
    token then adds exactly nothing to any gradient, even if its logits are NaN.
    chunk_rows: about chunk_rows * V logits of each model exist at a time.

    Without grad mode, or where nothing requires grad, there is no gradient work. Without tokens the result is a zero
    with zero gradients. A trained bfloat16 head makes the logits twice (see `_swept`). Upstream factors multiply
    gradients that are rounded already. Such factors should therefore be powers of two, or inside the loss.
    Raises ValueError for operands of different types or shapes, or of a type other than bfloat16, float32, float64.
    """
    pieces = ChunkedLogits(hidden_ND=hidden_ND, head_VD=head_VD, target_N=target_N, reference=reference,
                    chunk_rows=chunk_rows, scale=LogitScale(temperature=temperature, softcap=softcap))
    if len(hidden_ND) == 0:
        return nothing(hidden_ND, head_VD).sum()
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or head_VD.requires_grad):
        return _LinearTokenLoss.apply(hidden_ND, head_VD, pieces, loss)
    with torch.no_grad():
        return sum((loss(_statistics(pieces, rows).leaves(requires_grad=False), rows)
                    for rows in pieces.row_chunks()), start=_zero(pieces))


def linear_cross_entropy(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, weight_N: Tensor, *,
                         temperature: float = 1.0, softcap: float | None = None,
                         chunk_rows: int = CHUNK_ROWS) -> Tensor:
    """Compute sum weight * -log p(target). The weights are divided already; a weight of 0 leaves its token out
    altogether.
    """
    def loss(stats: TokenStats, rows: slice) -> Tensor:
        return -(weight_N[rows] * torch.where(weight_N[rows] != 0, stats.logprobs_N, 0)).sum()

    return linear_token_loss(hidden_ND, head_VD, target_N, loss, temperature=temperature, softcap=softcap,
                             chunk_rows=chunk_rows)


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, pieces: ChunkedLogits, loss: Loss) -> Tensor:
        wants = ctx.needs_input_grad[:2]
        gradients = _swept if wants[1] and head_VD.dtype == torch.bfloat16 else _accumulated
        loss_sum, *ctx.grads = gradients(pieces, loss, wants)
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("linear_token_loss: backward ran twice, but keeps its gradients for one call; "
                               "compute the loss again")
        grads, ctx.grads = ctx.grads, None
        # Reading the factor would make a GPU wait; multiplying is one pass over the gradients.
        if upstream.is_cuda or upstream.item() != 1:
            for grad in grads:
                if grad is not None:
                    grad.mul_(upstream)
        return *grads, None, None


def _accumulated(pieces: ChunkedLogits, loss: Loss, wants: tuple[bool, bool]
                 ) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Make the logits once, and add up the head's gradient chunk by chunk in its own type."""
    grad_ND = torch.empty_like(pieces.hidden_ND) if wants[0] else None
    grad_VD = torch.empty_like(pieces.head_VD) if wants[1] else None
    loss_sum = _zero(pieces)
    for rows in pieces.row_chunks():
        hidden_CD, hidden_CE = pieces.operands(rows)
        z_CV, reference = pieces.logits(hidden_CD, hidden_CE)
        stats = pieces.row_ops.statistics(z_CV, pieces.target_N[rows], pieces.scale, reference)
        value, chunk_slope = _derivatives(loss, stats, rows)
        loss_sum = loss_sum + value
        dz_CV = pieces.row_ops.gradient_(z_CV, 0, pieces.target_N[rows], stats, chunk_slope, pieces.scale, reference,
                                         dtype=hidden_CD.dtype)
        if grad_ND is not None:
            _write_hidden_gradient(grad_ND[rows], dz_CV, pieces.head_VD)
        if grad_VD is not None:
            weight_gradient_(grad_VD, dz_CV, live_rows(hidden_CD, chunk_slope), add=rows.start > 0)
    return loss_sum, grad_ND, grad_VD


def _swept(pieces: ChunkedLogits, loss: Loss, wants: tuple[bool, bool]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Make the logits twice: once for the statistics, once in blocks of the vocabulary for the gradients.

    Used for a trained bfloat16 head. Adding up its gradient would need V * D float32 values beside it, or would round
    every addition. By a GPU's data sheet, reading and writing these float32 values for every chunk takes as long as the
    extra product.
    """
    parts, slopes, loss_sum = [], [], _zero(pieces)
    for rows in pieces.row_chunks():
        stats = _statistics(pieces, rows)
        value, chunk_slope = _derivatives(loss, stats, rows)
        loss_sum = loss_sum + value
        parts.append(stats)
        slopes.append(chunk_slope)
    return loss_sum, *pieces.sweep(joined(parts), joined(slopes), wants)


def _zero(pieces: ChunkedLogits) -> Tensor:
    """Return a zero to which losses are added, of the type of their statistics."""
    return pieces.hidden_ND.new_zeros((), dtype=ACCUMULATED[pieces.hidden_ND.dtype])


def _statistics(pieces: ChunkedLogits, rows: slice) -> RowStats:
    z_CV, reference = pieces.logits(*pieces.operands(rows))
    return pieces.row_ops.statistics(z_CV, pieces.target_N[rows], pieces.scale, reference)


def _derivatives(loss: Loss, stats: RowStats, rows: slice) -> tuple[Tensor, LogitGradient]:
    """Return the loss of a chunk, and its derivatives with respect to the statistics as slopes of the logits."""
    with torch.enable_grad():
        leaves = stats.leaves(requires_grad=True)
        value = loss(leaves, rows)
    inputs = [leaf_N for leaf_N in (leaves.logprobs_N, leaves.entropy_N, leaves.kl_N, leaves.margin_N)
              if leaf_N is not None]
    if not value.requires_grad:  # no token of the chunk counts
        return value.detach(), slope(stats)
    return value.detach(), slope(stats, *torch.autograd.grad(value, inputs, allow_unused=True))


def _write_hidden_gradient(grad_CD: Tensor, dz_CV: Tensor, head_VD: Tensor) -> None:
    if grad_CD.dtype == ACCUMULATED[grad_CD.dtype]:
        hidden_gradient_(grad_CD, dz_CV, head_VD, add=False)
        return
    wide_CD = grad_CD.new_empty(grad_CD.shape, dtype=ACCUMULATED[grad_CD.dtype])
    hidden_gradient_(wide_CD, dz_CV, head_VD, add=False)
    grad_CD.copy_(wide_CD)
