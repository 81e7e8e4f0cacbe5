"""Log-probs of sampled tokens and the per-token KL estimators k1, k2, k3.

No masking and no reduction: a caller replaces tokens without a loss before anything here exponentiates them.

Shape suffixes: T tokens, V vocabulary. Everything is in nats.
"""
from __future__ import annotations

import torch
from torch import Tensor


def selective_logprobs(logits_TV: Tensor, token_ids_T: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs of the given tokens (T,) and entropies (T,) of softmax(logits / temperature).

    Computed in float32 (float64 stays float64). The entropy is a metric and carries no gradient.
    Raises ValueError unless temperature > 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, given {temperature}")
    if logits_TV.dtype != torch.float64:
        logits_TV = logits_TV.float()
    logprobs_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    logprobs_T = logprobs_TV.gather(-1, token_ids_T.unsqueeze(-1)).squeeze(-1)
    # entr(0) = 0: a vocabulary entry forbidden by a logit of -inf must not give 0 * inf.
    entropy_T = torch.special.entr(logprobs_TV.detach().exp()).sum(-1)
    return logprobs_T, entropy_T


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
