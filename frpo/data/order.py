"""In which order a data set is gone through, epoch after epoch."""
from __future__ import annotations

import numpy as np


def epoch_order(count: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Indices of all `count` items: a permutation drawn from (seed, epoch), or the given order without `shuffle`."""
    if not shuffle:
        return np.arange(count)
    # A pair as entropy, not seed + epoch: run 1's first epoch would be run 0's second.
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)
