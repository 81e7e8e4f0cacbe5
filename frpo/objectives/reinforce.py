"""Define the plain policy gradient, without clipping and without a ratio to an older policy.

Use it for advantages that are already exact at the current policy, as `objective.reweight: current` makes them.

Shape suffix: N tokens.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from frpo.objectives.base import PolicyTokens, TokenObjective, surrogate


@surrogate("reinforce")
@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """Objective A pi / sg(pi) of every token: value A, gradient A grad log pi."""

    whole_sequences: ClassVar[bool] = False

    def objective(self, tokens: PolicyTokens) -> TokenObjective:
        through_N = (tokens.logprobs_N - tokens.logprobs_N.detach()).exp()
        never_N = tokens.live_N.new_zeros(tokens.live_N.shape)
        return TokenObjective(objective_N=through_N * tokens.advantage_N, low_N=never_N, high_N=never_N)
