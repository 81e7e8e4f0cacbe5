"""Correct for the rollout engine: compute importance weights from the engine that sampled to the policy that learns.

Engine and learner compute the same policy with different kernels, so the samples come from a slightly different
distribution. The weights are constants of the policy term. They differ from a surrogate's ratio of current to old
policy.

Shape suffix: N tokens.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from frpo.objectives.ops import k3, keep, sequence_sum, without_gradient
from frpo.types import Metrics

if TYPE_CHECKING:
    from torch import Tensor


class RolloutCorrection(BaseModel):
    """Weights exp(old - rollout) of tokens or of whole sequences, kept within limits; a section of the recipe.

    A log-prob difference d_t = log pi_old - log pi_rollout gives the weight e^{d_t} (token), e^{sum d_t} (sequence) or
    e^{mean d_t} (geometric). Sum and mean are over the sequence's tokens with a loss. "truncate": min(weight, high)
    (truncated importance sampling); "mask": 0 outside [low, high] (masked importance sampling, IcePop).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    level: Literal["token", "sequence", "geometric"] = Field(
        "token", description="token: one weight a token; sequence: one weight a sequence, the product of its tokens' "
                             "weights; geometric: their geometric mean")
    mode: Literal["truncate", "mask"] = Field("truncate", description="truncate: min(weight, high); mask: 0 if outside")
    low: float | None = Field(None, ge=0, description="lower limit of the weight, for mode mask only; null: no limit")
    high: float = Field(2.0, gt=0, description="upper limit of the weight")

    @model_validator(mode="after")
    def _limits(self) -> RolloutCorrection:
        if self.low is not None and self.mode == "truncate":
            raise ValueError(f"low = {self.low} needs mode mask, because mode truncate has no lower limit; set mode to "
                             "mask or low to null")
        if self.low is not None and self.low >= self.high:
            raise ValueError(f"low = {self.low} must be below high = {self.high}")
        return self

    @property
    def whole_sequences(self) -> bool:
        """Check whether a token's weight depends on other tokens of its sequence."""
        return self.level != "token"

    @without_gradient
    def weights(self, old_N: Tensor, rollout_N: Tensor, live_N: Tensor, sequence_N: Tensor) -> tuple[Tensor, Metrics]:
        """Compute weights (N), 1 for a token that is not live, and their metrics over live tokens.

        old_N, rollout_N: log-probs in nats; their values at other tokens do not matter.
        """
        old_N, rollout_N = keep(live_N, old_N), keep(live_N, rollout_N)
        raw_N = self._exponents(old_N - rollout_N, live_N, sequence_N).exp()
        # Written so that NaN is inside: a bad number of a live token must stay visible.
        outside_N = raw_N > self.high
        if self.low is not None:
            outside_N = outside_N | (raw_N < self.low)
        outside_N = outside_N & live_N
        limit = self.high if self.mode == "truncate" else 0.0
        weight_N = raw_N.masked_fill(outside_N, limit).masked_fill(~live_N, 1.0)
        return weight_N, _metrics(raw_N, weight_N, outside_N, k3(rollout_N, old_N), live_N)

    def _exponents(self, difference_N: Tensor, live_N: Tensor, sequence_N: Tensor) -> Tensor:
        if self.level == "token":
            return difference_N
        sum_N = sequence_sum(difference_N, sequence_N)
        if self.level == "sequence":
            return sum_N
        return sum_N / sequence_sum(live_N.to(sum_N.dtype), sequence_N).clamp(min=1)


def _metrics(raw_N: Tensor, weight_N: Tensor, outside_N: Tensor, kl_N: Tensor, live_N: Tensor) -> Metrics:
    count = live_N.sum()
    weight_N, raw_N = keep(live_N, weight_N), keep(live_N, raw_N)
    return {
        "correction/weight": (weight_N.sum(), count, "mean"),
        # The effective share of samples is weight^2 / weight_square.
        "correction/weight_square": (weight_N.square().sum(), count, "mean"),
        "correction/weight_max": (raw_N.max() if raw_N.numel() else raw_N.sum(), count, "max"),
        "correction/clipped": (outside_N.sum(), count, "mean"),
        # The engine sampled, so this estimates KL(rollout || old).
        "correction/kl": (kl_N.sum(), count, "mean"),
    }
