"""Compute FRPO's robust group advantage, its jackknife, and statistics of the tilt.

FRPO maximises J = -lam * E_x log E_y exp(-r / lam), the worst expected reward over a KL ball of policies (FRPO paper;
here from the dual and its gradient). With p = softmax(-r / lam) over the k valid samples of a group:

    plug-in    c_i = p_i
    jackknife  c_i = k p_i - (k - 1)/k * sum_{j != i} P(-j)_i,     P(-j) = softmax(-r / lam) without sample j
    advantage  A_i = s (1 - k c_i),   s = lam ("exact"), 1 ("unit", the paper), max(lam, 1) ("max1", the authors' code)

A low reward has a large c_i and so a negative advantage; sum c_i = 1, sum A_i = 0. There is no inner loop and no
learned dual variable. The loss applies ratio and clipping.

Shape suffixes: G samples of a group, K valid ones, KK one row per left-out sample.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from frpo.objectives.base import GroupAdvantages, estimator, valid_rewards
from frpo.objectives.registry import require_one_of

Estimate = Literal["jackknife", "plugin"]
Scale = Literal["exact", "unit", "max1"]
Guard = Literal["none", "shrink"]


@estimator("frpo")
@dataclass(frozen=True, kw_only=True)
class FRPO:
    """Robust advantages of a group.

    lam: temperature in units of the reward; a small lam is pessimistic. float("inf") is the limit without robustness:
        r - mean (plug-in, Dr. GRPO) or r_i - mean of the others (jackknife, RLOO). This limit has no "unit" scale.
    estimator: the jackknife removes the O(1/k) optimism of the plug-in.
    scale: factor of the advantages: "exact" is lam, the gradient of the objective; "unit" is 1, as in the paper; "max1"
        is max(lam, 1), as in the authors' code.
    guard: "shrink" moves the jackknife's coefficients towards p until none is negative. Without this guard, if one
        sample dominates, the second worst sample gets the largest positive advantage.
    rho: radius in nats, instead of lam (then unused): each group solves KL(p || uniform) = rho for its own lam.
        For rho >= log(k / m), with m ties at the worst reward, lam is 0 and p is uniform over the worst samples. The
        objective is then the worst reward itself, which no probability changes. So the "exact" scale gives advantages
        of 0; the other scales give 1 - k/m to the worst samples and 1 to the rest.

    Raises ValueError for other values.
    """

    lam: float = 1.0
    estimator: Estimate = "jackknife"
    scale: Scale = "max1"
    guard: Guard = "none"
    rho: float | None = None

    def __post_init__(self) -> None:
        require_one_of("estimator", self.estimator, get_args(Estimate))
        require_one_of("scale", self.scale, get_args(Scale))
        require_one_of("guard", self.guard, get_args(Guard))
        if not self.lam > 0:
            raise ValueError(f"lam must be > 0, given {self.lam}")
        if self.rho is None and math.isinf(self.lam) and self.scale == "unit":
            raise ValueError("lam = inf with scale 'unit' makes every advantage 0; use scale 'exact' or 'max1'")
        if self.rho is not None and not 0 < self.rho < math.inf:
            raise ValueError(f"rho must be > 0 and finite, given {self.rho}")
        if self.rho is not None and self.estimator == "jackknife":
            raise ValueError("rho needs plug-in weights to compute lam: set estimator to 'plugin', given 'jackknife'")

    def advantages(self, rewards_G: np.ndarray) -> GroupAdvantages:
        """Compute advantages (G,) from the rewards of a group (G,), NaN for a missing reward.

        stats: statistics of the tilt, unless no reward is valid.
        """
        valid = valid_rewards(rewards_G)
        if valid.rewards_K.size == 0:
            return valid.scatter(np.zeros_like)
        lam = self.lam if self.rho is None else temperature_of_radius(valid.rewards_K, self.rho)
        tilted = self._tilted(valid.rewards_K, lam)
        c_K = self._coefficients(tilted)
        return valid.scatter(lambda rewards_K: self._scaled(rewards_K, c_K, lam), self._stats(tilted, c_K))

    def value(self, rewards_G: np.ndarray) -> float:
        """Estimate the group's objective -lam log E exp(-r / lam); with rho the worst mean reward within the radius.

        The jackknife may leave the range of the rewards. It is raised to the worst reward, which bounds the objective.
        NaN if no reward is valid.
        """
        rewards_K = valid_rewards(rewards_G).rewards_K
        if rewards_K.size == 0:
            return math.nan
        if self.rho is not None:
            return float(tilt(rewards_K, temperature_of_radius(rewards_K, self.rho))[0] @ rewards_K)
        tilted = self._tilted(rewards_K, self.lam)
        return max(tilted.jackknife_certainty_equivalent(), float(rewards_K.min()))

    def reweighted(self, rewards_G: np.ndarray, log_ratio_G: np.ndarray) -> GroupAdvantages:
        """Compute advantages at the current policy for samples of an older policy, exact for the objective's estimate.

        log_ratio_G (G,): log u_i, where u_i is the ratio of sample i under the policy's reduction (seq-sum:
        log pi(y_i) - log pi_old(y_i)). The loss is s (Phi(log u - r / lam) - mean u), where Phi is the group's
        log-mean-exp or its jackknife. Its gradient is -(1/k) sum_i A_i grad log u_i with A_i = s (u_i - k c_i), where c
        are the coefficients of r_i - lam log u_i. At log u = 0 the results equal `advantages` to the bit. A flat group
        keeps advantages of 0: there is nothing to compare.

        stats: those of `advantages`, and "ratio" (mean u), "ratio_max", "reweighted_ess" (1 / sum p^2 with the ratios).
        Raises ValueError for lam = inf, with rho, and for log-ratios that are not finite or of another shape.
        """
        if self.rho is not None or math.isinf(self.lam):
            given = f"lam = {self.lam}" if self.rho is None else f"rho = {self.rho}"
            raise ValueError(f"reweighted advantages need a finite lam and no rho, given {given}")
        valid, log_ratio_G = valid_rewards(rewards_G), np.asarray(log_ratio_G, dtype=np.float64)
        if log_ratio_G.shape != valid.mask_G.shape:
            raise ValueError(f"{valid.mask_G.size} rewards need as many log-ratios, given shape {log_ratio_G.shape}")
        log_ratio_K = log_ratio_G[valid.mask_G]
        if not np.isfinite(log_ratio_K).all():
            raise ValueError(f"log-ratios must be finite, given {log_ratio_K}")
        if valid.rewards_K.size == 0:
            return valid.scatter(np.zeros_like)
        ratio_K, current = np.exp(log_ratio_K), self._tilted(valid.rewards_K - self.lam * log_ratio_K, self.lam)
        c_K = self._coefficients(current)
        stats = self._stats(self._tilted(valid.rewards_K, self.lam), c_K) | {
            "ratio": float(ratio_K.mean()), "ratio_max": float(ratio_K.max()),
            "reweighted_ess": effective_size(current.p_K)}
        return valid.scatter(lambda _: self._scale(self.lam) * (ratio_K - ratio_K.size * c_K), stats)

    def _tilted(self, rewards_K: np.ndarray, lam: float) -> TiltedGroup:
        return TiltedGroup.of(rewards_K, lam, leave_one_out=self.estimator == "jackknife")

    def _coefficients(self, tilted: TiltedGroup) -> np.ndarray:
        c_K = tilted.coefficients()
        return shrink_to_positive(c_K, tilted.p_K) if self.guard == "shrink" else c_K

    def _scaled(self, rewards_K: np.ndarray, c_K: np.ndarray, lam: float) -> np.ndarray:
        k = rewards_K.size
        if math.isinf(lam):
            centred_K = rewards_K - rewards_K.mean()
            return centred_K if self.estimator == "plugin" else centred_K * k / (k - 1)
        return self._scale(lam) * (1 - k * c_K)

    def _scale(self, lam: float) -> float:
        return {"exact": lam, "unit": 1.0, "max1": max(lam, 1.0)}[self.scale]

    def _stats(self, tilted: TiltedGroup, c_K: np.ndarray) -> dict[str, float]:
        rewards_K, p_K, equivalent = tilted.rewards_K, tilted.p_K, float(tilted.certainty_equivalent)
        stats = {
            "lam": float(tilted.lam),
            "ess": effective_size(p_K),
            "max_weight": float(p_K.max()),
            "negative_share": np.count_nonzero(c_K < 0) / c_K.size,
            "tilt_kl": radius(p_K),
            "worst_reward": float(rewards_K.min()),
            "certainty_equivalent": equivalent,
            "gap": float(rewards_K.mean()) - equivalent,
        }
        if self.estimator == "jackknife":
            stats["certainty_equivalent_jackknife"] = tilted.jackknife_certainty_equivalent()
        return stats


@dataclass(frozen=True, kw_only=True)
class TiltedGroup:
    """The K rewards of a group, tilted to low rewards, and the same for each group without one of its samples.

    p_K: softmax(-r / lam). certainty_equivalent: -lam log mean exp(-r / lam).
    left_out_KK, left_out_equivalent_K: the same without sample j in row j (weight 0 at j); None without `leave_one_out`
    or if K = 1.
    """

    rewards_K: np.ndarray
    lam: float
    p_K: np.ndarray
    certainty_equivalent: float
    left_out_KK: np.ndarray | None
    left_out_equivalent_K: np.ndarray | None

    @classmethod
    def of(cls, rewards_K: np.ndarray, lam: float, leave_one_out: bool) -> TiltedGroup:
        if not leave_one_out or rewards_K.size == 1:
            p_K, equivalent = tilt(rewards_K, lam)
            return cls(rewards_K=rewards_K, lam=lam, p_K=p_K, certainty_equivalent=float(equivalent), left_out_KK=None,
                       left_out_equivalent_K=None)
        # Row 0 is the whole group; in row 1 + j sample j has the reward +inf, and so a weight of exactly 0. One softmax
        # per row: the O(k) forms subtract weights and turn into inf where one sample dominates.
        left_out = np.eye(rewards_K.size + 1, rewards_K.size, k=-1, dtype=bool)
        p, equivalent = tilt(np.where(left_out, np.inf, rewards_K), lam)
        return cls(rewards_K=rewards_K, lam=lam, p_K=p[0], certainty_equivalent=equivalent[0], left_out_KK=p[1:],
                   left_out_equivalent_K=equivalent[1:])

    def coefficients(self) -> np.ndarray:
        """Return p, or with left-out groups c_i = k p_i - (k - 1)/k * sum_{j != i} P(-j)_i.

        Coefficients may be negative; their sum is 1.
        """
        if self.left_out_KK is None:
            return self.p_K
        k = self.p_K.size
        return k * self.p_K - (k - 1) / k * self.left_out_KK.sum(axis=0)

    def jackknife_certainty_equivalent(self) -> float:
        """Return k r* - (k - 1)/k * sum_j r*(-j), or r* itself for k = 1.

        The jackknife coefficients are the gradient of this value.
        """
        if self.left_out_equivalent_K is None:
            return float(self.certainty_equivalent)
        k = self.p_K.size
        return float(k * self.certainty_equivalent - (k - 1) / k * self.left_out_equivalent_K.sum())


def tilt(rewards_K: np.ndarray, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Compute p = softmax(-r / lam) and r* = -lam log mean exp(-r / lam) over the last axis, for 0 <= lam <= inf.

    A reward of +inf marks a sample that is left out of both. r* is the reward whose plug-in advantage is zero.
    """
    worst = rewards_K.min(axis=-1, keepdims=True)
    gaps_K = rewards_K - worst
    if lam == 0 or math.isinf(lam):
        weights_K = (gaps_K == 0 if lam == 0 else np.isfinite(gaps_K)).astype(np.float64)
    else:
        with np.errstate(over="ignore"):  # a gap far beyond lam has weight 0
            weights_K = np.exp(-gaps_K / lam)
    total = weights_K.sum(axis=-1, keepdims=True)
    if math.isinf(lam):
        equivalent = np.mean(rewards_K, axis=-1, where=np.isfinite(rewards_K))
    else:
        counted = np.isfinite(rewards_K).sum(axis=-1)
        equivalent = worst[..., 0] - lam * np.log(total[..., 0] / counted)
    return weights_K / total, equivalent


def effective_size(p_K: np.ndarray) -> float:
    """Return the effective sample size 1 / sum p^2: the number of equally weighted samples that is equivalent to p."""
    return float(1 / np.square(p_K).sum())


def shrink_to_positive(c_K: np.ndarray, p_K: np.ndarray) -> np.ndarray:
    """Return (1 - tau) p + tau c with the largest tau <= 1 for which no coefficient is negative. The sum stays 1."""
    negative_K = c_K < 0
    if not negative_K.any():
        return c_K
    tau = min(1.0, np.min(p_K[negative_K] / (p_K - c_K)[negative_K]))
    # c - p rounds, so the binding coefficient could come out at -1e-17.
    return np.maximum(p_K + tau * (c_K - p_K), 0.0)


def radius(p_K: np.ndarray) -> float:
    """Return KL(p || uniform) = sum p log(k p), in nats."""
    positive_K = p_K[p_K > 0]
    return max(0.0, float(np.sum(positive_K * np.log(p_K.size * positive_K))))


def temperature_of_radius(rewards_K: np.ndarray, rho: float) -> float:
    """Solve KL(p || uniform) = rho for lam by bisection of log lam. Return 0 if rho >= log(k / ties at the worst)."""
    if rho >= math.log(rewards_K.size / np.sum(rewards_K == rewards_K.min())):
        return 0.0
    low = high = float(np.ptp(rewards_K))
    while radius(tilt(rewards_K, high)[0]) > rho:
        high *= 2
    while low > 0 and radius(tilt(rewards_K, low)[0]) < rho:
        low /= 2
    for _ in range(200):
        middle = math.sqrt(low) * math.sqrt(high)
        if not low < middle < high:
            break
        low, high = (middle, high) if radius(tilt(rewards_K, middle)[0]) > rho else (low, middle)
    return high
