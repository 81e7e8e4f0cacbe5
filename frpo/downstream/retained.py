"""What a fork has kept, from the rows that its probe wrote: along the updates, and along the KL that they cost.

Both axes are reported: a policy may keep more at the same KL and yet travel further in as many updates. Along the KL
nothing is told between probes that lie far apart (`kl_spacing`). Seeds are compared in pairs. Pure functions of rows;
nothing is read, drawn or decided here.

Shape suffixes: S probes of a fork, R those of them that reached a KL first, K values of KL.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from frpo.downstream.kl_spacing import Gap, far_apart
from frpo.telemetry.intervals import mean_interval

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

    @property
    def has_curve(self) -> bool:
        """Whether there is a probe between start and end."""
        return len(self.step_S) > 2

    def first_to_reach(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(R), (R), (R) update, KL and metric of the probes on the line along KL: those with a KL above all earlier
        ones.

        A fork whose KL has fallen is another policy than the one that was first at that KL, and is left out. Probes
        without the metric are left out too. At update 0 the KL is 0, whatever was estimated.
        """
        kl_S = np.where(self.step_S == 0, 0.0, np.maximum(self.kl_S, 0.0))
        kept, highest = [], -math.inf
        for place, (kl, value) in enumerate(zip(kl_S, self.metrics[name], strict=True)):
            if kl > highest and not math.isnan(value):
                kept.append(place)
                highest = kl
        return self.step_S[kept], kl_S[kept], self.metrics[name][kept]

    def along_kl(self, name: str, kl_K: np.ndarray) -> np.ndarray:
        """(K) the metric at these KLs, linear between probes that lie close; NaN elsewhere and beyond the largest KL.
        """
        _, kl_R, value_R = self.first_to_reach(name)
        if len(kl_R) < 2:
            return np.where(np.isin(kl_K, kl_R), value_R.sum(), math.nan)
        values_K = np.interp(kl_K, kl_R, value_R, left=math.nan, right=math.nan)
        before_K = np.clip(np.searchsorted(kl_R, kl_K), 1, len(kl_R) - 1) - 1
        unknown_K = far_apart(kl_R)[before_K] & ~np.isin(kl_K, kl_R)
        return np.where(unknown_K, math.nan, values_K)

    def largest_kl(self, name: str) -> float:
        """Nats up to which the metric was measured."""
        return float(max(self.first_to_reach(name)[1], default=0.0))

    def gaps(self, name: str, until: float) -> list[Gap]:
        """Where neighbouring probes with this metric lie too far apart, up to a KL."""
        step_R, kl_R, _ = self.first_to_reach(name)
        return [Gap(updates=(int(step_R[r]), int(step_R[r + 1])), kl=(float(kl_R[r]), float(kl_R[r + 1])))
                for r in np.flatnonzero(far_apart(kl_R)) if kl_R[r] < until]


def read_path(rows: Sequence[Mapping[str, float]], kl: str) -> ForkPath:
    """Of the rows of a metrics file that hold a probe: those with the metric `kl`, by update, of equal ones the last.
    """
    by_step = {row["step"]: row for row in rows if kl in row}
    probes = [by_step[step] for step in sorted(by_step)]
    names = [name for name in (probes[0] if probes else {}) if all(name in row for row in probes)]
    return ForkPath(step_S=np.array([row["step"] for row in probes]), kl_S=np.array([row[kl] for row in probes]),
                    metrics={name: np.array([row[name] for row in probes], dtype=np.float64) for name in names})


def summary(path: ForkPath, reward: str, decile: str, max_kl: float) -> dict[str, float]:
    """One number each: at the start, at the end, averaged over updates and over KL up to `max_kl`, and at some KLs.

    NaN is what lies beyond the largest KL of the fork, or between probes too far apart; a mean over KL needs all of its
    range. Start and end alone are no path: without a probe between them, averages are left out.
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
