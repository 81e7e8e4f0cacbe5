"""Row operations on a block of logits in plain PyTorch: statistics of whole rows, and their gradient in place.

A few rows of logits are processed at a time, so that they stay in a CPU's cache from one pass to the next. Memory is
then read once for the statistics and once for the gradient, and temporaries have only a few rows. Matrix products and
losses are in other modules; `triton_rows` offers the same two functions.

Shape suffixes: C rows (tokens) of a chunk, V vocabulary, B columns (a block of it), R rows processed at once.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frpo.kernels.stats import LogitGradient, LogitScale, RowStats, joined, known, of_rows

BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Number of logits processed at once: few enough for a CPU's cache, enough to keep a GPU busy."""


@dataclass(frozen=True, kw_only=True)
class ReferenceLogits:
    """The reference's raw logits, of the same rows and columns as the policy's. tau is None for a hard margin."""

    u_CB: Tensor
    scale: LogitScale
    tau: float | None = None

    def of_rows(self, rows: slice) -> ReferenceLogits:
        """Return the logits of some of the rows, without a copy."""
        return replace(self, u_CB=self.u_CB[rows])


def statistics(z_CV: Tensor, target_C: Tensor, scale: LogitScale, reference: ReferenceLogits | None) -> RowStats:
    """Compute statistics of every row from raw logits over the whole vocabulary. The logits stay unchanged. C > 0."""
    return joined([_single(z_CV[rows], target_C[rows, None], scale) if reference is None else
                   _pair(z_CV[rows], target_C[rows, None], scale, reference.of_rows(rows))
                   for rows in _row_blocks(z_CV)])


def gradient_(z_CB: Tensor, start: int, target_C: Tensor, stats: RowStats, slope: LogitGradient, scale: LogitScale,
              reference: ReferenceLogits | None, dtype: torch.dtype) -> Tensor:
    """Compute dl/draw of raw logits, in place or as another dtype. The logits are the vocabulary's columns from `start`
    on.

    Rows that are not live are exactly 0, whatever the logits were. The logits of both models are overwritten.
    """
    for rows in _row_blocks(z_CB):
        _block_gradient(z_CB[rows], start, target_C[rows], of_rows(stats, rows), of_rows(slope, rows), scale,
                        None if reference is None else reference.of_rows(rows))
    z_CB[~slope.live_N] = 0
    return z_CB.to(dtype)


def _row_blocks(z_CB: Tensor) -> Iterator[slice]:
    height = max(1, BLOCK_ELEMENTS.get(z_CB.device.type, 1 << 26) // z_CB.shape[1])
    return (slice(first, min(first + height, len(z_CB))) for first in range(0, len(z_CB), height))


def _scaled(raw_RB: Tensor, scale: LogitScale) -> Tensor:
    """Return capped and tempered logits; the given tensor itself where there is nothing to do."""
    if scale.softcap is not None:
        return (raw_RB / scale.softcap).tanh_().mul_(scale.softcap / scale.temperature)
    return raw_RB if scale.temperature == 1 else raw_RB / scale.temperature


def _expectation(weights_RV: Tensor, total_R1: Tensor, values_RV: Tensor) -> Tensor:
    """Compute sum weights * values / total; the weights are overwritten. A dot product would depend on the matmul
    precision set.
    """
    return weights_RV.mul_(values_RV).sum(1, keepdim=True).div_(total_R1)


def _single(raw_RV: Tensor, target_R1: Tensor, scale: LogitScale) -> RowStats:
    z_RV = _scaled(raw_RV, scale)
    z_max_R1 = z_RV.amax(1, keepdim=True)
    z_RV = z_RV - z_max_R1
    e_RV = z_RV.exp()
    total_R1 = e_RV.sum(1, keepdim=True)
    log_sum_R1 = total_R1.log()
    return RowStats(z_max_N=z_max_R1[:, 0], z_log_sum_N=log_sum_R1[:, 0],
                    logprobs_N=(z_RV.gather(1, target_R1) - log_sum_R1)[:, 0],
                    entropy_N=(log_sum_R1 - _expectation(e_RV, total_R1, z_RV))[:, 0])


def _pair(raw_RV: Tensor, target_R1: Tensor, scale: LogitScale, reference: ReferenceLogits) -> RowStats:
    z_RV, u_RV = _scaled(raw_RV, scale), _scaled(reference.u_CB, reference.scale)
    z_max_R1, z_argmax_R1 = z_RV.max(1, keepdim=True)
    u_max_R1, u_argmax_R1 = u_RV.max(1, keepdim=True)
    z_RV, u_RV = z_RV - z_max_R1, u_RV - u_max_R1
    u_log_sum_R1 = u_RV.exp().sum(1, keepdim=True).log_()
    e_RV = z_RV.exp()
    total_R1 = e_RV.sum(1, keepdim=True)
    z_log_sum_R1 = total_R1.log()
    z_mean_R1 = _expectation(e_RV.clone(), total_R1, z_RV)
    kl_R1 = z_mean_R1 - _expectation(e_RV, total_R1, u_RV) - z_log_sum_R1 + u_log_sum_R1
    columns = {
        "z_max_N": z_max_R1, "z_log_sum_N": z_log_sum_R1, "u_max_N": u_max_R1, "u_log_sum_N": u_log_sum_R1,
        "logprobs_N": z_RV.gather(1, target_R1) - z_log_sum_R1, "entropy_N": z_log_sum_R1 - z_mean_R1,
        "ref_logprobs_N": u_RV.gather(1, target_R1) - u_log_sum_R1,
        "kl_N": kl_R1.clamp_(min=0),  # rounding alone can make the KL of equal models negative
        "z_argmax_N": z_argmax_R1, "u_argmax_N": u_argmax_R1,
        **(_soft_margin(z_RV, u_RV, reference.tau) if reference.tau else {"margin_N": z_RV.gather(1, u_argmax_R1)}),
    }
    return RowStats(**{name: column_R1[:, 0] for name, column_R1 in columns.items()})


def _soft_margin(z_RV: Tensor, u_RV: Tensor, tau: float) -> dict[str, Tensor]:
    alpha_RV, gamma_RV = (u_RV / tau).exp_(), (z_RV / tau).exp_()
    alpha_total_R1, gamma_total_R1 = alpha_RV.sum(1, keepdim=True), gamma_RV.sum(1, keepdim=True)
    gamma_mean_R1 = _expectation(gamma_RV, gamma_total_R1, z_RV)
    return {"margin_N": _expectation(alpha_RV, alpha_total_R1, z_RV) - gamma_mean_R1, "gamma_mean_N": gamma_mean_R1,
            "alpha_log_sum_N": alpha_total_R1.log(), "gamma_log_sum_N": gamma_total_R1.log()}


def _block_gradient(z_RB: Tensor, start: int, target_R: Tensor, stats: RowStats, slope: LogitGradient,
                    scale: LogitScale, reference: ReferenceLogits | None) -> None:
    cap_slope_RB = None
    if scale.softcap is not None:
        z_RB.div_(scale.softcap).tanh_()
        cap_slope_RB = 1 - z_RB.square()
        z_RB.mul_(scale.softcap / scale.temperature)
    elif scale.temperature != 1:
        z_RB.div_(scale.temperature)
    z_RB.sub_(stats.z_max_N[:, None])
    soft = slope.margin_N is not None and stats.gamma_mean_N is not None
    u_RB = soft_RB = None
    if slope.u_N is not None or soft:
        assert reference is not None  # without one there is neither KL nor margin
        u_RB = _scaled(reference.u_CB, reference.scale).sub_(known(stats.u_max_N)[:, None])
        if soft:
            assert reference.tau is not None
            soft_RB = _soft_gradient(z_RB, u_RB, stats, slope, reference.tau)
    e_RB = z_RB.exp()
    if slope.z_N is None:
        torch.mul(e_RB, slope.one_N[:, None], out=z_RB)
    else:
        torch.addcmul(slope.one_N[:, None], z_RB, slope.z_N[:, None], out=z_RB)
        if slope.u_N is not None:
            z_RB.addcmul_(known(u_RB), slope.u_N[:, None])
        z_RB.mul_(e_RB)
    _add_entries_(z_RB, start, target_R, slope.target_N)
    if soft_RB is not None:
        z_RB.add_(soft_RB)
    elif slope.margin_N is not None:
        _add_entries_(z_RB, start, known(stats.u_argmax_N), slope.margin_N)
        _add_entries_(z_RB, start, known(stats.z_argmax_N), -slope.margin_N)
    if cap_slope_RB is not None:
        z_RB.mul_(cap_slope_RB)
    if scale.temperature != 1:
        z_RB.div_(scale.temperature)


def _soft_gradient(z_RB: Tensor, u_RB: Tensor, stats: RowStats, slope: LogitGradient, tau: float) -> Tensor:
    """Compute dl/dmargin (alpha - gamma (1 + (z - sum gamma z) / tau))."""
    gamma_RB = (z_RB / tau).sub_(known(stats.gamma_log_sum_N)[:, None]).exp_()
    gamma_RB.mul_((z_RB - known(stats.gamma_mean_N)[:, None]).div_(tau).add_(1))
    alpha_RB = (u_RB / tau).sub_(known(stats.alpha_log_sum_N)[:, None]).exp_()
    return alpha_RB.sub_(gamma_RB).mul_(known(slope.margin_N)[:, None])


def _add_entries_(z_RB: Tensor, start: int, index_R: Tensor, values_R: Tensor) -> None:
    """Add one value per row at its vocabulary index, where the index lies within these columns."""
    column_R = index_R - start
    inside_R = (column_R >= 0) & (column_R < z_RB.shape[1])
    column_R = column_R.clamp(0, z_RB.shape[1] - 1)
    z_RB.scatter_add_(1, column_R[:, None], torch.where(inside_R, values_R, 0)[:, None])
