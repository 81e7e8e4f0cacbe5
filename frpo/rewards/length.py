"""Reward a completion by its length alone: ready reward functions.

Lengths are in tokens, including the end-of-sequence token. No function here reads the text or changes other rewards.
"""
from __future__ import annotations

from collections.abc import Sequence


def soft_overlong(completion_ids: Sequence[Sequence[int]], max_length: int, buffer: int) -> list[float]:
    """Return DAPO's soft overlong punishment (eq. 13).

    The punishment is 0 up to max_length - buffer tokens, then falls linearly to -1 at max_length, and is -1 beyond.
    max_length: usually rollout.max_new_tokens. buffer: tokens over which the punishment grows, 1 to max_length.
    Raises ValueError for other values.
    """
    for name, value in (("max_length", max_length), ("buffer", buffer)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of tokens >= 1, given {value!r}")
    if buffer > max_length:
        raise ValueError(f"buffer must be at most max_length = {max_length}, given {buffer}; lower it")
    free = max_length - buffer
    return [max(min(free - len(token_ids), 0) / buffer, -1.0) for token_ids in completion_ids]
