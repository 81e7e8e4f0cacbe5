"""The LM head and the loss of its tokens as one operation, so that logits over the whole batch never exist.

Hidden states and head weights are the input. Losses, log-probs, entropies and gradients are the output. This package
handles no model, no batch and no collective. `reference` holds the plain computation for comparison in tests and
benchmarks.
"""
from frpo.kernels.logprobs import linear_logprobs
from frpo.kernels.stats import LogitScale, ReferenceHead, TokenStats
from frpo.kernels.token_loss import linear_cross_entropy, linear_token_loss

__all__ = ["LogitScale", "ReferenceHead", "TokenStats", "linear_cross_entropy", "linear_logprobs", "linear_token_loss"]
