"""The pictures of a matrix: what is kept along the updates and along the KL, the certificates, and what it costs.

Lines are means over seeds, bands their 95 % intervals by Student's t.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np

from frpo.retention.results import Results
from frpo.telemetry import mean_interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend has to be chosen first
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw_all(found: Results, folder: Path) -> dict[str, Path]:
    """Title -> picture, written into `folder`; those with nothing to show are left out."""
    pictures = {}
    for regime in found.plan.recipe.regimes:
        if any(fork[1] == regime for fork in found.paths):
            pictures[f"Kept through {regime}"] = _saved(kept(found, regime), folder / f"kept_{regime}.png")
    if found.certified:
        pictures["Certificates"] = _saved(certificates(found), folder / "certificates.png")
    if any(not math.isnan(found.value(policy, "eval/kl")) for policy in found.plan.recipe.forked):
        pictures["Reward reached, KL spent, reward kept"] = _saved(spent(found), folder / "spent.png")
    if any("utility" in values for values in found.summaries.values()):
        pictures["What forks keep, and what they learn"] = _saved(frontier(found), folder / "frontier.png")
    return pictures


def kept(found: Results, regime: str) -> Figure:
    """Reward and lowest decile, against updates and against KL from the policy; without what is the same everywhere."""
    grid_K = np.linspace(0.0, 2 * found.plan.recipe.measure.max_kl, 81)
    paths = [path for fork, path in found.paths.items() if fork[1] == regime]
    shown = {label: metric for label, metric in (("mean reward", found.reward), ("lowest decile", found.decile))
             if np.ptp(np.concatenate([path.metrics[metric] for path in paths])) > 0 or metric == found.reward}
    figure, axes = plt.subplots(len(shown), 2, figsize=(11, 3.5 * len(shown)), layout="constrained", sharex="col",
                                squeeze=False)
    for row, (label, metric) in zip(axes, shown.items()):
        for policy, color in _colored(found):
            forks = list(found.forks(policy, regime).values())
            if forks:
                common = sorted(set.intersection(*(set(path.step_S) for path in forks)))
                at_updates = [path.metrics[metric][np.isin(path.step_S, common)] for path in forks]
                _band(row[0], np.array(common), at_updates, color, policy)
                _band(row[1], grid_K, [path.along_kl(metric, grid_K) for path in forks], color, policy)
        row[0].set_ylabel(f"{label} of the original task")
        for axis in row:
            _fit_to_lines(axis)
    axes[-1][0].set_xlabel("updates of the fork")
    axes[-1][1].set_xlabel("KL from the policy, nats a sequence")
    return _tidy(figure, axes.flat, axes[0][1])


def certificates(found: Results) -> Figure:
    """Of each policy the bound, and every measured point of its forks, over all seeds."""
    names = [name for name in found.plan.recipe.forked if any(policy == name for policy, _ in found.certified)]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.4 * rows), layout="constrained",
                                squeeze=False, sharex=True, sharey=True)
    kl_K = np.linspace(0.0, 4 * found.plan.recipe.measure.max_kl, 121)
    for axis, name in zip(axes.flat, names):
        certified = [each for (policy, _), each in found.certified.items() if policy == name]
        _band(axis, kl_K, [each.certificate.bound(kl_K) for each in certified], "black", "bound")
        points = np.array([point for each in certified for point in each.points])
        if len(points):
            axis.scatter(points[:, 0], points[:, 1], s=9, alpha=0.5, label="measured")
        axis.set(title=name, xlim=(-0.05, kl_K[-1]))
    for axis in axes.flat[len(names):]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel("reward of the original task")
    for axis in axes[-1]:
        axis.set_xlabel("KL from the policy, nats a sequence")
    lowest = min((point[1] for each in found.certified.values() for point in each.points), default=0.0)
    axes[0][0].set_ylim(bottom=lowest - 0.1)
    return _tidy(figure, axes.flat, axes[0][0])


def spent(found: Results) -> Figure:
    """Each policy's reward, and what forks keep of it on average, over the KL to its reference that it spent."""
    regimes = list(found.plan.recipe.regimes)
    figure, axes = plt.subplots(1, 1 + len(regimes), figsize=(4.6 * (1 + len(regimes)), 4), layout="constrained",
                                squeeze=False)
    panels = [("reward reached", "kept/reward"),
              *((f"reward kept through {regime}, over updates", f"{regime}/over updates") for regime in regimes)]
    for axis, (label, measure) in zip(axes[0], panels):
        for policy, color in _colored(found):
            x, y = found.value(policy, "eval/kl"), found.value(policy, measure)
            if not math.isnan(x + y):
                chosen = policy == found.chosen
                axis.scatter([x], [y], color=color, s=90 if chosen else 40, marker="*" if chosen else "o", label=policy)
        axis.set(xlabel="KL to the reference, nats a sequence", ylabel=label)
    return _tidy(figure, axes[0], axes[0][0])


def frontier(found: Results) -> Figure:
    """Where each fork ends: what it keeps of the original task over what it has learned of the new one."""
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    colors, places = dict(_colored(found)), []
    for regime, marker in zip(found.plan.recipe.regimes, "os^Dv<>P*X"):
        for policy, color in colors.items():
            kept_by, learned_by = (found.by_seed(policy, regime, name) for name in ("end", "utility"))
            if not kept_by or not learned_by:
                continue
            (x, dx), (y, dy) = mean_interval(learned_by.values()), mean_interval(kept_by.values())
            axis.errorbar(x, y, xerr=_width(dx), yerr=_width(dy), color=color, marker=marker, capsize=2, linewidth=1,
                          label=f"{policy}, {regime}")
            places.append((x, y))
    (left, low), (right, high) = np.min(places, axis=0), np.max(places, axis=0)
    axis.set(xlabel="reward of the new task at the end", ylabel="reward of the original task at the end",
             xlim=(left - 0.15, right + 0.15), ylim=(low - 0.15, high + 0.15))
    return _tidy(figure, [axis], axis)


def _colored(found: Results) -> Iterator[tuple[str, str]]:
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    return ((name, colors[index % len(colors)]) for index, name in enumerate(found.plan.recipe.forked))


def _band(axis: Axes, x: np.ndarray, curves: list[np.ndarray], color: str, label: str) -> None:
    """Mean and interval where every curve has a value."""
    values = np.stack(curves)
    whole = ~np.isnan(values).any(0)
    if not whole.any():
        return
    mean, half_width = np.array([mean_interval(column) for column in values[:, whole].T]).T
    axis.plot(x[whole], mean, color=color, label=label, linewidth=1.5)
    if len(curves) > 1:
        axis.fill_between(x[whole], mean - half_width, mean + half_width, color=color, alpha=0.15, linewidth=0)


def _fit_to_lines(axis: Axes) -> None:
    """Intervals of few seeds may be so wide that they would hide the means."""
    values = np.concatenate([line.get_ydata() for line in axis.lines])
    pad = 0.15 * float(np.ptp(values)) or 0.05
    axis.set_ylim(values.min() - pad, values.max() + pad)


def _width(half_width: float) -> float:
    return 0.0 if math.isnan(half_width) else half_width


def _tidy(figure: Figure, axes: object, legend: Axes) -> Figure:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    legend.legend(frameon=False, fontsize=8)
    return figure


def _saved(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
