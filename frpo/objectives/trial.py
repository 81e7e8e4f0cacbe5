"""Try an advantage estimator on made-up groups of rewards, before anything slow starts.

The trial finds an estimator that fails, returns another type, too few numbers, or numbers that are not finite. It
cannot check whether the formula is right.
"""
from __future__ import annotations

import traceback
from typing import Any

import numpy as np

from frpo.objectives.base import AdvantageEstimator, GroupAdvantages

TOLERANCE = 1e-6


def made_up(size: int) -> dict[str, np.ndarray]:
    """Return groups of `size` rewards by description."""
    graded = np.linspace(0.0, 1.0, size)
    return {"different rewards": graded, "equal rewards": np.ones(size),
            "a missing reward (NaN)": np.where(np.arange(size) == 0, np.nan, graded),
            "a single reward, the others missing (NaN)": np.where(np.arange(size) == 0, 1.0, np.nan)}


def try_estimator(estimator: AdvantageEstimator, size: int) -> list[str]:
    """Call the estimator on groups of `size` rewards. Returns a note if the advantages of a group do not sum to 0.

    Raises ValueError naming the estimator, the group, what is wrong and what to return.
    """
    sums = {case: _advantages(estimator, case, rewards_G).sum() for case, rewards_G in made_up(size).items()}
    worst = max(sums, key=lambda case: abs(sums[case]))
    if abs(sums[worst]) < TOLERANCE * size:
        return []
    return [f"note: advantage {estimator.name}: the advantages of a group sum to {sums[worst]:g} for {worst}, not to "
            "0, so that all completions of a group are made likelier or less likely together; subtract their mean, "
            "unless this is meant"]


def _advantages(estimator: AdvantageEstimator, case: str, rewards_G: np.ndarray) -> np.ndarray:
    about = f"advantage {estimator.name}: advantages(rewards_G), called with {rewards_G.size} made-up numbers, {case},"
    try:
        outcome: Any = estimator.advantages(rewards_G.copy())
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(f"{about} fails in {frame.filename}, line {frame.lineno}: {type(error).__name__}: {error}"
                         ) from error
    if not isinstance(outcome, GroupAdvantages):
        raise ValueError(f"{about} returns {type(outcome).__name__}; return GroupAdvantages(advantages_G=...), such as "
                         "valid_rewards(rewards_G).scatter(formula) (frpo.objectives.base)")
    advantages_G = np.asarray(outcome.advantages_G)
    if advantages_G.shape != rewards_G.shape:
        raise ValueError(f"{about} returns advantages of shape {advantages_G.shape}; return one number for each "
                         f"reward, shape {rewards_G.shape}")
    if not np.isfinite(advantages_G).all():
        raise ValueError(f"{about} returns {advantages_G.tolist()}; return finite numbers")
    if advantages_G[np.isnan(rewards_G)].any():
        raise ValueError(f"{about} returns {advantages_G.tolist()}; return 0 for a completion without a reward")
    return advantages_G
