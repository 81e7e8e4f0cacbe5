"""Compute the per-token KL estimators k1, k2, k3; select tokens, sum over sequences, and compute without a gradient.

The estimators mask nothing: the caller must replace tokens without a loss before the estimators exponentiate them.

Shape suffix: N tokens. Everything is in nats.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return -d with d = log pi_ref - log pi: unbiased for KL(pi || pi_ref) under samples of pi, of either sign."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return d^2 / 2: biased as a value, but its gradient is that of KL(pi || pi_ref) in expectation."""
    return (ref_logprobs - logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return e^d - d - 1 >= 0: unbiased for KL(pi || pi_ref) as a value; gradient 1 - e^d with respect to log pi."""
    d = ref_logprobs - logprobs
    return d.expm1() - d


def keep(live_N: Tensor, values_N: Tensor) -> Tensor:
    """Return the values of live tokens, and 0 elsewhere, by selection: a product with a mask would keep NaN and inf."""
    return values_N.masked_fill(~live_N, 0)


def sequence_sum(values_N: Tensor, sequence_N: Tensor) -> Tensor:
    """Return at every token the sum over its sequence. Add in float64, so that the order of tokens does not matter."""
    if values_N.numel() == 0:
        return values_N
    exact_N = values_N.double()
    sums = exact_N.new_zeros(int(sequence_N.max()) + 1)
    return sums.index_add(0, sequence_N, exact_N)[sequence_N].to(values_N.dtype)


def without_gradient(function: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """Decorate a function with torch.no_grad, imported at the first call.

    Reading a recipe imports this package, but needs no torch.
    """

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Answer:
        import torch

        with torch.no_grad():
            return function(*args, **kwargs)

    return call
