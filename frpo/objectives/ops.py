"""The per-token KL estimators k1, k2, k3, and selecting and summing over sequences.

The estimators mask nothing: a caller replaces tokens without a loss before anything here exponentiates them.

Shape suffix: N tokens. Everything is in nats.
"""
from __future__ import annotations

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """-d with d = log pi_ref - log pi: unbiased for KL(pi || pi_ref) under samples of pi, of either sign."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d^2 / 2: biased as a value, but its gradient is that of KL(pi || pi_ref) in expectation."""
    return (ref_logprobs - logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """e^d - d - 1 >= 0: unbiased for KL(pi || pi_ref) as a value; gradient 1 - e^d with respect to log pi."""
    d = ref_logprobs - logprobs
    return torch.expm1(d) - d


def keep(live_N: Tensor, values_N: Tensor) -> Tensor:
    """The values of live tokens and 0 elsewhere, by selection: multiplying by a mask would keep NaN and inf."""
    return torch.where(live_N, values_N, torch.zeros_like(values_N))


def sequence_sum(values_N: Tensor, sequence_N: Tensor) -> Tensor:
    """At every token the sum over its sequence, added in float64, so that the order of tokens does not matter."""
    if values_N.numel() == 0:
        return values_N
    sums = values_N.new_zeros(int(sequence_N.max()) + 1, dtype=torch.float64)
    return sums.index_add(0, sequence_N, values_N.double())[sequence_N].to(values_N.dtype)
