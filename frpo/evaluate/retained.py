"""What a fork has kept, from the rows that its probe wrote: along the updates, and along the KL that they cost.

Both axes are reported: a policy may keep more at the same KL and yet travel further in as many updates. Seeds are
compared in pairs. Pure functions of rows; nothing is read, drawn or decided here.

Shape suffixes: S probes of a fork, K values of KL.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from frpo.telemetry import mean_interval

AT_KL = (0.5, 1.0, 2.0)
"""Nats at which the reward is told."""


@dataclass(frozen=True, kw_only=True)
class ForkPath:
    """The probes of one fork, in order. kl_S: to the policy that it began as, in nats a sequence.

    metrics: everything that was measured, by name, (S) each.
    """

    step_S: np.ndarray
    kl_S: np.ndarray
    metrics: Mapping[str, np.ndarray]

    def along_kl(self, name: str, kl_K: np.ndarray) -> np.ndarray:
        """(K) the metric at these KLs, linear between probes over the largest KL so far; NaN beyond the largest."""
        reached_S = np.maximum.accumulate(np.maximum(self.kl_S, 0.0))
        distinct, place_S = np.unique(reached_S, return_inverse=True)
        values = np.bincount(place_S, weights=self.metrics[name]) / np.bincount(place_S)
        return np.interp(kl_K, distinct, values, right=math.nan)


def read_path(rows: Sequence[Mapping[str, float]], kl: str) -> ForkPath:
    """Of the rows of a metrics file that hold a probe: those with the metric `kl`."""
    probes = [row for row in rows if kl in row]
    names = [name for name in (probes[0] if probes else {}) if all(name in row for row in probes)]
    return ForkPath(step_S=np.array([row["step"] for row in probes]), kl_S=np.array([row[kl] for row in probes]),
                    metrics={name: np.array([row[name] for row in probes], dtype=np.float64) for name in names})


def summary(path: ForkPath, reward: str, decile: str, max_kl: float) -> dict[str, float]:
    """One number each: at the start, at the end, averaged over updates and over KL up to `max_kl`, and at some KLs.

    What lies beyond the largest KL that the fork has reached is NaN. Start and end alone are no path: without a probe
    between them, averages are left out.
    """
    grid_K = np.linspace(0.0, max_kl, 201)
    ends = {"start": path.metrics[reward][0], "start decile": path.metrics[decile][0],
            "end": path.metrics[reward][-1], "end decile": path.metrics[decile][-1], "end KL": path.kl_S[-1]}
    if len(path.step_S) < 3:
        return {name: float(value) for name, value in ends.items()}
    found = {"over updates": _mean_over(path.step_S, path.metrics[reward]),
             "decile over updates": _mean_over(path.step_S, path.metrics[decile]),
             "over KL": float(np.mean(path.along_kl(reward, grid_K))),
             "decile over KL": float(np.mean(path.along_kl(decile, grid_K)))}
    found |= {f"at KL {kl:g}": float(path.along_kl(reward, np.array([kl]))[0]) for kl in AT_KL if kl <= max_kl}
    return {name: float(value) for name, value in (ends | found).items()}


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Differences seed by seed. half_width: of the 95 % interval by Student's t; NaN for a single seed."""

    mean: float
    half_width: float
    positive: int
    count: int

    @property
    def differs(self) -> bool:
        """Whether the interval leaves zero out."""
        return abs(self.mean) > self.half_width


def paired(ours: Mapping[int, float], others: Mapping[int, float]) -> Paired:
    """ours - others over the seeds that have a number in both."""
    differences = [ours[seed] - others[seed] for seed in ours if seed in others]
    kept = [difference for difference in differences if not math.isnan(difference)]
    mean, half_width = mean_interval(kept)
    return Paired(mean=mean, half_width=half_width, positive=sum(d > 0 for d in kept), count=len(kept))


def _mean_over(step_S: np.ndarray, value_S: np.ndarray) -> float:
    """Of a line through the probes, over all updates."""
    return float(np.sum((value_S[1:] + value_S[:-1]) / 2 * np.diff(step_S)) / (step_S[-1] - step_S[0]))
