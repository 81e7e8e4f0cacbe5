"""The clipped policy-gradient loss with frozen advantages, and its KL term to the reference.

Advantages and weights come from outside; there is no group logic, no division and no collective here. Robustness
needs nothing more: at ratio 1 the gradient is that of FRPO's objective, and off it the surrogate is a lower bound.

Shape suffix: N tokens.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from frpo.objectives.base import LossInputs, LossOutput, Metrics, require_one_of
from frpo.objectives.ops import k2, k3

KLEstimator = Literal["k1", "k2", "k3"]
KL_IN_LOSS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k2": k2, "k3": k3}


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """Sum over tokens of -policy_weight * min(ratio A, clip(ratio) A) + kl_coef * kl_weight * KL.

    clip(ratio) = clip(ratio, 1 - clip_low, 1 + clip_high).
    ratio = exp(logprobs - old_logprobs) (PPO, eq. 7). KL is `kl_estimator` against the reference; "k1" says that it was
    subtracted from the rewards, so that the loss has no KL term. A token that is masked out, or whose weight is zero,
    contributes exactly zero to loss and gradient even where its log-probs are NaN.

    Raises ValueError for values outside these ranges, and when called without the reference log-probs that it needs.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"

    def __post_init__(self) -> None:
        if not 0 < self.clip_low < 1:
            raise ValueError(f"clip_low must be in (0, 1), given {self.clip_low}")
        if not self.clip_high > 0:
            raise ValueError(f"clip_high must be > 0, given {self.clip_high}")
        if not self.kl_coef >= 0:
            raise ValueError(f"kl_coef must be >= 0, given {self.kl_coef}")
        require_one_of("kl_estimator", self.kl_estimator, get_args(KLEstimator))

    def __call__(self, inputs: LossInputs) -> LossOutput:
        loss_sum = self._policy_sum(inputs)
        if self.kl_coef > 0 and self.kl_estimator in KL_IN_LOSS:
            loss_sum = loss_sum + self.kl_coef * self._kl_sum(inputs)
        return LossOutput(loss_sum=loss_sum, metrics=self._metrics(inputs))

    def _policy_sum(self, inputs: LossInputs) -> Tensor:
        # An advantage of zero has no gradient, but would meet an overflowing ratio as 0 * inf.
        live_N = inputs.mask_N & (inputs.policy_weight_N != 0) & (inputs.advantage_N != 0)
        log_ratio_N = _keep(live_N, inputs.logprobs_N) - _keep(live_N, inputs.old_logprobs_N)
        advantage_N = _keep(live_N, inputs.advantage_N)
        low_N, high_N = self._clipped(log_ratio_N.detach(), advantage_N)
        # Clipped tokens leave the graph before exp: their gradient would be 0 * inf if the ratio overflowed.
        ratio_N = torch.exp(_keep(~(low_N | high_N), log_ratio_N))
        ratio_N = torch.where(low_N, 1 - self.clip_low, torch.where(high_N, 1 + self.clip_high, ratio_N))
        return -(_keep(live_N, inputs.policy_weight_N) * ratio_N * advantage_N).sum()

    def _clipped(self, log_ratio_N: Tensor, advantage_N: Tensor) -> tuple[Tensor, Tensor]:
        """Where the min of the two surrogates is the clipped one: below (A < 0) and above (A > 0)."""
        ratio_N = log_ratio_N.exp()
        low_N = (advantage_N < 0) & (ratio_N < 1 - self.clip_low)
        high_N = (advantage_N > 0) & (ratio_N > 1 + self.clip_high)
        return low_N, high_N

    def _kl_sum(self, inputs: LossInputs) -> Tensor:
        if inputs.ref_logprobs_N is None:
            raise ValueError(
                f"kl_coef = {self.kl_coef} with kl_estimator {self.kl_estimator!r} needs ref_logprobs_N, given None")
        live_N = inputs.mask_N & (inputs.kl_weight_N != 0)
        kl_N = KL_IN_LOSS[self.kl_estimator](_keep(live_N, inputs.logprobs_N), _keep(live_N, inputs.ref_logprobs_N))
        return (_keep(live_N, inputs.kl_weight_N) * kl_N).sum()

    @torch.no_grad()
    def _metrics(self, inputs: LossInputs) -> Metrics:
        """Over tokens with a loss and a weight: tokens that only pad a rank's micro-batches do not count."""
        live_N = inputs.mask_N & ((inputs.policy_weight_N != 0) | (inputs.kl_weight_N != 0))
        count = live_N.sum()
        logprobs_N = _keep(live_N, inputs.logprobs_N)
        old_logprobs_N = _keep(live_N, inputs.old_logprobs_N)
        log_ratio_N = logprobs_N - old_logprobs_N
        ratio_N = _keep(live_N, log_ratio_N.exp())
        low_N, high_N = self._clipped(log_ratio_N, _keep(live_N, inputs.advantage_N))
        metrics: Metrics = {
            "policy/ratio": (ratio_N.sum(), count, "mean"),
            "policy/ratio_max": (ratio_N.max() if ratio_N.numel() else ratio_N.sum(), count, "max"),
            "policy/clip_low": (low_N.sum(), count, "mean"),
            "policy/clip_high": (high_N.sum(), count, "mean"),
            # The old policy sampled, so this estimates KL(old || current).
            "policy/kl_old": (k3(old_logprobs_N, logprobs_N).sum(), count, "mean"),
        }
        if inputs.ref_logprobs_N is not None:
            kl_N = k3(logprobs_N, _keep(live_N, inputs.ref_logprobs_N))
            metrics["policy/kl_ref"] = (kl_N.sum(), count, "mean")
        return metrics


def _keep(live_N: Tensor, values_N: Tensor) -> Tensor:
    """The values of live tokens and 0 elsewhere, by selection: multiplying by a mask would keep NaN and inf."""
    return torch.where(live_N, values_N, torch.zeros_like(values_N))
