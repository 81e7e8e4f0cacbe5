"""Define CISPO: REINFORCE weighted by a capped, detached ratio, so that no token loses its gradient.

Unlike in `clip` there is no minimum: a capped token keeps a gradient, with a bounded weight.

Shape suffix: N tokens.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from frpo.objectives.base import PolicyTokens, TokenObjective, surrogate
from frpo.objectives.ops import keep


@surrogate("cispo")
@dataclass(frozen=True, kw_only=True)
class CISPO:
    """Objective sg(clip(ratio, 1 - clip_low, 1 + clip_high)) A log pi of every token (MiniMax-M1, eqs. 4-5).

    clip_low: None does not clip small ratios, as in the paper. clip_high: tuned in the paper, which gives no value; the
    default is ours. Raises ValueError for values outside `clip`'s ranges.
    """

    whole_sequences: ClassVar[bool] = False
    clip_low: float | None = None
    clip_high: float = 4.0

    def __post_init__(self) -> None:
        if self.clip_low is not None and not 0 < self.clip_low < 1:
            raise ValueError(f"clip_low must be in (0, 1) or null, given {self.clip_low}")
        if not 0 < self.clip_high < math.inf:
            raise ValueError(f"clip_high must be > 0 and finite, given {self.clip_high}")

    def objective(self, tokens: PolicyTokens) -> TokenObjective:
        ratio_N = keep(tokens.advantage_N != 0, tokens.log_ratio_N.detach()).exp()
        lowest, highest = 0.0 if self.clip_low is None else 1 - self.clip_low, 1 + self.clip_high
        objective_N = ratio_N.clamp(lowest, highest) * tokens.advantage_N * tokens.logprobs_N
        return TokenObjective(objective_N=objective_N, low_N=ratio_N < lowest, high_N=ratio_N > highest)
