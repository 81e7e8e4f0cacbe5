"""Compute the weights that reduce token losses to one number, once, before any batch is split.

The input is the sequences of a whole optimizer update over all ranks. The weights do not depend on advantages or KL.
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
"""Reductions, in this order: of GRPO and FRPO; of the exact sequence gradient; of DAPO; of Dr. GRPO."""


def token_weights(reduction: str, lengths: np.ndarray, max_length: int) -> np.ndarray:
    """Return, per sequence, the weight (float64) of every token with a loss; 0 for a sequence without such tokens.

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
