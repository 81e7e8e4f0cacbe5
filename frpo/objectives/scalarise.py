"""Make one number of several rewards by their place within the group, before any advantage estimator.

A weighted sum gives many combinations of rewards the same number, and a reward of a wide range hides the others. Here
each reward m is first standardised within its group of G completions, over those that have a value:

    Z_m  = (r_m - mean) / (std + 1e-4)                  std over k - 1
    gdpo   P = sum_m w_m Z_m,  (P - mean P) / (std P + 1e-4) over the completions of the batch
    rvpo   -(1 / k) log(sum_m w_m exp(-k Z_m) / sum_m w_m)

gdpo is GDPO (arXiv:2601.05242) as TRL computes it (normalize_then_sum). rvpo is RVPO (arXiv:2605.05750), for equal
weights as published: for small k the mean, for large k the worst reward; no step over the batch follows. With the
estimator `given` the results are the advantages; with any other, such as frpo, they are its rewards.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from frpo.objectives.base import GroupAdvantages, estimator, valid_rewards
from frpo.objectives.registry import Registry
from frpo.types import ScoredGroup

EPS = 1e-4


@runtime_checkable
class Scalariser(Protocol):
    """Function of the rewards of a group -> one number for each completion, and a last step over the batch."""

    name: ClassVar[str]

    def of_group(self, terms: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray: ...

    def over_batch(self, groups: Sequence[np.ndarray]) -> list[np.ndarray]: ...


SCALARISERS = Registry("scalariser", "of_group(terms, weights)")
scalariser = SCALARISERS.register


@dataclass(frozen=True, kw_only=True)
class Scalarised:
    """A scalariser with the weights of the run's rewards. Rewards of weight 0 do not take part."""

    scalariser: Scalariser
    weights: Mapping[str, float]

    def check(self) -> None:
        """Raise ValueError unless there are two rewards to weigh, for rvpo all of positive weight."""
        if len(self.weights) < 2:
            raise ValueError(f"objective.scalarise needs at least two rewards whose weight is not 0, given "
                             f"{', '.join(self.weights) or 'none'}; add a reward or set scalarise to null")
        below = [name for name, weight in self.weights.items() if weight < 0]
        if below and isinstance(self.scalariser, RVPO):
            raise ValueError(f"objective.scalarise: rvpo needs weights above 0, given {self.weights[below[0]]:g} for "
                             f"reward {below[0]!r}; return the negative reward from its function and negate the weight")

    def of_group(self, scored: ScoredGroup) -> np.ndarray:
        """Return one number for each completion of a group (G,), before the step over the batch."""
        return self.scalariser.of_group(scored.terms, self.weights)

    def of_batch(self, groups: Sequence[ScoredGroup]) -> list[np.ndarray]:
        """Return one number for each completion of each group; NaN for a completion on which every reward abstained."""
        return self.scalariser.over_batch([self.of_group(scored) for scored in groups])


@scalariser("gdpo")
@dataclass(frozen=True, kw_only=True)
class GDPO:
    """Weighted sum of standardised rewards, standardised again over the batch."""

    def of_group(self, terms: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
        """Return P (G,): a reward that abstained adds nothing; NaN if all abstained."""
        z_MG = _standardised(terms, weights)
        w_M1 = np.array(list(weights.values()))[:, None]
        return np.where(np.isnan(z_MG).all(axis=0), np.nan, np.nansum(w_M1 * z_MG, axis=0))

    def over_batch(self, groups: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Standardise the numbers of all completions of the batch together."""
        known_N = np.concatenate([values_G[~np.isnan(values_G)] for values_G in groups])
        if known_N.size < 2:
            return list(groups)
        return [(values_G - known_N.mean()) / (known_N.std(ddof=1) + EPS) for values_G in groups]


@scalariser("rvpo")
@dataclass(frozen=True, kw_only=True)
class RVPO:
    """Soft minimum over standardised rewards, which punishes a completion for its worst one.

    k: sharpness. A reward that abstained does not take part. Raises ValueError unless k > 0.
    """

    k: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.k < math.inf:
            raise ValueError(f"k must be above 0 and finite, given {self.k}")

    def of_group(self, terms: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
        """Return the soft minimum (G,); NaN if every reward abstained."""
        z_MG, w_M1 = _standardised(terms, weights), np.array(list(weights.values()))[:, None]
        known_MG = ~np.isnan(z_MG)
        weights_MG = np.where(known_MG, w_M1, 0.0)
        worst_G = np.where(known_MG, z_MG, np.inf).min(axis=0)  # taken out of the exponents, which could overflow
        with np.errstate(divide="ignore", invalid="ignore"):
            shares_MG = np.where(known_MG, weights_MG * np.exp(-self.k * (z_MG - worst_G)), 0.0)
            soft_G = worst_G - np.log(shares_MG.sum(axis=0) / weights_MG.sum(axis=0)) / self.k
        return np.where(known_MG.any(axis=0), soft_G, np.nan)

    def over_batch(self, groups: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the numbers as they are."""
        return list(groups)


@estimator("given")
@dataclass(frozen=True, kw_only=True)
class Given:
    """Advantage A_i = r_i: for rewards that are advantages already, such as those of gdpo."""

    def advantages(self, rewards_G: np.ndarray) -> GroupAdvantages:
        return valid_rewards(rewards_G).scatter(lambda r_K: r_K)


def _standardised(terms: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Return Z (M, G). A reward with fewer than two values in the group is missing: it compares nothing."""
    return np.array([_standard(terms[name]) for name in weights])


def _standard(values_G: np.ndarray) -> np.ndarray:
    known_K = values_G[np.isfinite(values_G)]
    if known_K.size < 2:
        return np.full(values_G.size, np.nan)
    z_G = (values_G - known_K.mean()) / (known_K.std(ddof=1) + EPS)
    return np.where(np.isfinite(values_G), z_G, np.nan)
