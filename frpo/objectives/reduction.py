"""How token losses become one number: the weight of each sequence's tokens, divided once, before any batch is split.

It sees the sequences of a whole optimizer update over all ranks and knows nothing of advantages or KL.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from frpo.objectives.registry import unknown

REDUCTIONS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "seq-mean-token-mean": lambda lengths, max_length: 1 / (lengths * lengths.size),
    "seq-sum": lambda lengths, max_length: np.full(lengths.size, 1 / lengths.size),
    "token-mean": lambda lengths, max_length: np.full(lengths.size, 1 / lengths.sum()),
    "fixed-length": lambda lengths, max_length: np.full(lengths.size, 1 / (max_length * lengths.size)),
}
"""GRPO and FRPO; the exact sequence gradient; DAPO; Dr. GRPO."""


def token_weights(reduction: str, lengths: np.ndarray, max_length: int) -> np.ndarray:
    """Weight (float64) that every token with a loss carries, per sequence; 0 for a sequence without such tokens.

    lengths: tokens with a loss (T_i) of all N sequences of the update, over all ranks.
    max_length: L_max of "fixed-length" in tokens. Weights: 1/(T_i N), 1/N, 1/sum T, 1/(L_max N).
    Raises ValueError for an unknown reduction, negative lengths or max_length < 1.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(unknown("reduction", reduction, REDUCTIONS))
    lengths = np.asarray(lengths, dtype=np.float64)
    if max_length < 1 or (lengths < 0).any():
        raise ValueError(f"lengths must be >= 0 and max_length >= 1, given {lengths} and max_length {max_length}")
    with np.errstate(divide="ignore"):
        return np.where(lengths > 0, REDUCTIONS[reduction](lengths, max_length), 0.0)
