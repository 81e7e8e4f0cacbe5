"""Matrix products of hidden states, blocks of the LM head and logits, accumulated in float32 (float64 stays float64).

On CUDA bfloat16 operands are multiplied as they are, with float32 results. A CPU has no such product: there one block
of the head at a time is converted, so that no float32 copy of the whole head exists. This module does not depend on
losses.

Shape suffixes: R tokens, B columns of logits (a block of the vocabulary), D hidden width.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ACCUMULATED = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
"""Accumulation type of every supported type of operand. float16 is missing: the gradient of a logit underflows in it.
"""

_CONVERTED_ELEMENTS = 1 << 22
"""Number of weights converted at a time on a CPU."""


def operand(matrix: Tensor) -> Tensor:
    """Return the matrix in a type that this device multiplies with wide accumulation: itself, or a float32 copy on a
    CPU.
    """
    return matrix if matrix.is_cuda else matrix.to(ACCUMULATED[matrix.dtype])


def project_(logits_RB: Tensor, hidden_RD: Tensor, weight_BD: Tensor) -> None:
    """Compute logits = hidden @ weight^T. The hidden states must be an `operand` already; the weight is converted here.
    """
    for columns in _column_blocks(weight_BD):
        _multiply_(logits_RB[:, columns], hidden_RD, operand(weight_BD[columns]).t(), add=False)


def hidden_gradient_(grad_RD: Tensor, dz_RB: Tensor, weight_BD: Tensor, add: bool) -> None:
    """Compute grad = [grad +] dz @ weight. grad has the accumulated type, dz is an operand."""
    for columns in _column_blocks(weight_BD):
        _multiply_(grad_RD, dz_RB[:, columns], operand(weight_BD[columns]), add=add or columns.start > 0)


def weight_gradient_(grad_BD: Tensor, dz_RB: Tensor, hidden_RD: Tensor, add: bool) -> None:
    """Compute grad = [grad +] dz^T @ hidden; dz and hidden are operands. A bfloat16 grad is rounded here: add nothing
    to it.
    """
    assert not (add and grad_BD.dtype == torch.bfloat16), "every addition to a bfloat16 sum would round it"
    if grad_BD.dtype == hidden_RD.dtype:
        _multiply_(grad_BD, dz_RB.t(), hidden_RD, add=add)
        return
    for columns in _column_blocks(grad_BD):
        wide_BD = torch.empty_like(grad_BD[columns], dtype=hidden_RD.dtype)
        _multiply_(wide_BD, dz_RB[:, columns].t(), hidden_RD, add=False)
        grad_BD[columns] = wide_BD


def _column_blocks(weight_BD: Tensor) -> Iterator[slice]:
    """Divide the weight's rows into slices that may be converted at a time; one slice where no conversion is needed."""
    B, D = weight_BD.shape
    whole = weight_BD.is_cuda or ACCUMULATED[weight_BD.dtype] == weight_BD.dtype
    step = B if whole else max(1, _CONVERTED_ELEMENTS // D)
    return (slice(first, min(first + step, B)) for first in range(0, B, step))


def _multiply_(out: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    """Multiply in place. Autocast leaves in-place products alone; it would round the operands of a plain product."""
    if out.dtype == left.dtype:
        out.addmm_(left, right, beta=1 if add else 0)  # with beta = 0 the old values of out do not count, NaN included
    elif add:
        out.add_(torch.mm(left, right, out_dtype=out.dtype))
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
