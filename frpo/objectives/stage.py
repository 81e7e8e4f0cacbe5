"""Turn scored groups into advantaged groups: whole groups, float64, on the controller.

The stage applies an estimator group by group and keeps each group's statistics. The formulas are in the estimators.

Shape suffixes: G completions of a group, T tokens of a completion.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from frpo.objectives.base import AdvantageEstimator, GroupAdvantages, Reweightable
from frpo.objectives.constraint import Mixture
from frpo.objectives.reduction import token_weights
from frpo.objectives.scalarise import Scalarised
from frpo.types import AdvantagedGroup, ScoredGroup

GroupLogprobs = Sequence[tuple[np.ndarray, ...] | None]
"""Per group, per completion: T log-probabilities under the reference; None where no reference pass was made."""

Scores = Sequence[tuple[np.ndarray, ...]]
"""Per group, per completion: T log-probabilities under a policy."""


def compute_advantages(groups: Sequence[ScoredGroup], estimator: AdvantageEstimator, references: GroupLogprobs,
                       kl_in_reward: float = 0.0, mixture: Mixture | None = None,
                       scalarised: Scalarised | None = None) -> list[AdvantagedGroup]:
    """Compute the advantages of every group.

    kl_in_reward: beta of the k1 estimate. beta * sum_t (log pi - log pi_ref) is subtracted from each reward before the
    estimator is called (as a loss, the gradient of this estimate would vanish in expectation). mixture: mixes the
    advantages of rewards with those of a constrained cost. scalarised: makes the numbers, over all of these groups,
    that take the place of the weighted sums of rewards.
    """
    scalars = [None] * len(groups) if scalarised is None else scalarised.of_batch(groups)
    result = []
    for scored, scalars_G, reference in zip(groups, scalars, references, strict=True):
        outcome = _outcome(scored, scalars_G, reference, kl_in_reward, mixture, estimator, _sampled)
        result.append(AdvantagedGroup(scored=scored, advantages_G=outcome.advantages_G, stats=outcome.stats,
                                      ref_logprobs=reference, scalars_G=scalars_G))
    return result


def reweighted(groups: Sequence[AdvantagedGroup], estimator: Reweightable, log_ratios: Sequence[np.ndarray],
               kl_in_reward: float = 0.0, mixture: Mixture | None = None) -> list[AdvantagedGroup]:
    """Return the same groups with advantages at the current policy, for an estimator of `require_reweightable`.

    log_ratios: per group (G,), as `sequence_log_ratios` returns them for the whole groups of one update. kl_in_reward,
    mixture: as for `compute_advantages`; the penalty is that at the policy that sampled.
    """
    result = []
    for group, log_ratio_G in zip(groups, log_ratios, strict=True):
        outcome = _outcome(group.scored, group.scalars_G, group.ref_logprobs, kl_in_reward, mixture, estimator,
                           partial(_reweighted, log_ratio_G))
        result.append(replace(group, advantages_G=outcome.advantages_G, stats=outcome.stats))
    return result


def sequence_log_ratios(groups: Sequence[AdvantagedGroup], current: Scores, old: Scores, *, reduction: str,
                        max_length: int, train_truncated: bool = True) -> list[np.ndarray]:
    """Compute log u_i = N sum_t weight_t (log pi - log pi_old)_t of every completion of one update, per group (G,).

    The weights are those of the policy loss (`token_weights`, N completions in all), so that the loss differentiates
    u_i. u_i is the sequence's ratio for "seq-sum", its geometric mean per token for "seq-mean-token-mean".
    Completions without a loss (empty, or cut off while train_truncated is False) have log u = 0.
    """
    masks = [[completion.loss_mask & (train_truncated or not completion.truncated)
              for completion in group.scored.group.completions] for group in groups]
    lengths_N = np.array([mask_T.sum() for group in masks for mask_T in group])
    weights = iter(lengths_N.size * token_weights(reduction, lengths_N, max_length))

    def difference(now_T: np.ndarray, then_T: np.ndarray, mask_T: np.ndarray) -> float:
        return float(np.sum(now_T[mask_T].astype(np.float64) - then_T[mask_T]))

    return [np.array([next(weights) * difference(*arrays) for arrays in zip(now, then, mask, strict=True)])
            for now, then, mask in zip(current, old, masks, strict=True)]


def require_reweightable(estimator: AdvantageEstimator) -> None:
    """Raise ValueError, with a remedy, unless the estimator can compute `reweighted` with its parameters."""
    if not (isinstance(estimator, Reweightable) and callable(estimator.reweighted)):
        raise ValueError(f"the estimator {estimator.name} has no method `reweighted`; use frpo")
    estimator.reweighted(np.zeros(2), np.zeros(2))


def sequence_kl(scored: ScoredGroup, reference: Sequence[np.ndarray]) -> np.ndarray:
    """Compute the k1 estimate of each completion's sequence KL to the reference in nats: shape G, of either sign."""
    differences = []
    for completion, ref_logprobs in zip(scored.group.completions, reference, strict=True):
        mask = completion.loss_mask
        differences.append(float(np.sum(completion.logprobs[mask] - ref_logprobs[mask])))
    return np.array(differences)


def _sampled(estimator: AdvantageEstimator, rewards_G: np.ndarray) -> GroupAdvantages:
    return estimator.advantages(rewards_G)


def _reweighted(log_ratio_G: np.ndarray, estimator: Reweightable, rewards_G: np.ndarray) -> GroupAdvantages:
    return estimator.reweighted(rewards_G, log_ratio_G)


def _outcome(scored: ScoredGroup, scalars_G: np.ndarray | None, reference: tuple[np.ndarray, ...] | None,
             kl_in_reward: float, mixture: Mixture | None, estimator: Any,
             estimate: Callable[[Any, np.ndarray], GroupAdvantages]) -> GroupAdvantages:
    """Estimate the advantages of one group. estimate: calls an estimator on rewards (G,)."""
    rewards_G = scored.rewards_G if scalars_G is None else scalars_G
    penalty_G = np.zeros(rewards_G.size)
    if kl_in_reward > 0:
        assert reference is not None, "KL in the reward needs log-probabilities under the reference"
        penalty_G = kl_in_reward * sequence_kl(scored, reference)
    if mixture is None:
        return estimate(estimator, rewards_G - penalty_G)
    rewards_G, negative_costs_G = mixture.streams(scored, rewards_G, penalty_G)
    return mixture.mixed(estimate(estimator, rewards_G), estimate(mixture.constraint.advantage, negative_costs_G))
