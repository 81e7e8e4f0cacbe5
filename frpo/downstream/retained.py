"""Compute the reward that a fork has kept from the rows of its probe: along the updates, and along the KL.

Both axes are reported: a policy may keep more at the same KL and yet travel further in as many updates. Values along
the KL are left blank between probes that lie far apart (`kl_spacing`). Seeds are compared in pairs. All functions are
pure functions of rows. This module reads, draws and decides nothing.

Shape suffixes: S probes of a fork, R probes of these that reached a KL first, K values of KL.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from frpo.downstream.kl_spacing import Gap, far_apart
from frpo.telemetry.intervals import mean_interval

AT_KL = (0.5, 1.0, 2.0)
"""KLs in nats at which the reward is reported."""


@dataclass(frozen=True, kw_only=True)
class ForkPath:
    """Probes of one fork, in order. kl_S: KL to the policy from which the fork began, in nats per sequence.

    metrics: all measured values by name, (S) each.
    """

    step_S: np.ndarray
    kl_S: np.ndarray
    metrics: Mapping[str, np.ndarray]

    @property
    def has_curve(self) -> bool:
        """Return whether there is a probe between start and end."""
        return len(self.step_S) > 2

    def first_to_reach(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (R), (R), (R): update, KL and metric of the probes on the line along KL. Each of these probes has a KL
        above all earlier probes on the line.

        A fork whose KL has fallen is another policy than the fork that first had this KL. Its probe is left out. Probes
        without the metric are left out too. At update 0 the KL is set to 0; the estimate there is ignored.
        """
        kl_S = np.where(self.step_S == 0, 0.0, np.maximum(self.kl_S, 0.0))
        kept, highest = [], -math.inf
        for place, (kl, value) in enumerate(zip(kl_S, self.metrics[name], strict=True)):
            if kl > highest and not math.isnan(value):
                kept.append(place)
                highest = kl
        return self.step_S[kept], kl_S[kept], self.metrics[name][kept]

    def along_kl(self, name: str, kl_K: np.ndarray) -> np.ndarray:
        """Return (K) values of the metric at these KLs, linear between probes that lie close. Elsewhere, and beyond the
        largest KL, the values are NaN.
        """
        _, kl_R, value_R = self.first_to_reach(name)
        if len(kl_R) < 2:
            return np.where(np.isin(kl_K, kl_R), value_R.sum(), math.nan)
        values_K = np.interp(kl_K, kl_R, value_R, left=math.nan, right=math.nan)
        before_K = np.clip(np.searchsorted(kl_R, kl_K), 1, len(kl_R) - 1) - 1
        unknown_K = far_apart(kl_R)[before_K] & ~np.isin(kl_K, kl_R)
        return np.where(unknown_K, math.nan, values_K)

    def largest_kl(self, name: str) -> float:
        """Return the largest KL in nats at which the metric was measured."""
        return float(max(self.first_to_reach(name)[1], default=0.0))

    def gaps(self, name: str, until: float) -> list[Gap]:
        """Return the gaps that begin below `until` nats: neighbouring probes with this metric, too far apart in KL."""
        step_R, kl_R, _ = self.first_to_reach(name)
        return [Gap(updates=(int(step_R[r]), int(step_R[r + 1])), kl=(float(kl_R[r]), float(kl_R[r + 1])))
                for r in np.flatnonzero(far_apart(kl_R)) if kl_R[r] < until]


def read_path(rows: Sequence[Mapping[str, float]], kl: str) -> ForkPath:
    """Return the probes in the rows of a metrics file: rows with the metric `kl`, sorted by update. For equal updates
    the last row counts.
    """
    by_step = {row["step"]: row for row in rows if kl in row}
    probes = [by_step[step] for step in sorted(by_step)]
    names = [name for name in (probes[0] if probes else {}) if all(name in row for row in probes)]
    return ForkPath(step_S=np.array([row["step"] for row in probes]), kl_S=np.array([row[kl] for row in probes]),
                    metrics={name: np.array([row[name] for row in probes], dtype=np.float64) for name in names})


def summary(path: ForkPath, reward: str, decile: str, max_kl: float) -> dict[str, float]:
    """Return one number each: at the start, at the end, averaged over updates and over KL up to `max_kl`, at some KLs.

    A value beyond the largest KL of the fork, or between probes too far apart, is NaN. A mean over KL needs its whole
    range. Without a probe between start and end, averages and values at KLs are left out.
    """
    grid_K = np.linspace(0.0, max_kl, 201)
    ends = {"start": path.metrics[reward][0], "start decile": path.metrics[decile][0],
            "end": path.metrics[reward][-1], "end - start": path.metrics[reward][-1] - path.metrics[reward][0],
            "end decile": path.metrics[decile][-1], "end KL": path.kl_S[-1]}
    if not path.has_curve:
        return {name: float(value) for name, value in ends.items()}
    found = {"over updates": _mean_over(path.step_S, path.metrics[reward]),
             "decile over updates": _mean_over(path.step_S, path.metrics[decile]),
             "over KL": float(np.mean(path.along_kl(reward, grid_K))),
             "decile over KL": float(np.mean(path.along_kl(decile, grid_K)))}
    found |= {f"at KL {kl:g}": float(path.along_kl(reward, np.array([kl]))[0]) for kl in AT_KL if kl <= max_kl}
    return {name: float(value) for name, value in (ends | found).items()}


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Differences seed by seed. half_width: half-width of the 95 % interval by Student's t; NaN for a single seed."""

    mean: float
    half_width: float
    positive: int
    count: int

    @property
    def differs(self) -> bool:
        """Return whether the interval does not contain zero."""
        return abs(self.mean) > self.half_width


def paired(ours: Mapping[int, float], others: Mapping[int, float]) -> Paired:
    """Return the differences ours - others over the seeds that have a number in both."""
    differences = [ours[seed] - others[seed] for seed in ours if seed in others]
    kept = [difference for difference in differences if not math.isnan(difference)]
    mean, half_width = mean_interval(kept)
    return Paired(mean=mean, half_width=half_width, positive=sum(d > 0 for d in kept), count=len(kept))


def _mean_over(step_S: np.ndarray, value_S: np.ndarray) -> float:
    """Return the mean of a line through the probes, over all updates."""
    return float(np.sum((value_S[1:] + value_S[:-1]) / 2 * np.diff(step_S)) / (step_S[-1] - step_S[0]))
