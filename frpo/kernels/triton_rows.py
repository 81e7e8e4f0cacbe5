"""Row operations on a block of logits as Triton kernels: the work of `rows`, in one read and one read-write of memory.

These kernels have been compiled for a GPU, but never run on a GPU; they have run only in Triton's interpreter
(TRITON_INTERPRET=1). Their results are tested, their speed and launch sizes are not. `rows` handles a soft margin.
Statistics are online: a row's running maximum, and sums that are rescaled whenever the maximum grows, for both models
in the same pass.

Shape suffixes: C rows (tokens) of a chunk, V vocabulary, B columns (a block of it), K statistics.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from frpo.kernels.rows import ReferenceLogits
from frpo.kernels.stats import LogitGradient, LogitScale, RowStats

_BLOCK = 4096
_WARPS = 8


def statistics(z_CV: Tensor, target_C: Tensor, scale: LogitScale, reference: ReferenceLogits | None) -> RowStats:
    """Compute the same as rows.statistics, for contiguous logits."""
    C, V = z_CV.shape
    out_KC = z_CV.new_empty(4 if reference is None else 9, C)
    settings = {"T": scale.temperature, "CAP": scale.softcap, "BLOCK": _block(V), "num_warps": _WARPS}
    single = ("z_max_N", "z_log_sum_N", "logprobs_N", "entropy_N")
    if reference is None:
        _single_kernel[(C,)](z_CV, target_C, out_KC, C, V, **settings)
        return RowStats(**dict(zip(single, out_KC, strict=True)))
    argmax_2C = target_C.new_empty(2, C)
    _pair_kernel[(C,)](z_CV, reference.u_CB, target_C, out_KC, argmax_2C, C, V, U_CAP=reference.scale.softcap,
                       **settings)
    names = (*single, "u_max_N", "u_log_sum_N", "ref_logprobs_N", "kl_N", "margin_N")
    return RowStats(**dict(zip(names, out_KC, strict=True)), z_argmax_N=argmax_2C[0], u_argmax_N=argmax_2C[1])


def gradient_(z_CB: Tensor, start: int, target_C: Tensor, stats: RowStats, slope: LogitGradient, scale: LogitScale,
              reference: ReferenceLogits | None, dtype: torch.dtype) -> Tensor:
    """Compute the same as rows.gradient_, for contiguous logits and without a soft margin."""
    C, B = z_CB.shape
    dz_CB = z_CB if dtype == z_CB.dtype else torch.empty_like(z_CB, dtype=dtype)
    with_u, with_margin = slope.u_N is not None, slope.margin_N is not None
    used = reference if with_u else None
    block = _block(B)
    _gradient_kernel[(C, triton.cdiv(B, block))](
        z_CB, dz_CB, None if used is None else used.u_CB, target_C, slope.live_N.to(torch.int8),
        stats.z_max_N, stats.u_max_N if with_u else None, slope.one_N, slope.z_N, slope.u_N,
        slope.target_N, slope.margin_N, stats.u_argmax_N if with_margin else None,
        stats.z_argmax_N if with_margin else None, start, B, T=scale.temperature, CAP=scale.softcap,
        U_CAP=None if used is None else used.scale.softcap, BLOCK=block, num_warps=_WARPS)
    return dz_CB


def _block(columns: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(columns))


@triton.jit
def _tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0) * (1 - e) / (1 + e)


@triton.jit
def _scaled(raw, T: tl.constexpr, CAP: tl.constexpr):
    if CAP is not None:
        raw = CAP * _tanh(raw / CAP)
    return raw / T


@triton.jit
def _first_of(values, largest, columns, V):
    """Return the lowest column that holds the largest value; V in a row of NaN."""
    return tl.min(tl.where(values == largest, columns, V), 0)


@triton.jit
def _at(row_ptr, index, V):
    """Return one raw logit of a row, NaN for an index outside the vocabulary."""
    return tl.load(row_ptr + index, mask=(index >= 0) & (index < V), other=float("nan"))


@triton.jit
def _single_kernel(z_ptr, target_ptr, out_ptr, C, V, T: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * V
    top = _scaled(tl.load(z_ptr), T, CAP)
    total = top * 0
    weighted = top * 0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        z = _scaled(tl.load(z_ptr + columns, mask=inside, other=0), T, CAP)
        z = tl.where(inside, z, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        rescale = tl.exp(top - new_top)
        weighted = rescale * (weighted + (top - new_top) * total)
        total = rescale * total
        top = new_top
        e = tl.exp(z - top)
        total += tl.sum(e, 0)
        weighted += tl.sum(tl.where(inside, e * (z - top), 0), 0)
    log_sum = tl.log(total)
    tl.store(out_ptr + row, top)
    tl.store(out_ptr + C + row, log_sum)
    tl.store(out_ptr + 2 * C + row, _scaled(_at(z_ptr, tl.load(target_ptr + row), V), T, CAP) - top - log_sum)
    tl.store(out_ptr + 3 * C + row, log_sum - weighted / total)


@triton.jit
def _pair_kernel(z_ptr, u_ptr, target_ptr, out_ptr, argmax_ptr, C, V, T: tl.constexpr, CAP: tl.constexpr,
                 U_CAP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * V
    u_ptr += row * V
    top = _scaled(tl.load(z_ptr), T, CAP)
    u_top = _scaled(tl.load(u_ptr), T, U_CAP)
    total, weighted, crossed, u_total = top * 0, top * 0, top * 0, top * 0
    own, aligned = row * 0, row * 0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        z = _scaled(tl.load(z_ptr + columns, mask=inside, other=0), T, CAP)
        u = _scaled(tl.load(u_ptr + columns, mask=inside, other=0), T, U_CAP)
        z = tl.where(inside, z, float("-inf"))
        u = tl.where(inside, u, float("-inf"))
        block_top = tl.max(z, 0)
        u_block_top = tl.max(u, 0)
        # Only a larger value replaces an earlier one, so that ties keep the lowest index.
        own = tl.where(block_top > top, _first_of(z, block_top, columns, V), own)
        aligned = tl.where(u_block_top > u_top, _first_of(u, u_block_top, columns, V), aligned)
        new_top = tl.maximum(top, block_top)
        u_new_top = tl.maximum(u_top, u_block_top)
        rescale = tl.exp(top - new_top)
        weighted = rescale * (weighted + (top - new_top) * total)
        crossed = rescale * (crossed + (u_top - u_new_top) * total)
        total = rescale * total
        u_total = tl.exp(u_top - u_new_top) * u_total
        top = new_top
        u_top = u_new_top
        e = tl.exp(z - top)
        total += tl.sum(e, 0)
        u_total += tl.sum(tl.exp(u - u_top), 0)
        weighted += tl.sum(tl.where(inside, e * (z - top), 0), 0)
        crossed += tl.sum(tl.where(inside, e * (u - u_top), 0), 0)
    target = tl.load(target_ptr + row)
    log_sum = tl.log(total)
    u_log_sum = tl.log(u_total)
    kl = (weighted - crossed) / total - log_sum + u_log_sum
    tl.store(out_ptr + row, top)
    tl.store(out_ptr + C + row, log_sum)
    tl.store(out_ptr + 2 * C + row, _scaled(_at(z_ptr, target, V), T, CAP) - top - log_sum)
    tl.store(out_ptr + 3 * C + row, log_sum - weighted / total)
    tl.store(out_ptr + 4 * C + row, u_top)
    tl.store(out_ptr + 5 * C + row, u_log_sum)
    tl.store(out_ptr + 6 * C + row, _scaled(_at(u_ptr, target, V), T, U_CAP) - u_top - u_log_sum)
    tl.store(out_ptr + 7 * C + row, tl.where(kl < 0, 0, kl))  # not maximum, which would hide a NaN
    tl.store(out_ptr + 8 * C + row, _scaled(_at(z_ptr, aligned, V), T, CAP) - top)
    tl.store(argmax_ptr + row, own)
    tl.store(argmax_ptr + C + row, aligned)


@triton.jit
def _gradient_kernel(z_ptr, dz_ptr, u_ptr, target_ptr, live_ptr, z_max_ptr, u_max_ptr, one_ptr, z_slope_ptr,
                     u_slope_ptr, target_slope_ptr, margin_slope_ptr, aligned_ptr, own_ptr, first, B, T: tl.constexpr,
                     CAP: tl.constexpr, U_CAP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < B
    index = first + columns
    raw = tl.load(z_ptr + row * B + columns, mask=inside, other=0)
    z = _scaled(raw, T, CAP) - tl.load(z_max_ptr + row)
    factor = tl.load(one_ptr + row)
    if z_slope_ptr is not None:
        factor += z * tl.load(z_slope_ptr + row)
    if u_ptr is not None:
        u = _scaled(tl.load(u_ptr + row * B + columns, mask=inside, other=0), T, U_CAP) - tl.load(u_max_ptr + row)
        factor += u * tl.load(u_slope_ptr + row)
    dz = tl.exp(z) * factor
    dz += tl.where(index == tl.load(target_ptr + row), tl.load(target_slope_ptr + row), 0)
    if margin_slope_ptr is not None:
        margin = tl.load(margin_slope_ptr + row)
        dz += tl.where(index == tl.load(aligned_ptr + row), margin, 0)
        dz -= tl.where(index == tl.load(own_ptr + row), margin, 0)
    if CAP is not None:
        t = _tanh(raw / CAP)
        dz *= 1 - t * t
    dz = tl.where(tl.load(live_ptr + row) != 0, dz / T, 0)
    tl.store(dz_ptr + row * B + columns, dz, mask=inside)
