"""Combine the results of a plan's finished stages in one record, from which tables, pictures and the page are made.

The record computes values from the measurements. `reading` reads it from files. This module draws nothing.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from frpo.downstream.certificate import Certificate
from frpo.downstream.plan import Plan
from frpo.downstream.retained import ForkPath, Paired, paired
from frpo.evaluation.heldout import interval_of
from frpo.telemetry.intervals import mean_interval

UTILITY = "utility/reward"
ROUNDING = 1e-9
"""Tolerance of comparisons: a reward that is always the same lies on its bound."""

Fork = tuple[str, str, int]
"""Fork: (policy, regime, seed)."""


@dataclass(frozen=True, kw_only=True)
class Certified:
    """Certificate of a policy, and every measured point (KL in nats, reward, half-width) of the policy's forks."""

    certificate: Certificate
    points: tuple[tuple[float, float, float], ...]

    @property
    def slack(self) -> np.ndarray:
        """Return how far each point lies above the bound."""
        if not self.points:
            return np.zeros(0)
        kl, reward, _ = np.array(self.points).T
        return reward - self.certificate.bound(np.maximum(kl, 0.0))

    @property
    def violations(self) -> int:
        """Count the points below the bound."""
        return int((self.slack < -ROUNDING).sum())

    @property
    def clear_violations(self) -> int:
        """Count the points that lie below the bound by more than the half-width of their own interval."""
        return sum(gap < -point[2] for gap, point in zip(self.slack, self.points, strict=True))


@dataclass(frozen=True, kw_only=True)
class Results:
    """Results of a matrix. paths, summaries: of finished forks.

    policies: known metrics of each policy before any fork, {(policy, seed): metrics}. untrained: the same for a
    policy's held-out samples before its own training, if the samples are of the same task.
    exact: whether reward and lowest decile are enumerated rather than sampled. warnings: facts a reader has to know.
    states: (policy, regime or None) -> seeds by state: done, failed, missing. failures: error by stage.
    starts: seconds of each start of engines and ranks. pushes: seconds of each push of a fork's weights into running
    engines.
    """

    plan: Plan
    reward: str
    decile: str
    paths: Mapping[Fork, ForkPath]
    summaries: Mapping[Fork, Mapping[str, float]]
    policies: Mapping[tuple[str, int], Mapping[str, float]]
    untrained: Mapping[tuple[str, int], Mapping[str, float]]
    certified: Mapping[tuple[str, int], Certified]
    states: Mapping[tuple[str, str | None], Mapping[str, list[int]]]
    failures: Mapping[str, str]
    seconds: Mapping[str, float]
    starts: tuple[float, ...]
    pushes: tuple[float, ...]
    heldout: Mapping[int, Mapping[str, Any]]
    warnings: tuple[str, ...] = field(default=())

    @property
    def exact(self) -> bool:
        return self.reward.startswith("exact/")

    def forks(self, policy: str, regime: str) -> dict[int, ForkPath]:
        """Return the forks of a policy through a regime, by seed."""
        return {seed: path for (p, r, seed), path in self.paths.items() if (p, r) == (policy, regime)}

    def common_seeds(self, pair: tuple[str, str], regime: str) -> list[int]:
        """Return the seeds for which forks of both policies have gone through the regime."""
        return sorted(self.forks(pair[0], regime).keys() & self.forks(pair[1], regime).keys())

    def by_seed(self, policy: str, regime: str, measure: str) -> dict[int, float]:
        """Return a number of the summaries by seed; NaN for a fork without this number."""
        return {seed: values.get(measure, math.nan) for (p, r, seed), values in self.summaries.items()
                if (p, r) == (policy, regime)}

    def policy_by_seed(self, policy: str, metric: str) -> dict[int, float]:
        return {seed: values[metric] for (p, seed), values in self.policies.items()
                if p == policy and metric in values}

    def fork_value(self, fork: Fork, measure: str) -> float:
        """Return a number of the fork's summary or a metric of its last probe; NaN without either."""
        if measure in self.summaries.get(fork, {}):
            return self.summaries[fork][measure]
        path = self.paths.get(fork)
        return float(path.metrics[measure][-1]) if path and measure in path.metrics else math.nan

    def measured(self, fork: tuple[str, str], measure: str) -> dict[int, float]:
        """Return `fork_value` of (policy, regime) by seed."""
        return {seed: self.fork_value((*fork, seed), measure) for seed in self.forks(*fork)}

    def before(self, forks: Sequence[tuple[str, str]], metric: str) -> dict[int, float]:
        """Return, by seed, a metric of the first probe of the first fork that has this metric."""
        found: dict[int, float] = {}
        for fork in forks:
            for seed, path in self.forks(*fork).items():
                if metric in path.metrics:
                    found.setdefault(seed, float(path.metrics[metric][0]))
        return found

    @property
    def groups(self) -> dict[str, list[tuple[str, str, str]]]:
        """Return the forks that are shown together, title -> (name in the group, policy, regime). A group holds the
        policies of a regime. With only one policy, the group holds its regimes.
        """
        known = {(policy, regime) for policy, regime, _ in self.paths}
        recipe = self.plan.recipe
        if len(recipe.forked) == 1:
            grouped = {f"by {recipe.forked[0]}": [(regime, recipe.forked[0], regime) for regime in recipe.regimes]}
        else:
            grouped = {f"through {regime}": [(policy, policy, regime) for policy in recipe.forked]
                       for regime in recipe.regimes}
        found = {title: [each for each in group if each[1:] in known] for title, group in grouped.items()}
        return {title: group for title, group in found.items() if group}

    def of_policy(self, policy: str, measure: str) -> dict[int, float]:
        """Return, by seed, a policy's metric. For REGIME/number, return a number or a last metric of its forks."""
        regime, _, number = measure.partition("/")
        if regime in self.plan.recipe.regimes:
            return self.measured((policy, regime), number)
        return self.policy_by_seed(policy, measure)

    def spread(self, policy: str, measure: str) -> tuple[float, float]:
        """Return the mean of `of_policy` over seeds and the half-width of its 95 % interval. With one seed, the
        interval is over its held-out prompts. Missing values are NaN.
        """
        mean, half_width = mean_interval(self.of_policy(policy, measure).values())
        return mean, self._sampling_width(policy, measure) if self.single else half_width

    @property
    def single(self) -> bool:
        """Return whether there is only one seed, so that the spread over seeds is not known."""
        return len(self.plan.recipe.seeds) == 1

    def _sampling_width(self, policy: str, measure: str) -> float:
        """Return the half-width of the only seed; NaN for values that are enumerated or averaged along a fork. For a
        difference, both ends count as sampled from different prompts, which makes the interval wide.
        """
        (seed,), (regime, _, number) = self.plan.recipe.seeds, measure.partition("/")
        if regime not in self.plan.recipe.regimes:
            return self.policies.get((policy, seed), {}).get(interval_of(measure), math.nan)
        if number == "end - start":
            return math.hypot(*(self._sampling_width(policy, f"{regime}/{end}") for end in ("start", "end")))
        metric = {"start": self.reward, "end": self.reward, "end KL": "kept/kl", "utility": UTILITY}.get(number, number)
        path = self.paths.get((policy, regime, seed))
        widths = path.metrics.get(interval_of(metric)) if path else None
        return math.nan if widths is None else float(widths[0 if number == "start" else -1])

    def value(self, policy: str, measure: str) -> float:
        """Return only the mean of `spread`."""
        return self.spread(policy, measure)[0]

    @property
    def components(self) -> list[str]:
        """Return the names of the rewards that make up the original task's reward; empty unless there are several."""
        found = {name.split("/")[1] for path in self.paths.values() for name in path.metrics
                 if name.startswith("kept/") and name.endswith("/mean")}
        return sorted(found) if len(found) > 1 else []

    @property
    def chosen(self) -> str | None:
        """Return the first policy of `ranked`; None if `ranked` is empty."""
        return next(iter(self.ranked), None)

    @property
    def ranked(self) -> list[str]:
        """Return the policies within the bounds of `choose`, sorted by its measure, the largest first. Equal policies
        keep the order of the recipe.
        """
        section = self.plan.recipe.choose
        if section is None:
            return []
        values = {name: self.value(name, section.measure) for name in self.plan.recipe.forked if all(
            (-math.inf if low is None else low) <= self.value(name, measure) <= (math.inf if high is None else high)
            for measure, (low, high) in section.bounds.items())}
        return sorted((name for name in values if not math.isnan(values[name])), key=lambda name: -values[name])

    def lead(self, policy: str, other: str, measure: str) -> Paired:
        """Return how much more a policy has of a measure than another, seed by seed. With one seed, the half-width
        combines the intervals of both samples.
        """
        found = paired(self.of_policy(policy, measure), self.of_policy(other, measure))
        if not self.single:
            return found
        return replace(found, half_width=math.hypot(*(self.spread(name, measure)[1] for name in (policy, other))))

    @property
    def before_training(self) -> dict[int, Mapping[str, float]]:
        """Return, by seed, the metrics of held-out samples before any training. The result is empty unless all trained
        policies of each seed are known to have begun with the same reward.
        """
        found: dict[int, Mapping[str, float]] = {}
        for seed in self.plan.seeds:
            trained = [name for name in self.plan.recipe.shown if name in seed.policies and
                       (name, seed.seed) in self.policies]
            begun = [self.untrained.get((name, seed.seed), {}) for name in trained]
            rewards = [each.get("kept/reward", math.nan) for each in begun]
            if not all(math.isclose(reward, rewards[0], abs_tol=ROUNDING) for reward in rewards):
                return {}
            if begun:
                shared = set.intersection(*(set(each) for each in begun))
                found[seed.seed] = {name: value for name, value in begun[0].items() if name in shared}
        return found

    def untrained_spread(self, metric: str) -> tuple[float, float]:
        """Return mean and half-width as `spread` does, before any training."""
        before = self.before_training.values()
        mean, half_width = mean_interval(each.get(metric, math.nan) for each in before)
        widths = [each.get(interval_of(metric), math.nan) for each in before] if self.single else [half_width]
        return mean, widths[0] if widths else math.nan

    def gain(self, policy: str) -> Paired:
        """Return how much more reward a policy has than before its own training; intervals as in `lead`."""
        before = {seed: values for (name, seed), values in self.untrained.items() if name == policy}
        found = paired(self.policy_by_seed(policy, "kept/reward"),
                       {seed: values["kept/reward"] for seed, values in before.items()})
        if not self.single:
            return found
        widths = [values.get("kept/interval", math.nan) for values in before.values()]
        return replace(found, half_width=math.hypot(self.spread(policy, "kept/reward")[1], *widths))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Return the pairs to compare, then the controls. Both policies of a pair must have been forked."""
        recipe = self.plan.recipe
        return [pair for pair in (*recipe.compare, *recipe.controls) if set(pair) <= set(recipe.forked)]

    def compared(self, pair: tuple[str, str], regime: str, measure: str) -> Paired:
        return paired(*(self.by_seed(policy, regime, measure) for policy in pair))
