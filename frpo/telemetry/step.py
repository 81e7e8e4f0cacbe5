"""Compute the metrics of one step from its records. This module writes nothing."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from frpo.types import AdvantagedGroup, Metrics


def rollout_metrics(groups: Sequence[AdvantagedGroup], seconds: float) -> dict[str, float]:
    """Compute rewards (mean, min, max, every component), lengths, truncation and the estimator's own statistics.

    seconds: time spent generating, for the throughput; 0 if nothing was generated.
    """
    rewards = np.concatenate([group.scored.rewards_G for group in groups])
    completions = [completion for group in groups for completion in group.scored.group.completions]
    lengths = np.array([len(completion.token_ids) for completion in completions])
    metrics = {
        "reward/mean": _over(np.mean, rewards), "reward/min": _over(np.min, rewards),
        "reward/max": _over(np.max, rewards),
        "rollout/length": float(lengths.mean()), "rollout/tokens": float(lengths.sum()),
        "rollout/truncated": float(np.mean([completion.truncated for completion in completions]))}
    if seconds > 0:
        metrics["time/tokens_per_second"] = float(lengths.sum() / seconds)
    for name in groups[0].scored.terms:
        values = np.concatenate([group.scored.terms[name] for group in groups])
        metrics[f"reward/{name}/mean"] = _over(np.mean, values)
    return metrics | tilt_metrics(groups)


def staleness_metrics(groups: Sequence[AdvantagedGroup], version: int) -> dict[str, float]:
    """Compute `rollout/staleness` over tokens, mean and `_max`: optimizer updates from sampling policy to `version`."""
    spans = [span for group in groups for completion in group.scored.group.completions
             for span in completion.version_spans]
    tokens = sum(span.end - span.start for span in spans)
    if tokens == 0:
        return {}
    behind = sum((span.end - span.start) * (version - span.policy_version) for span in spans)
    return {"rollout/staleness": behind / tokens,
            "rollout/staleness_max": float(max(version - span.policy_version for span in spans))}


def tilt_metrics(groups: Sequence[AdvantagedGroup]) -> dict[str, float]:
    """Return `tilt/<name>`: every statistic of the estimator, averaged over the groups with a finite value."""
    values: dict[str, list[float]] = {}
    for group in groups:
        for name, value in group.stats.items():
            if np.isfinite(value):
                values.setdefault(f"tilt/{name}", []).append(value)
    return {name: float(np.mean(numbers)) for name, numbers in values.items()}


def reweight_metrics(groups: Sequence[AdvantagedGroup]) -> Metrics:
    """Return `reweight/<name>` of the groups of one update, as sums and counts: mean ratio, largest ratio, effective
    sample size.
    """
    metrics: Metrics = {}
    for name, reduction in (("ratio", "mean"), ("ratio_max", "max"), ("reweighted_ess", "mean")):
        values = [group.stats[name] for group in groups if name in group.stats]
        if values:
            total = max(values) if reduction == "max" else sum(values)
            metrics[f"reweight/{name.removeprefix('reweighted_')}"] = (total, len(values), reduction)
    return metrics


MISHAPS = {"abstained": "completions without a value", "nonfinite": "completions with NaN, infinity or beyond 1e150",
           "failed": "calls that failed", "timed_out": "calls that took too long"}


def mishaps(counts: Mapping[str, float]) -> list[str]:
    """Return one line for each reward and kind of mishap that occurred: completions without a value, and the cause."""
    lines = []
    for key, count in counts.items():
        area, _, rest = key.partition("/")
        name, _, kind = rest.rpartition("/")
        if area == "reward" and count > 0:
            lines.append(f"reward {name}: {count:.0f} {MISHAPS[kind]}")
    return lines


def _over(reduce: Any, values: np.ndarray) -> float:
    kept = values[~np.isnan(values)]
    return float(reduce(kept)) if len(kept) else float("nan")
