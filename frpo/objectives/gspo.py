"""Define GSPO: the clipped surrogate on one ratio a sequence, the geometric mean of its tokens' ratios.

GSPO needs all tokens of a sequence at once. Per token this is the GSPO-token form, with the gradient of the sequence.

Shape suffix: N tokens.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from frpo.objectives.base import PolicyTokens, TokenObjective, surrogate
from frpo.objectives.clip import pessimistic, require_clip_range
from frpo.objectives.ops import sequence_sum


@surrogate("gspo")
@dataclass(frozen=True, kw_only=True)
class GSPO:
    """Objective min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) with s_i = exp(mean over t of log ratio_t).

    Source: GSPO, eqs. 5-7, 13. The mean is over the tokens with a loss. At each token s_i is a constant times
    pi_t / sg(pi_t). So weights of 1 / T_i give the gradient A s_i (1 / T_i) sum_t grad log pi_t, and 0 if the sequence
    is clipped. The clip range is far smaller than for single tokens, because s_i is a mean. Raises ValueError for
    values outside `clip`'s ranges.
    """

    whole_sequences: ClassVar[bool] = True
    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def __post_init__(self) -> None:
        require_clip_range(self.clip_low, self.clip_high)

    def objective(self, tokens: PolicyTokens) -> TokenObjective:
        log_ratio_N = tokens.log_ratio_N.detach()
        lengths_N = sequence_sum(tokens.live_N.to(log_ratio_N.dtype), tokens.sequence_N).clamp(min=1)
        mean_N = sequence_sum(log_ratio_N, tokens.sequence_N) / lengths_N
        through_N = tokens.logprobs_N - tokens.logprobs_N.detach()
        return pessimistic(mean_N + through_N, tokens.advantage_N, self.clip_low, self.clip_high)
