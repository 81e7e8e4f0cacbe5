"""Remove FRPO's baseline, to measure the baseline's effect: every sample is pushed down, some of them more."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from frpo.objectives.base import GroupAdvantages
from frpo.objectives.frpo import FRPO


@dataclass(frozen=True, kw_only=True)
class WithoutBaseline:
    """Advantage A_i = -lam k c_i in place of lam (1 - k c_i): the same gradient in expectation, with more noise.

    A group whose rewards are all equal has advantages of 0, as for other estimators. Raises ValueError for lam <= 0.
    """

    name: ClassVar[str] = "frpo.lab.ablation:WithoutBaseline"
    lam: float = 0.5

    def __post_init__(self) -> None:
        FRPO(lam=self.lam, scale="exact")

    def advantages(self, rewards_G: np.ndarray) -> GroupAdvantages:
        found = FRPO(lam=self.lam, scale="exact").advantages(rewards_G)
        if not found.advantages_G.any():
            return found
        valid_G = np.isfinite(np.asarray(rewards_G, dtype=np.float64))
        return replace(found, advantages_G=np.where(valid_G, found.advantages_G - self.lam, 0.0))
