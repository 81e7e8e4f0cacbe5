"""The plain computation: all logits at once, gradients by autograd. For tests and benchmarks only; no module imports
it.

It shares no formula with the rest of this package, so that agreement of the two is evidence.

Shape suffixes: N tokens, V vocabulary, D hidden width.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from frpo.kernels.stats import ReferenceHead, TokenStats


def naive_token_loss(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, loss: Callable[[TokenStats, slice], Tensor],
                     *, temperature: float = 1.0, softcap: float | None = None,
                     reference: ReferenceHead | None = None) -> Tensor:
    """Compute the same as linear_token_loss, in one chunk."""
    stats = naive_stats(hidden_ND, head_VD, target_N, temperature=temperature, softcap=softcap, reference=reference)
    return loss(stats, slice(0, len(hidden_ND)))


def naive_stats(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, *, temperature: float = 1.0,
                softcap: float | None = None, reference: ReferenceHead | None = None) -> TokenStats:
    """Compute the statistics of linear_token_loss, in the operands' type or float32, whichever is wider."""
    z_NV = naive_logits(hidden_ND, head_VD, temperature, softcap)
    if reference is None:
        return stats_of_logits(z_NV, target_N)
    with torch.no_grad():
        u_NV = naive_logits(reference.hidden_NE, reference.head_VE, reference.temperature or temperature,
                            reference.softcap)
    return stats_of_logits(z_NV, target_N, u_NV, tau=reference.tau if reference.margin == "soft" else None)


def stats_of_logits(z_NV: Tensor, target_N: Tensor, u_NV: Tensor | None = None, *, tau: float | None = None,
                    entropy: bool = True) -> TokenStats:
    """Compute statistics of final logits. tau: None for a hard margin. entropy: False gives zeros at no cost."""
    log_p_NV = torch.log_softmax(z_NV, dim=-1)
    logprobs_N = _at(log_p_NV, target_N)
    entropy_N = -(log_p_NV.exp() * log_p_NV).sum(-1) if entropy else torch.zeros_like(logprobs_N)
    if u_NV is None:
        return TokenStats(logprobs_N=logprobs_N, entropy_N=entropy_N)
    log_q_NV = torch.log_softmax(u_NV, dim=-1)
    kl_N = torch.nn.functional.kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(-1)
    a_N, b_N = u_NV.argmax(-1), z_NV.argmax(-1)
    if tau is None:
        margin_N = _at(log_p_NV, a_N) - _at(log_p_NV, b_N)
    else:
        margin_N = ((torch.softmax(u_NV / tau, dim=-1) - torch.softmax(z_NV / tau, dim=-1)) * log_p_NV).sum(-1)
    return TokenStats(logprobs_N=logprobs_N, entropy_N=entropy_N, kl_N=kl_N, margin_N=margin_N,
                      ref_logprobs_N=_at(log_q_NV, target_N), agree_N=a_N == b_N)


def naive_logits(hidden_ND: Tensor, head_VD: Tensor, temperature: float = 1.0, softcap: float | None = None) -> Tensor:
    """Compute logits (N, V) in float32 or wider. bfloat16 operands are widened first, so that no logit is rounded."""
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    logits_NV = hidden_ND.to(wide) @ head_VD.to(wide).t()
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return logits_NV if temperature == 1 else logits_NV / temperature


def _at(values_NV: Tensor, index_N: Tensor) -> Tensor:
    return values_NV.gather(-1, index_N[:, None])[:, 0]
