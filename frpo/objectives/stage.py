"""Scored groups to advantaged groups: whole groups, float64, on the controller.

It applies an estimator group by group and sums what the groups say of themselves; the formulas are the estimators'.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from frpo.objectives.base import AdvantageEstimator
from frpo.types import AdvantagedGroup, ScoredGroup

References = Sequence[tuple[np.ndarray, ...] | None]
"""Per group, per completion: T log-probabilities under the reference; None where no reference pass was made."""


def advantaged(groups: Sequence[ScoredGroup], estimator: AdvantageEstimator, references: References,
               kl_in_reward: float = 0.0) -> list[AdvantagedGroup]:
    """Advantages of every group.

    kl_in_reward: beta of the k1 estimate, beta * sum_t (log pi - log pi_ref), subtracted from each reward before the
    estimator sees it (its gradient as a loss would vanish in expectation).
    """
    result = []
    for scored, reference in zip(groups, references, strict=True):
        rewards_G = scored.rewards_G
        if kl_in_reward > 0:
            rewards_G = rewards_G - kl_in_reward * sequence_kl(scored, reference)
        outcome = estimator.advantages(rewards_G)
        result.append(AdvantagedGroup(
            scored=scored, advantages_G=outcome.advantages_G, stats=outcome.stats, ref_logprobs=reference))
    return result


def sequence_kl(scored: ScoredGroup, reference: tuple[np.ndarray, ...]) -> np.ndarray:
    """k1 estimate of each completion's sequence KL to the reference in nats: shape G, of either sign."""
    differences = []
    for completion, ref_logprobs in zip(scored.group.completions, reference, strict=True):
        mask = np.array(completion.loss_mask, dtype=bool)
        differences.append(float(np.sum(np.array(completion.logprobs)[mask] - ref_logprobs[mask])))
    return np.array(differences)
