"""Inputs of a token loss, values kept per token, and the closed form of every token loss's gradient.

Notation: z the policy's logits, u the reference's (both capped and tempered already), p, q their softmax, H the
entropy, y the target, a = argmax u, b = argmax z. The statistics of one token are log p_y, H, KL = sum p (log p - log
q) and a margin. A loss l of these statistics has, for every v of the vocabulary,

    dl/dz_v = dl/dlog p_y (e_y - p)_v - dl/dH p_v (log p_v + H) + dl/dKL p_v (log p_v - log q_v - KL)
              + dl/dmargin d_v
    hard: margin = z_a - z_b,                       d = e_a - e_b
    soft: margin = sum (alpha - gamma) log p,       d_v = alpha_v - gamma_v - gamma_v (z_v - sum gamma z) / tau
          alpha = softmax(u / tau), gamma = softmax(z / tau)

This gradient is p_v times an affine function of (z_v, u_v), plus a few single entries. `LogitGradient` holds the
coefficients, and the row kernels need nothing else of a loss. No tensor with a vocabulary dimension is made here.

Shape suffixes: N tokens, V vocabulary, E hidden width of the reference.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

Margin = Literal["hard", "soft"]


@dataclass(frozen=True, kw_only=True)
class TokenStats:
    """Statistics of the N tokens of one chunk in nats; None where there is no reference.

    logprobs, entropy, kl (>= 0) and margin (<= 0 if hard) may require grad. ref_logprobs are log q of the targets.
    agree_N is True where policy and reference have the same most likely token (ties: the lowest index).
    """

    logprobs_N: Tensor
    entropy_N: Tensor
    kl_N: Tensor | None = None
    margin_N: Tensor | None = None
    ref_logprobs_N: Tensor | None = None
    agree_N: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ReferenceHead:
    """A frozen reference: its final hidden states (N, E) and head (V, E) over the policy's vocabulary.

    softcap: the reference's own soft-cap. temperature: divides the reference's logits; None: the policy's temperature.
    Raises ValueError for an unknown margin or tau <= 0.
    """

    hidden_NE: Tensor
    head_VE: Tensor
    margin: Margin = "hard"
    tau: float = 1.0
    softcap: float | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.margin not in get_args(Margin):
            raise ValueError(f"margin must be one of {get_args(Margin)}, given {self.margin!r}")
        if not self.tau > 0:
            raise ValueError(f"tau must be > 0, given {self.tau}")


@dataclass(frozen=True, kw_only=True)
class LogitScale:
    """Scale of logits: logits = cap * tanh(raw / cap) / temperature, without the tanh where softcap is None.

    Some models multiply their logits by a number m. This equals a temperature of 1 / m, and a cap of cap / m.
    Raises ValueError unless both are > 0.
    """

    temperature: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, given {self.temperature}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be > 0 or None, given {self.softcap}")

    def at(self, temperature: float) -> LogitScale:
        """Return the scale of these logits divided by a sampling temperature."""
        return dataclasses.replace(self, temperature=self.temperature * temperature)


@dataclass(frozen=True, kw_only=True)
class RowStats:
    """Scalars per token from which a gradient is formed later, with logits recomputed block by block.

    log p_v = (z_v - z_max) - z_log_sum. The two terms are kept apart because their sum would round p at large logits.
    alpha and gamma exist for a soft margin only: log alpha_v = (u_v - u_max) / tau - alpha_log_sum, likewise gamma;
    gamma_mean = sum gamma (z - z_max).
    """

    z_max_N: Tensor
    z_log_sum_N: Tensor
    logprobs_N: Tensor
    entropy_N: Tensor
    u_max_N: Tensor | None = None
    u_log_sum_N: Tensor | None = None
    ref_logprobs_N: Tensor | None = None
    kl_N: Tensor | None = None
    margin_N: Tensor | None = None
    z_argmax_N: Tensor | None = None
    u_argmax_N: Tensor | None = None
    alpha_log_sum_N: Tensor | None = None
    gamma_log_sum_N: Tensor | None = None
    gamma_mean_N: Tensor | None = None

    def leaves(self, requires_grad: bool) -> TokenStats:
        """Return the input of the loss: detached statistics, so that the loss's graph ends at them."""
        def leaf(values_N: Tensor) -> Tensor:
            return values_N.detach().requires_grad_(requires_grad)

        return TokenStats(
            logprobs_N=leaf(self.logprobs_N), entropy_N=leaf(self.entropy_N),
            kl_N=None if self.kl_N is None else leaf(self.kl_N),
            margin_N=None if self.margin_N is None else leaf(self.margin_N), ref_logprobs_N=self.ref_logprobs_N,
            agree_N=None if self.kl_N is None else known(self.z_argmax_N) == known(self.u_argmax_N))


@dataclass(frozen=True, kw_only=True)
class LogitGradient:
    """Coefficients, per token, of dl/dz = e^(z - z_max) (one + z (z - z_max) + u (u - u_max)) + target e_y + margin d.

    dl/dz is 0 if the token is not live. z, u and margin are None where the loss does not need them. A token is live if
    any derivative of its loss is not exactly 0 (NaN counts as live). Other tokens are left out by selection, since 0 *
    NaN is NaN.
    """

    one_N: Tensor
    z_N: Tensor | None
    u_N: Tensor | None
    target_N: Tensor
    margin_N: Tensor | None
    live_N: Tensor


Record = TypeVar("Record", RowStats, LogitGradient)


def known(values_N: Tensor | None) -> Tensor:
    """Return values that must exist, and assert so: a KL has a reference, and a soft margin has alpha and gamma."""
    assert values_N is not None
    return values_N


def of_rows(record: Record, rows: slice) -> Record:
    """Return the same record for some of its tokens."""
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    return dataclasses.replace(record, **{name: value[rows] for name, value in values.items() if value is not None})


def joined(parts: Sequence[Record]) -> Record:
    """Join the records of several groups of tokens into one, in order."""
    values = {f.name: [getattr(part, f.name) for part in parts] for f in dataclasses.fields(parts[0])}
    return dataclasses.replace(parts[0], **{name: torch.cat(v) for name, v in values.items() if v[0] is not None})


def slope(stats: RowStats, d_logprobs_N: Tensor | None = None, d_entropy_N: Tensor | None = None,
          d_kl_N: Tensor | None = None, d_margin_N: Tensor | None = None) -> LogitGradient:
    """Compute the coefficients of dl/dz from the derivatives of a loss. None: a derivative that is 0 for every token.
    """
    zero_N = torch.zeros_like(stats.logprobs_N)
    derivatives = [d_N for d_N in (d_logprobs_N, d_entropy_N, d_kl_N, d_margin_N) if d_N is not None]
    live_N = torch.stack([d_N != 0 for d_N in derivatives]).any(0) if derivatives else zero_N.bool()
    one_N = zero_N
    z_N: Tensor | None = None
    u_N: Tensor | None = None
    if d_logprobs_N is not None:
        one_N = one_N - d_logprobs_N
    if d_entropy_N is not None:
        one_N, z_N = one_N - d_entropy_N * (stats.entropy_N - stats.z_log_sum_N), -d_entropy_N
    if d_kl_N is not None:
        one_N = one_N + d_kl_N * (known(stats.u_log_sum_N) - stats.z_log_sum_N - known(stats.kl_N))
        z_N, u_N = d_kl_N if z_N is None else z_N + d_kl_N, -d_kl_N
    normaliser_N = torch.exp(-stats.z_log_sum_N)
    z_N, u_N = (None if c_N is None else c_N * normaliser_N for c_N in (z_N, u_N))
    return LogitGradient(one_N=one_N * normaliser_N, z_N=z_N, u_N=u_N,
                 target_N=zero_N if d_logprobs_N is None else d_logprobs_N, margin_N=d_margin_N, live_N=live_N)
