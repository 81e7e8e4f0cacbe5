"""Define PPO's clipped surrogate, and the pessimistic minimum that other surrogates use too.

There is one ratio per token. Lengths, weights and sums are computed elsewhere.

Shape suffix: N tokens.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from frpo.objectives.base import PolicyTokens, TokenObjective, surrogate
from frpo.objectives.ops import keep

if TYPE_CHECKING:
    from torch import Tensor


@surrogate("clip")
@dataclass(frozen=True, kw_only=True)
class Clip:
    """Objective min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) of every token (PPO, eq. 7).

    clip_low, clip_high: may differ (DAPO raises clip_high).
    dual_clip: c > 1; for A < 0 the objective is at least c A (dual-clip PPO). This bounds the loss of a token that has
    become far more likely. None: unbounded.

    Raises ValueError for values outside these ranges.
    """

    name: ClassVar[str]
    whole_sequences: ClassVar[bool] = False
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        require_clip_range(self.clip_low, self.clip_high)
        if self.dual_clip is not None and not 1 < self.dual_clip < math.inf:
            raise ValueError(f"dual_clip must be > 1 and finite, or null, given {self.dual_clip}")

    def objective(self, tokens: PolicyTokens) -> TokenObjective:
        return pessimistic(
            tokens.log_ratio_N, tokens.advantage_N, self.clip_low, self.clip_high, self.dual_clip or math.inf)


def pessimistic(log_ratio_N: Tensor, advantage_N: Tensor, clip_low: float, clip_high: float,
                bound: float = math.inf) -> TokenObjective:
    """Return the smaller of ratio A and clipped ratio A. For A < 0 the ratio counts as `bound` at most.

    low_N: A < 0 and the ratio is below 1 - clip_low. high_N: the ratio is above 1 + clip_high (A > 0) or above `bound`
    (A < 0). These tokens are constants. They leave the graph before exp, since their gradient would be 0 * inf in an
    overflow.
    """
    ratio_N = log_ratio_N.detach().exp()
    upper_N = ratio_N.new_full(ratio_N.shape, 1 + clip_high).masked_fill(advantage_N < 0, bound)
    learns_N = advantage_N != 0
    low_N = (advantage_N < 0) & (ratio_N < 1 - clip_low)
    high_N = learns_N & (ratio_N > upper_N)
    ratio_N = keep(learns_N & ~(low_N | high_N), log_ratio_N).exp()
    ratio_N = upper_N.where(high_N, ratio_N).masked_fill(low_N, 1 - clip_low)
    return TokenObjective(objective_N=ratio_N * advantage_N, low_N=low_N, high_N=high_N)


def require_clip_range(clip_low: float, clip_high: float) -> None:
    """Raise ValueError unless 0 < clip_low < 1 and 0 < clip_high < inf."""
    if not 0 < clip_low < 1:
        raise ValueError(f"clip_low must be in (0, 1), given {clip_low}")
    if not 0 < clip_high < math.inf:
        raise ValueError(f"clip_high must be > 0 and finite, given {clip_high}")
