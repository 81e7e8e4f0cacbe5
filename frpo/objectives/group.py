"""Define the baselines without robustness: GRPO, Dr. GRPO and RLOO advantages of a group.

All three are a centred reward and differ by a factor. There is no value model and no normalisation over the batch.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from frpo.objectives.base import GroupAdvantages, estimator, valid_rewards


@estimator("grpo")
@dataclass(frozen=True, kw_only=True)
class GRPO:
    """Advantage A_i = (r_i - mean r) / (std r + eps), with std over k - 1 as in TRL (DeepSeekMath, eq. 4.1.2).

    Raises ValueError unless eps >= 0.
    """

    eps: float = 1e-4

    def __post_init__(self) -> None:
        if not self.eps >= 0:
            raise ValueError(f"eps must be >= 0, given {self.eps}")

    def advantages(self, rewards_G: np.ndarray) -> GroupAdvantages:
        return valid_rewards(rewards_G).scatter(lambda r_K: (r_K - r_K.mean()) / (r_K.std(ddof=1) + self.eps))


@estimator("dr_grpo")
@dataclass(frozen=True, kw_only=True)
class DrGRPO:
    """Advantage A_i = r_i - mean r ("Understanding R1-Zero-like training"): FRPO's plug-in limit for lam -> inf."""

    def advantages(self, rewards_G: np.ndarray) -> GroupAdvantages:
        return valid_rewards(rewards_G).scatter(lambda r_K: r_K - r_K.mean())


@estimator("rloo")
@dataclass(frozen=True, kw_only=True)
class RLOO:
    """Advantage A_i = r_i - mean of the others ("Back to basics"): FRPO's jackknife limit for lam -> inf."""

    def advantages(self, rewards_G: np.ndarray) -> GroupAdvantages:
        return valid_rewards(rewards_G).scatter(lambda r_K: (r_K - r_K.mean()) * r_K.size / (r_K.size - 1))
