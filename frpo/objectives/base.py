"""Define the protocols of an objective, their inputs and outputs, and the treatment of missing rewards in a group.

Estimators turn the rewards of one group into advantages (float64, controller). Surrogates turn log-ratios and
advantages into per-token objectives, and a token loss turns flat tensors into a sum (learner). No formula of any
objective is here, and no type here depends on batches, ranks or padding.

Shape suffixes: G samples of a group, K valid ones among them, N tokens with or without a loss.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from frpo.errors import RewardError
from frpo.objectives.registry import Registry
from frpo.types import LARGEST_REWARD, Metrics

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GroupAdvantages:
    """Advantages of one group (float64, in units of the reward times the estimator's scale) and their statistics.

    stats always holds "zero_advantage" (1.0 if every advantage is 0), "abstained" (number of NaN rewards) and "invalid"
    (number of infinite rewards).
    """

    advantages_G: np.ndarray
    stats: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class AdvantageEstimator(Protocol):
    """Function of one whole group's rewards -> advantages.

    `build_estimator` rebuilds the estimator from `name` and its dataclass fields.
    """

    name: ClassVar[str]

    def advantages(self, rewards_G: np.ndarray) -> GroupAdvantages: ...


@runtime_checkable
class Reweightable(AdvantageEstimator, Protocol):
    """Estimator that can also compute the advantages at the current policy for samples of an older policy."""

    def reweighted(self, rewards_G: np.ndarray, log_ratio_G: np.ndarray) -> GroupAdvantages: ...


@runtime_checkable
class Valued(AdvantageEstimator, Protocol):
    """Estimator whose objective is not the mean reward; its advantages are the gradient of `value`."""

    def value(self, rewards_G: np.ndarray) -> float: ...


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """Flat tensors over N tokens. Log-probs are those of the sampled token under the tempered policy, in nats.

    Only `logprobs_N` and `kl_N` require grad. `old_logprobs_N` is None if the current policy is the policy before the
    first update. `ref_logprobs_N` is None if no reference was run. `rollout_logprobs_N` (of the engine that sampled) is
    None if they are not needed. `mask_N` is True for a token with a loss. The weights are already divided (by length,
    by the global number of sequences), so a loss only sums. `kl_N` is KL(pi || pi_ref) over the whole vocabulary, if
    the reference was run beside the policy. `kl_metric_weight_N` is 1 / T at the tokens of sequences whose KL counts
    in the mean of a sequence. `sequence_N` (int64) is the index of the token's sequence within the micro-batch; the
    tokens of a sequence follow each other.
    """

    logprobs_N: Tensor
    old_logprobs_N: Tensor | None
    ref_logprobs_N: Tensor | None
    rollout_logprobs_N: Tensor | None
    advantage_N: Tensor
    policy_weight_N: Tensor
    kl_weight_N: Tensor
    mask_N: Tensor
    sequence_N: Tensor
    kl_N: Tensor | None = None
    kl_metric_weight_N: Tensor | None = None

    def __post_init__(self) -> None:
        tensors = [getattr(self, f.name) for f in dataclasses.fields(self)]
        shapes = {tuple(tensor.shape) for tensor in tensors if tensor is not None}
        assert len(shapes) == 1, f"all tensors of LossInputs must have one shape, given {shapes}"

    @property
    def anchor_N(self) -> Tensor:
        """Log-probs in the denominator of a ratio: the old ones, or without them the current ones, detached."""
        return self.logprobs_N.detach() if self.old_logprobs_N is None else self.old_logprobs_N


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """Scalar for the backward pass, and detached sums that telemetry divides once."""

    loss_sum: Tensor
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class PolicyTokens:
    """Input of a surrogate for N tokens. Invalid numbers of tokens that do not count are already replaced by 0.

    live_N: whether the token has a loss and a weight. log_ratio_N: log pi - log pi_old if live, else 0.
    advantage_N: 0 also for a live token from which nothing is to be learned. The objective must be 0 at an advantage of
    0 even if the ratio overflows. logprobs_N: log pi if the advantage is not 0, else 0. Log-probs and log-ratios
    require grad.
    """

    logprobs_N: Tensor
    log_ratio_N: Tensor
    advantage_N: Tensor
    live_N: Tensor
    sequence_N: Tensor


@dataclass(frozen=True, kw_only=True)
class TokenObjective:
    """Output of a surrogate for N tokens: the objective to maximise, and masks of clipping from below and above.

    Nothing is weighted or summed yet. If the advantage is 0, the objective is 0 and not clipped.
    """

    objective_N: Tensor
    low_N: Tensor
    high_N: Tensor


@runtime_checkable
class Surrogate(Protocol):
    """Function of log-ratios and advantages -> objective of every token; rebuilt from `name` and its dataclass fields.

    whole_sequences: True if the objective of a token depends on other tokens of its sequence. A learner must then not
    evaluate the surrogate on arbitrary pieces of a micro-batch.
    """

    name: ClassVar[str]
    whole_sequences: ClassVar[bool]

    def objective(self, tokens: PolicyTokens) -> TokenObjective: ...


@dataclass(frozen=True, kw_only=True)
class ValidRewards:
    """The K finite rewards of a group and their places among its G samples."""

    rewards_K: np.ndarray
    mask_G: np.ndarray
    abstained: int
    invalid: int

    @property
    def flat(self) -> bool:
        """Check whether there is nothing to compare: fewer than two rewards, or all of them equal."""
        return self.rewards_K.size < 2 or self.rewards_K.max() == self.rewards_K.min()

    def scatter(self, formula: Callable[[np.ndarray], np.ndarray],
                stats: Mapping[str, float] | None = None) -> GroupAdvantages:
        """Put the advantages formula(rewards_K) at their places, and 0 elsewhere.

        A flat group gets advantages of 0; the formula is not called for it.
        """
        advantages_G = np.zeros(self.mask_G.size)
        if not self.flat:
            advantages_G[self.mask_G] = formula(self.rewards_K)
        counts = {"zero_advantage": float(not advantages_G.any()),
                  "abstained": float(self.abstained), "invalid": float(self.invalid)}
        return GroupAdvantages(advantages_G=advantages_G, stats={**counts, **(stats or {})})


def estimator_of(value: Any) -> AdvantageEstimator:
    """Return the estimator that a recipe holds, as an object or as a mapping with its name and keys.

    Raises ValueError for another value.
    """
    if (given := ADVANTAGES.given(value)) is not None:
        return given
    if not isinstance(value, dict):
        raise ValueError(f"a mapping such as {{name: frpo, lam: 1.0}} is needed, given {value!r}")
    return build_estimator(value)


def valid_rewards(rewards_G: np.ndarray) -> ValidRewards:
    """Take NaN (abstained; None counts as NaN) and infinite (invalid) rewards out of a group.

    Raises ValueError unless the rewards are one-dimensional, RewardError for a reward beyond LARGEST_REWARD.
    """
    rewards_G = np.asarray(rewards_G, dtype=np.float64)
    if rewards_G.ndim != 1:
        raise ValueError(f"rewards of one group must be one-dimensional, given shape {rewards_G.shape}")
    mask_G = np.isfinite(rewards_G)
    rewards_K = rewards_G[mask_G]
    if (np.abs(rewards_K) > LARGEST_REWARD).any():
        raise RewardError(f"a group has the rewards {rewards_G.tolist()}; allowed is -{LARGEST_REWARD:g} to "
                          f"{LARGEST_REWARD:g}, because their squares must be finite; scale the rewards down")
    return ValidRewards(rewards_K=rewards_K, mask_G=mask_G,
                        abstained=int(np.isnan(rewards_G).sum()), invalid=int(np.isinf(rewards_G).sum()))


ADVANTAGES = Registry("advantage", "advantages(rewards_G)")
SURROGATES = Registry("surrogate", "objective(tokens)", flags={"whole_sequences": (True, False)})

estimator, estimators, build_estimator = ADVANTAGES.register, ADVANTAGES.classes, ADVANTAGES.build
"""Functions for advantage estimators: register one under a name, list all by name, build one from a recipe's values."""

surrogate, surrogates, build_surrogate = SURROGATES.register, SURROGATES.classes, SURROGATES.build
"""The same functions for surrogates."""
