"""Compute the certificate of a policy: a lower bound of the reward of every policy within a KL, before any fine-tuning.

For every policy q and every lambda > 0, E_q r >= J_lambda(pi) - lambda KL(q || pi) with the robust objective
J_lambda = -lambda mean_x log E exp(-r / lambda) (Donsker and Varadhan). B(kappa) is the largest of these bounds over
lambda. For small lambda, J from samples is optimistic: J does not include outcomes that were not drawn.

Shape suffixes: P prompts, N samples of a prompt, L lambdas, K values of KL.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Certificate of a policy. robust_L: J of the judging half; error_L: standard error of robust_L over prompts.

    chosen_L: J of the choosing half.
    """

    lambdas_L: np.ndarray
    robust_L: np.ndarray
    error_L: np.ndarray
    chosen_L: np.ndarray
    confidence: float

    def bound(self, kl_K: np.ndarray) -> np.ndarray:
        """Return (K) lower confidence limits of B at each KL in nats. The samples that choose lambda are not used
        otherwise.
        """
        kl_K = np.asarray(kl_K, dtype=np.float64)
        best_K = np.argmax(self.chosen_L[:, None] - self.lambdas_L[:, None] * kl_K, axis=0)
        limit_L = self.robust_L - NormalDist().inv_cdf(self.confidence) * self.error_L
        return limit_L[best_K] - self.lambdas_L[best_K] * kl_K


def certify(rewards_PN: np.ndarray, lambdas: Sequence[float], confidence: float) -> Certificate:
    """Certify a policy from N >= 4 rewards of each of P >= 2 prompts. Even samples choose lambda, odd samples judge.

    J of a prompt is the jackknife estimate, whose bias is of order 1 / N^2. The limit is a normal limit over prompts.
    So the limit holds for the task, not only for these prompts. Raises ValueError for fewer samples or prompts, and for
    rewards that are not finite.
    """
    rewards_PN = np.asarray(rewards_PN, dtype=np.float64)
    if rewards_PN.ndim != 2 or rewards_PN.shape[0] < 2 or rewards_PN.shape[1] < 4:
        raise ValueError(f"a certificate needs at least 2 prompts with 4 samples each, given shape {rewards_PN.shape}")
    if not np.isfinite(rewards_PN).all():
        raise ValueError(f"{int((~np.isfinite(rewards_PN)).sum())} of {rewards_PN.size} rewards are missing or not "
                         "finite; a certificate needs finite rewards only")
    lambdas_L = np.asarray(lambdas, dtype=np.float64)
    chosen_LP, judged_LP = (np.stack([robust_rewards(half_PN, lam) for lam in lambdas_L])
                            for half_PN in (rewards_PN[:, ::2], rewards_PN[:, 1::2]))
    return Certificate(lambdas_L=lambdas_L, robust_L=judged_LP.mean(1), chosen_L=chosen_LP.mean(1),
                       error_L=judged_LP.std(1, ddof=1) / np.sqrt(judged_LP.shape[1]), confidence=confidence)


def robust_rewards(rewards_PN: np.ndarray, lam: float) -> np.ndarray:
    """Return (P) jackknife estimates of -lambda log E exp(-r / lambda)."""
    log_weight_PN, count = -rewards_PN / lam, rewards_PN.shape[1]
    # A sum without one sample adds the samples before it and the samples after it. Subtracting the sample from the
    # whole sum would lose the others where this sample dominates.
    before_PN = np.logaddexp.accumulate(log_weight_PN, axis=1)
    after_PN = np.logaddexp.accumulate(log_weight_PN[:, ::-1], axis=1)[:, ::-1]
    none_P1 = np.full((len(rewards_PN), 1), -np.inf)
    rest_PN = np.logaddexp(np.hstack([none_P1, before_PN[:, :-1]]), np.hstack([after_PN[:, 1:], none_P1]))
    whole_P, others_PN = -lam * (before_PN[:, -1] - np.log(count)), -lam * (rest_PN - np.log(count - 1))
    return count * whole_P - (count - 1) * others_PN.mean(1)
