"""Compute the loss of a policy: a surrogate, corrected for the engine that sampled, and a KL term to the reference.

The caller passes advantages and weights; there is no group logic, no division and no collective here. Robustness
needs no further code: at ratio 1 the gradient is that of FRPO's objective, and at other ratios the clipped surrogate is
a lower bound.

Shape suffix: N tokens.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from frpo.objectives.base import LossInputs, LossOutput, PolicyTokens, Surrogate, TokenObjective
from frpo.objectives.clip import Clip
from frpo.objectives.correction import RolloutCorrection
from frpo.objectives.ops import k2, k3, keep, without_gradient
from frpo.objectives.registry import require_one_of
from frpo.types import Metrics

if TYPE_CHECKING:
    from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3", "full"]
KL_IN_LOSS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k2": k2, "k3": k3}


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """Sum over tokens of -policy_weight * correction * surrogate's objective + kl_coef * kl_weight * KL.

    `kl_estimator` sets the KL against the reference: "k2" and "k3" estimate it from the sampled token, "full" is
    KL(pi || pi_ref) over the whole vocabulary. With "k1" the KL was subtracted from the rewards, so the loss has no KL
    term. The correction (None: none) weighs the policy term only. A token that is masked out, or whose weight is zero,
    contributes exactly zero to loss and gradient, even if its log-probs are NaN.

    Raises ValueError for values outside these ranges, and for a call without the log-probs that the loss needs.
    """

    surrogate: Surrogate = field(default_factory=Clip)
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    correction: RolloutCorrection | None = None

    def __post_init__(self) -> None:
        if not self.kl_coef >= 0:
            raise ValueError(f"kl_coef must be >= 0, given {self.kl_coef}")
        require_one_of("kl_estimator", self.kl_estimator, get_args(KLEstimator))

    @property
    def whole_sequences(self) -> bool:
        """Check whether the loss needs all tokens of a sequence at once; otherwise any slice of the tokens will do."""
        return self.surrogate.whole_sequences or (self.correction is not None and self.correction.whole_sequences)

    @property
    def needs_states(self) -> bool:
        """Check whether the reference must run beside the policy; its log-probs of sampled tokens are not enough."""
        return self.kl_coef > 0 and self.kl_estimator == "full"

    def __call__(self, inputs: LossInputs) -> LossOutput:
        live_N = inputs.mask_N & (inputs.policy_weight_N != 0)
        weight_N, metrics = self._weights(inputs, live_N)
        objective = self.surrogate.objective(_policy_tokens(inputs, live_N, weight_N))
        loss_sum = -(weight_N * objective.objective_N).sum()
        if self.kl_coef > 0 and self.kl_estimator != "k1":
            live_N = inputs.mask_N & (inputs.kl_weight_N != 0)
            kl_N = keep(live_N, inputs.kl_weight_N) * self._kl(inputs, live_N)
            loss_sum = loss_sum + self.kl_coef * kl_N.sum()
        return LossOutput(loss_sum=loss_sum, metrics=_metrics(inputs, objective) | metrics)

    def _weights(self, inputs: LossInputs, live_N: Tensor) -> tuple[Tensor, Metrics]:
        """Return the corrected policy weights of live tokens, and the correction's metrics."""
        weight_N = keep(live_N, inputs.policy_weight_N)
        if self.correction is None:
            return weight_N, {}
        if inputs.rollout_logprobs_N is None:
            raise ValueError("a rollout correction needs rollout_logprobs_N, given None")
        correction_N, metrics = self.correction.weights(
            inputs.anchor_N.detach(), inputs.rollout_logprobs_N, live_N, inputs.sequence_N)
        return weight_N * correction_N, metrics

    def _kl(self, inputs: LossInputs, live_N: Tensor) -> Tensor:
        full = self.kl_estimator == "full"
        needed, values_N = ("kl_N", inputs.kl_N) if full else ("ref_logprobs_N", inputs.ref_logprobs_N)
        if values_N is None:
            raise ValueError(
                f"kl_coef = {self.kl_coef} with kl_estimator {self.kl_estimator!r} needs {needed}, given None")
        if full:
            return keep(live_N, values_N)
        return KL_IN_LOSS[self.kl_estimator](keep(live_N, inputs.logprobs_N), keep(live_N, values_N))


def _policy_tokens(inputs: LossInputs, live_N: Tensor, weight_N: Tensor) -> PolicyTokens:
    """Make the surrogate's input. Only tokens with a weight after correction keep an advantage.

    All live tokens keep their ratios.
    """
    advantage_N = keep(live_N & (weight_N != 0), inputs.advantage_N)
    return PolicyTokens(
        logprobs_N=keep(advantage_N != 0, inputs.logprobs_N),
        log_ratio_N=keep(live_N, inputs.logprobs_N) - keep(live_N, inputs.anchor_N),
        advantage_N=advantage_N, live_N=live_N, sequence_N=inputs.sequence_N)


@without_gradient
def _metrics(inputs: LossInputs, objective: TokenObjective) -> Metrics:
    """Compute metrics over tokens with a loss and a weight. Tokens that only pad micro-batches do not count."""
    live_N = inputs.mask_N & ((inputs.policy_weight_N != 0) | (inputs.kl_weight_N != 0))
    count = live_N.sum()
    logprobs_N = keep(live_N, inputs.logprobs_N)
    old_logprobs_N = keep(live_N, inputs.anchor_N)
    ratio_N = keep(live_N, (logprobs_N - old_logprobs_N).exp())
    metrics: Metrics = {
        "policy/ratio": (ratio_N.sum(), count, "mean"),
        "policy/ratio_max": (ratio_N.max() if ratio_N.numel() else ratio_N.sum(), count, "max"),
        "policy/clip_low": (objective.low_N.sum(), count, "mean"),
        "policy/clip_high": (objective.high_N.sum(), count, "mean"),
        # The old policy sampled, so this estimates KL(old || current).
        "policy/kl_old": (k3(old_logprobs_N, logprobs_N).sum(), count, "mean"),
    }
    kl_N = None
    if inputs.kl_N is not None:
        kl_N = keep(live_N, inputs.kl_N)
    elif inputs.ref_logprobs_N is not None:
        kl_N = k3(logprobs_N, keep(live_N, inputs.ref_logprobs_N))
    if kl_N is not None:
        metrics["policy/kl_ref"] = (kl_N.sum(), count, "mean")
        if inputs.kl_metric_weight_N is not None:
            watched_N = live_N & (inputs.kl_metric_weight_N != 0)
            metrics["policy/kl_sequence"] = (keep(watched_N, kl_N).sum(), inputs.kl_metric_weight_N.sum(), "mean")
    return metrics
