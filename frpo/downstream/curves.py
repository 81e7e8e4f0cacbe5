"""Draw the reward that forks keep as lines: against their updates, and against the KL that they spent.

Lines are means over seeds, bands are their 95 % intervals by Student's t, points are the probes of each seed. A line
breaks off where neighbouring probes of a seed lie too far apart in KL. This module writes nothing.

Shape suffix: K values of KL.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np

from frpo.downstream.results import Results
from frpo.downstream.retained import ForkPath
from frpo.report.chart import STYLES, colored
from frpo.telemetry.intervals import mean_interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend has to be chosen first
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure


def kept(found: Results, title: str) -> Figure:
    """Draw reward and lowest decile of a group's forks, against updates and against KL from the policy. Leave out a
    lowest decile that is the same everywhere.
    """
    group = found.groups[title]
    paths = [path for _, *fork in group for path in found.forks(*fork).values()]
    shown = {label: metric for label, metric in (("mean reward", found.reward), ("lowest decile", found.decile))
             if _varies(np.concatenate([path.metrics[metric] for path in paths])) or metric == found.reward}
    single = len(found.plan.recipe.forked) == 1
    colors = dict(colored(found.plan.recipe.regimes if single else found.plan.recipe.forked))
    figure, axes = plt.subplots(len(shown), 2, figsize=(11, 3.5 * len(shown)), layout="constrained", sharex="col",
                                squeeze=False)
    axes[-1][0].set_xlabel("updates of the fork")
    grid_K = _kl_axis(axes[-1][1], paths, found.plan.recipe.measure.pictured_kl)
    for row, (label, metric) in zip(axes, shown.items()):
        for name, policy, regime in group:
            forks, color = list(found.forks(policy, regime).values()), colors[name]
            for path in forks:
                widths = sampling_interval(found, path, metric) if len(forks) == 1 else None
                _points(row[0], path.step_S, path.metrics[metric], color, widths)
                _points(row[1], np.maximum(path.kl_S, 0.0), path.metrics[metric], color, widths)
            common = _common_updates(forks)
            band(row[0], common, [_at(path, metric, common) for path in forks], color, name)
            band(row[1], grid_K, [path.along_kl(metric, grid_K) for path in forks], color, name)
        row[0].set_ylabel(f"{label} of the original task")
        for axis in row:
            _fit_to_values(axis)
    return tidy(figure, axes.flat, axes[0][1])


def differences(found: Results, regime: str) -> Figure:
    """Draw, for each pair of policies, the reward of the first policy's forks minus that of the second's, seed by seed.

    One axis is against updates, the other against KL from the policy. Points lie at updates after which both forks were
    probed, and at the KL of each probe of either fork.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    by_pair = {pair: [[found.paths[policy, regime, seed] for policy in pair]
                      for seed in found.common_seeds(pair, regime)] for pair in found.pairs}
    every_path = [path for forks in by_pair.values() for two in forks for path in two]
    axes[0].set_xlabel("updates of the fork")
    grid_K = _kl_axis(axes[1], every_path, found.plan.recipe.measure.pictured_kl)
    for (pair, forks), color in colored(by_pair.items()):
        if not forks:
            continue
        for two in forks:
            both, kl_K = _common_updates(two), np.union1d(*(path.first_to_reach(found.reward)[1] for path in two))
            _points(axes[0], both, np.subtract(*(_at(path, found.reward, both) for path in two)), color)
            _points(axes[1], kl_K, np.subtract(*(path.along_kl(found.reward, kl_K) for path in two)), color)
        label = f"{pair[0]} - {pair[1]}" + (" (control)" if pair in found.plan.recipe.controls else "")
        common = _common_updates([path for two in forks for path in two])
        band(axes[0], common, [np.subtract(*(_at(path, found.reward, common) for path in two)) for two in forks],
              color, label)
        band(axes[1], grid_K, [np.subtract(*(path.along_kl(found.reward, grid_K) for path in two)) for two in forks],
              color, label)
    for axis in axes:
        axis.axhline(0.0, color="black", linewidth=0.8)
    axes[0].set_ylabel("difference in reward kept")
    if found.single:
        figure.suptitle("one seed: no interval, any difference may be chance", fontsize=9)
    return tidy(figure, axes, axes[1])


def tidy(figure: Figure, axes: Iterable[Axes], legend: Axes) -> Figure:
    """Remove the frames, draw a grid, and put a legend on one of the axes."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    legend.legend(frameon=False, fontsize=8)
    return figure


def band(axis: Axes, x: np.ndarray, curves: list[np.ndarray], color: str, label: str) -> None:
    """Draw mean and interval where every curve has a value. Elsewhere the line breaks off."""
    columns = [column if not np.isnan(column).any() else () for column in np.stack(curves).T]
    mean, half_width = np.array([mean_interval(column) for column in columns]).T
    axis.plot(x, mean, color=color, label=label, linewidth=1.5, linestyle=STYLES.get(color, "solid"))
    if len(curves) > 1:
        axis.fill_between(x, mean - half_width, mean + half_width, color=color, alpha=0.15, linewidth=0)


def _varies(values: np.ndarray) -> bool:
    """Return whether the finite values differ."""
    known = values[np.isfinite(values)]
    return bool(len(known) and np.ptp(known) > 0)


def _common_updates(paths: Sequence[ForkPath]) -> np.ndarray:
    """Return the updates after which all forks were probed."""
    return np.array(sorted(set.intersection(*(set(path.step_S) for path in paths))))


def _at(path: ForkPath, metric: str, updates: np.ndarray) -> np.ndarray:
    """Return the metric at the probes after these updates."""
    return path.metrics[metric][np.isin(path.step_S, updates)]


def _kl_axis(axis: Axes, paths: Sequence[ForkPath], until: float) -> np.ndarray:
    """Label and limit an axis of KL; return (K) the KLs at which lines are drawn.

    The axis ends at the last probe within `until` nats, and its label counts the probes beyond. If only the start lies
    within, all probes are shown.
    """
    kl = np.maximum(np.concatenate([path.kl_S for path in paths]), 0.0)
    within = kl[kl <= until].max(initial=0.0)
    end = float(within or np.nanmax(kl, initial=0.0) or until)
    beyond = int((kl > end).sum())
    axis.set_xlabel("KL from the policy, nats a sequence"
                    + (f" ({beyond} of {len(kl)} probes lie beyond)" if beyond else ""))
    axis.set_xlim(-0.02 * end, 1.02 * end)
    return np.linspace(0.0, end, 161)


def sampling_interval(found: Results, path: ForkPath, metric: str) -> np.ndarray | None:
    """Return (S) half-widths at 95 % over the prompts of a probe; None unless the metric is the sampled mean reward."""
    return path.metrics.get("kept/interval") if metric == found.reward == "kept/reward" else None


def _points(axis: Axes, x: np.ndarray, y: np.ndarray, color: str, widths: np.ndarray | None = None) -> None:
    """Draw the probes of one seed. widths: half-widths of their intervals, if no other seeds show the noise."""
    axis.scatter(x, y, s=14, color=color, alpha=0.7, linewidths=0, zorder=3)
    if widths is not None:
        axis.vlines(x, y - widths, y + widths, color=color, linewidth=0.8, alpha=0.5)


def _fit_to_values(axis: Axes) -> None:
    """Limit the axis of rewards to lines, points and the points' own intervals. A band over few seeds may be so wide
    that it would hide them.
    """
    left, right = axis.get_xlim()
    probes = [offset for each in axis.collections if isinstance(each, PathCollection)
              for offset in np.ma.filled(each.get_offsets(), np.nan)]
    seen = np.concatenate([[y for x, y in probes if left <= x <= right], *(line.get_ydata() for line in axis.lines)])
    seen = seen[np.isfinite(seen)]
    if len(seen):
        pad = 0.15 * float(np.ptp(seen)) or 0.05
        bars = [y for each in axis.collections if isinstance(each, LineCollection) for segment in each.get_segments()
                for x, y in segment if left <= x <= right and np.isfinite(y)]
        low, high = min(bars, default=seen.min()) - pad / 10, max(bars, default=seen.max()) + pad / 10
        axis.set_ylim(min(low, seen.min() - pad), max(high, seen.max() + pad))
