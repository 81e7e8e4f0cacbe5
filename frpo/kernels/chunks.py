"""Logits in pieces: chunks of rows for statistics, blocks of the vocabulary for gradients of recomputed logits.

A piece has about chunk_rows * V logits per model, and [N, V] never exists. Losses are in other modules: this module
receives a slope per token.

Shape suffixes: N tokens, C tokens of a chunk, V vocabulary, B columns of it, D hidden width, E the reference's.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from frpo.kernels import rows as torch_rows
from frpo.kernels.projection import ACCUMULATED, hidden_gradient_, operand, project_, weight_gradient_
from frpo.kernels.rows import ReferenceLogits
from frpo.kernels.stats import LogitGradient, LogitScale, ReferenceHead, RowStats

CHUNK_ROWS = 768
"""Default number of rows of a chunk."""

_MIN_COLUMNS = 256
"""Number of columns that divides the width of a block of the vocabulary. Narrower blocks would slow the matrix
products. Other widths would start a block in the middle of a GPU's unit of memory access, which makes some products
many times slower.
"""


@dataclass(frozen=True, kw_only=True)
class ChunkedLogits:
    """Hidden states and heads whose logits are made in pieces only. Raises ValueError for tensors that disagree."""

    hidden_ND: Tensor
    head_VD: Tensor
    target_N: Tensor
    scale: LogitScale
    reference: ReferenceHead | None
    chunk_rows: int

    def __post_init__(self) -> None:
        _check(self)

    @cached_property
    def row_ops(self) -> ModuleType:
        """Return `triton_rows` where it can run, `rows` elsewhere. Both modules have `statistics` and `gradient_`."""
        soft = self.reference is not None and self.reference.margin == "soft"
        if not self.hidden_ND.is_cuda or soft or find_spec("triton") is None:
            return torch_rows
        from frpo.kernels import triton_rows
        return triton_rows

    def row_chunks(self) -> Iterator[slice]:
        N = len(self.hidden_ND)
        return (slice(first, min(first + self.chunk_rows, N)) for first in range(0, N, self.chunk_rows))

    def operands(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Return hidden states of policy and reference, ready to be multiplied."""
        reference = self.reference
        return operand(self.hidden_ND[rows]), None if reference is None else operand(reference.hidden_NE[rows])

    def logits(self, hidden_CD: Tensor, hidden_CE: Tensor | None,
               columns: slice = slice(None)) -> tuple[Tensor, ReferenceLogits | None]:
        """Compute raw logits of a piece; the reference's logits only if `hidden_CE` is given. The next call overwrites
        them.
        """
        z_CB = _filled(self._buffers[0], hidden_CD, self.head_VD[columns])
        if hidden_CE is None:
            return z_CB, None
        reference = self.reference
        assert reference is not None  # its operand was given
        scale = LogitScale(temperature=reference.temperature or self.scale.temperature, softcap=reference.softcap)
        return z_CB, ReferenceLogits(u_CB=_filled(self._buffers[1], hidden_CE, reference.head_VE[columns]),
                                     scale=scale, tau=reference.tau if reference.margin == "soft" else None)

    def sweep(self, stats: RowStats, slope: LogitGradient, wants: tuple[bool, bool]
              ) -> tuple[Tensor | None, Tensor | None]:
        """Compute gradients of hidden states and head (where wanted) from logits recomputed in blocks of the
        vocabulary.

        Each row of the head's gradient is formed only once. The row therefore needs no wider accumulator and is rounded
        once.
        """
        hidden_ND, hidden_NE = self.operands(slice(None))
        if wants[1]:
            hidden_ND = live_rows(hidden_ND, slope)
        if slope.u_N is None and (slope.margin_N is None or stats.gamma_mean_N is None):
            hidden_NE = None
        grad_ND = hidden_ND.new_empty(hidden_ND.shape, dtype=ACCUMULATED[hidden_ND.dtype]) if wants[0] else None
        grad_VD = torch.empty_like(self.head_VD) if wants[1] else None
        V = len(self.head_VD)
        for first in range(0, V, self._block_columns):
            columns = slice(first, min(first + self._block_columns, V))
            z_NB, reference = self.logits(hidden_ND, hidden_NE, columns)
            dz_NB = self.row_ops.gradient_(z_NB, first, self.target_N, stats, slope, self.scale, reference,
                                           dtype=hidden_ND.dtype)
            if grad_ND is not None:
                hidden_gradient_(grad_ND, dz_NB, self.head_VD[columns], add=first > 0)
            if grad_VD is not None:
                weight_gradient_(grad_VD[columns], dz_NB, hidden_ND, add=False)
        return grad_ND if grad_ND is None else grad_ND.to(self.hidden_ND.dtype), grad_VD

    @property
    def _block_columns(self) -> int:
        return block_columns(len(self.hidden_ND), len(self.head_VD), self.chunk_rows)

    @cached_property
    def _buffers(self) -> list[Tensor]:
        """Allocate space for the largest piece of each model, once: a CPU allocates fresh memory slowly."""
        size = piece_size(len(self.hidden_ND), len(self.head_VD), self.chunk_rows)
        return [self.hidden_ND.new_empty(size, dtype=ACCUMULATED[self.head_VD.dtype])
                for _ in range(1 if self.reference is None else 2)]


def block_columns(N: int, V: int, chunk_rows: int) -> int:
    """Return the width of a block of the vocabulary, so that N rows of a block have about as many logits as a chunk."""
    columns = V * min(chunk_rows, N) // N
    return min(V, max(_MIN_COLUMNS, columns - columns % _MIN_COLUMNS))


def piece_size(N: int, V: int, chunk_rows: int = CHUNK_ROWS) -> int:
    """Return the largest number of logits of one model that exist at a time, for N >= 1 tokens."""
    return max(min(chunk_rows, N) * V, N * block_columns(N, V, chunk_rows))


def live_rows(hidden_CD: Tensor, slope: LogitGradient) -> Tensor:
    """Return hidden states with 0 for tokens that are not live: 0 (their dz) times NaN would still be NaN."""
    return torch.where(slope.live_N[:, None], hidden_CD, 0)


def nothing(hidden_0D: Tensor, head_VD: Tensor) -> Tensor:
    """Return per-token values of no token, of shape (0,). Their backward gives hidden states and head gradients of
    zero.
    """
    return (hidden_0D.sum(1) + head_VD[:0].sum()).to(ACCUMULATED[head_VD.dtype])


def _filled(buffer: Tensor, hidden_CD: Tensor, head_BD: Tensor) -> Tensor:
    C, B = len(hidden_CD), len(head_BD)
    logits_CB = buffer[:C * B].view(C, B)
    project_(logits_CB, hidden_CD, head_BD)
    return logits_CB


def _check(pieces: ChunkedLogits) -> None:
    reference, shape = pieces.reference, (len(pieces.hidden_ND), len(pieces.head_VD))
    _check_operands("hidden_ND and head_VD", pieces.hidden_ND, pieces.head_VD)
    target = pieces.target_N
    if target.shape != shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target_N must be int64 of shape {shape[:1]}, given {target.dtype} of {tuple(target.shape)}")
    if pieces.chunk_rows < 1:
        raise ValueError(f"chunk_rows must be >= 1, given {pieces.chunk_rows}")
    if reference is None:
        return
    _check_operands("the reference's hidden_NE and head_VE", reference.hidden_NE, reference.head_VE)
    given = (len(reference.hidden_NE), len(reference.head_VE))
    if given != shape:
        raise ValueError(f"the reference must have the policy's tokens and vocabulary {shape}, given {given}")
    if ACCUMULATED[reference.head_VE.dtype] != ACCUMULATED[pieces.head_VD.dtype]:
        raise ValueError(f"policy and reference must both be float64 or neither, given {pieces.head_VD.dtype} and "
                         f"{reference.head_VE.dtype}")


def _check_operands(what: str, hidden: Tensor, head: Tensor) -> None:
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(f"{what} must be matrices of one width, given {tuple(hidden.shape)} and {tuple(head.shape)}")
    if hidden.dtype != head.dtype or head.dtype not in ACCUMULATED:
        raise ValueError(f"{what} must be of one type among {', '.join(map(str, ACCUMULATED))}, given {hidden.dtype} "
                         f"and {head.dtype}")
