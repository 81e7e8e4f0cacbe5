"""Order a data set, epoch after epoch, and choose the examples of each update."""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from frpo.types import Example


def epoch_order(count: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Return the indices of all `count` items: a permutation drawn from (seed, epoch), or in order if not `shuffle`."""
    if not shuffle:
        return np.arange(count)
    # A pair as entropy, not seed + epoch: run 1's first epoch would be run 0's second.
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)


def updates_of_epoch(examples: int, batch_size: int) -> int:
    """Return the number of optimizer updates of one pass over `examples` examples."""
    return math.ceil(examples / batch_size)


class ExampleStream:
    """Examples by optimizer update. An epoch has `per_epoch` updates; the last update may have fewer examples."""

    def __init__(self, examples: Sequence[Example], *, batch_size: int, seed: int, shuffle: bool):
        self.examples, self.batch_size, self.seed, self.shuffle = examples, batch_size, seed, shuffle
        self.per_epoch = updates_of_epoch(len(examples), batch_size)

    def batch(self, update: int) -> list[tuple[int, Example]]:
        """Return index and example of each example of update number `update`, the same at every call."""
        epoch, place = divmod(update, self.per_epoch)
        order = epoch_order(len(self.examples), self.seed, epoch, self.shuffle)
        chosen = order[place * self.batch_size:(place + 1) * self.batch_size]
        return [(int(i), self.examples[i]) for i in chosen]
