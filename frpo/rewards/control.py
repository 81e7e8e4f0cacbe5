"""Shuffle the rewards of a batch over its completions: a control experiment in which nothing can be learned.

A gain that remains in this control does not come from the reward. This module calls no reward function and changes no
value.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from frpo.types import ScoredGroup


def shuffled(groups: Sequence[ScoredGroup], seed: int) -> list[ScoredGroup]:
    """Permute rewards over all completions of the batch, also across groups. A completion's terms move with its sum.

    The same seed and batch shape give the same permutation: pass another seed each step.
    """
    sizes = [len(group.rewards_G) for group in groups]
    order = np.random.default_rng(seed).permutation(sum(sizes))
    rewards = _dealt([group.rewards_G for group in groups], order)
    names = groups[0].terms if groups else ()
    terms = {name: _dealt([group.terms[name] for group in groups], order) for name in names}
    return [
        replace(group, rewards_G=rewards[index], terms={name: parts[index] for name, parts in terms.items()})
        for index, group in enumerate(groups)]


def _dealt(parts: Sequence[np.ndarray], order: np.ndarray) -> list[np.ndarray]:
    """Concatenate, reorder, and cut again into parts of the same lengths."""
    if not parts:
        return []
    return np.split(np.concatenate(parts)[order], np.cumsum([len(part) for part in parts])[:-1])
