"""Ready reward functions of a completion's length alone.

Lengths are in tokens, the end-of-sequence token included. Nothing here reads the text or shapes other rewards.
"""
from __future__ import annotations

from collections.abc import Sequence


def soft_overlong(completion_ids: Sequence[Sequence[int]], max_length: int, buffer: int) -> list[float]:
    """DAPO's soft overlong punishment (eq. 13): 0 up to max_length - buffer tokens, then linearly down to -1 at
    max_length, -1 beyond.

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
