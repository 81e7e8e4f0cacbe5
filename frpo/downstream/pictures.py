"""Write the pictures of a matrix as files: its tables, the rewards that forks keep (`curves`), certificates and KL."""
from __future__ import annotations

import math
import textwrap
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np

from frpo.config.retention import TableSection
from frpo.downstream.curves import band, differences, kept, tidy
from frpo.downstream.results import Results
from frpo.downstream.tables import BEFORE
from frpo.report.chart import colored

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend has to be chosen first
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LEAST_RANGE = 0.1
"""Least range of an axis of reward, so that small differences look small."""


def draw_all(found: Results, folder: Path) -> dict[str, Path]:
    """Write the pictures into `folder`; return title -> picture. Pictures with nothing to show are left out."""
    pictures = {}
    for number, section in enumerate(found.plan.recipe.tables, 1):
        if any(found.forks(*fork) for row in section.rows for fork in row.forks):
            pictures[section.title] = _saved(bars(found, section), folder / f"table_{number}.png")
    for title, group in found.groups.items():
        if any(_is_curve(found, *fork) for _, *fork in group):
            pictures[f"Kept {title}"] = _saved(kept(found, title), folder / f"kept_{title.partition(' ')[2]}.png")
    for regime in found.plan.recipe.regimes:
        if any(found.common_seeds(pair, regime) and _is_curve(found, pair[0], regime) for pair in found.pairs):
            how = "one seed: no interval, any difference may be chance" if found.single else "seed by seed"
            pictures[f"Differences through {regime}, {how}"] = _saved(
                differences(found, regime), folder / f"differences_{regime}.png")
    if found.certified:
        pictures["Certificates"] = _saved(certificates(found), folder / "certificates.png")
    if len(found.plan.recipe.shown) > 1 and any(
            not math.isnan(found.value(policy, "eval/kl")) for policy in found.plan.recipe.shown):
        kept_too = ", reward kept" if found.plan.recipe.regimes else ""
        pictures[f"Reward reached, KL spent{kept_too}"] = _saved(spent(found), folder / "spent.png")
    if any("utility" in values for values in found.summaries.values()):
        pictures["What forks keep, and what they learn"] = _saved(frontier(found), folder / "frontier.png")
    return pictures


def bars(found: Results, section: TableSection) -> Figure:
    """Draw a table of the recipe: a group of bars for each row, a diamond for each published value of the measure."""
    rows = [row for row in section.rows if any(found.forks(*fork) for fork in row.forks)]
    scale = 100.0 if section.percent else 1.0
    figure, axis = plt.subplots(figsize=(max(7.0, 1.5 * len(rows)), 4.5), layout="constrained")
    share, published, lowest = 0.8 / len(section.columns), [], 0.0
    for column, name in enumerate(section.columns):
        places = np.arange(len(rows)) - 0.4 + share * (column + 0.5)
        means, widths = np.array([found.spread(policy, f"{regime}/{row.measure}")
                                  for row in rows for policy, regime in row.forks[column:column + 1]]).T
        if np.isnan(means).all():
            continue
        axis.bar(places, scale * means, share, label=name, yerr=scale * widths, capsize=2)
        given = [row.published.get("", [])[column:column + 1] for row in rows]
        published += [(place, number) for place, numbers in zip(places, given) for number in numbers
                      if number is not None]
        lowest = min(lowest, np.nanmin(means))
    if published:
        axis.scatter([place for place, _ in published], [number for _, number in published], marker="D", s=22,
                     color="white", edgecolors="black", zorder=3, label=f"published: {section.published}")
    axis.set_xticks(range(len(rows)), [textwrap.fill(row.title, 16) for row in rows], fontsize=8)
    axis.set_ylabel("%" if section.percent else "")
    axis.set_ylim(bottom=0.0 if lowest >= 0 else None, top=1.25 * axis.get_ylim()[1])  # room for the legend
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, ncols=min(3, len(section.columns) + 1), loc="upper center")
    return figure


def certificates(found: Results) -> Figure:
    """Draw for each policy the bound, and every measured point of its forks, over all seeds."""
    names = [name for name in found.plan.recipe.forked if any(policy == name for policy, _ in found.certified)]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.4 * rows), layout="constrained",
                                squeeze=False, sharex=True, sharey=True)
    kl_K = np.linspace(0.0, 4 * found.plan.recipe.measure.max_kl, 121)
    for axis, name in zip(axes.flat, names):
        certified = [each for (policy, _), each in found.certified.items() if policy == name]
        band(axis, kl_K, [each.certificate.bound(kl_K) for each in certified], "black", "bound")
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
    return tidy(figure, axes.flat, axes[0][0])


def spent(found: Results) -> Figure:
    """Draw each policy's reward, and the mean reward that its forks keep, over the policy's KL to its reference."""
    panels = [("reward reached", "kept/reward"), *((f"reward kept through {regime}, over updates",
                                                    f"{regime}/over updates") for regime in found.plan.recipe.regimes)]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 4 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    unknown = [policy for policy in found.plan.recipe.shown if math.isnan(found.value(policy, "eval/kl"))]
    over = "held-out prompts, one seed" if found.single else "seeds"
    figure.suptitle("\n".join([f"bars: 95 % interval over {over}", *(textwrap.wrap(
        f"not shown, because their KL to the reference is unknown: {', '.join(unknown)}", 60 * columns) if unknown
        else [])]), fontsize=8)
    for axis, (label, measure) in zip(axes.flat, panels):
        for policy, color in colored(found.plan.recipe.shown):
            (x, dx), (y, dy) = found.spread(policy, "eval/kl"), found.spread(policy, measure)
            if not math.isnan(x + y):
                chosen = policy == found.chosen
                axis.errorbar(x, y, xerr=_width(dx), yerr=_width(dy), color=color, markersize=12 if chosen else 6,
                              marker="*" if chosen else "o", capsize=2, linewidth=1, label=policy)
        if measure == "kept/reward" and found.before_training:
            _level_before_training(axis, *found.untrained_spread(measure))
        low, high = axis.get_ylim()
        pad = max(0.0, LEAST_RANGE - (high - low)) / 2
        axis.set(xlabel="KL to the reference, nats a sequence", ylabel=label, ylim=(low - pad, high + pad))
        axis.set_xlim(left=0.0, right=1.2 * axis.get_xlim()[1])
    return tidy(figure, axes.flat, axes[0][0])


def _level_before_training(axis: Axes, reward: float, half_width: float) -> None:
    """Draw the reward before training, which any training has to exceed, as a line over all KLs, with its interval."""
    axis.axhline(reward, color="gray", linestyle="dashed", linewidth=1, label=BEFORE)
    if not math.isnan(half_width):
        axis.axhspan(reward - half_width, reward + half_width, color="gray", alpha=0.15, linewidth=0)


def frontier(found: Results) -> Figure:
    """Draw the end of each fork: the reward of the original task over the reward of the new task."""
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    colors, places = dict(colored(found.plan.recipe.forked)), []
    for regime, marker in zip(found.plan.recipe.regimes, cycle("os^Dv<>P*X")):
        for policy, color in colors.items():
            (x, dx), (y, dy) = (found.spread(policy, f"{regime}/{name}") for name in ("utility", "end"))
            if math.isnan(x + y):
                continue
            axis.errorbar(x, y, xerr=_width(dx), yerr=_width(dy), color=color, marker=marker, capsize=2, linewidth=1,
                          label=f"{policy}, {regime}")
            places.append((x, y))
    axis.set(xlabel="reward of the new task at the end", ylabel="reward of the original task at the end")
    if places:
        (left, low), (right, high) = np.min(places, axis=0), np.max(places, axis=0)
        axis.set(xlim=(left - 0.15, right + 0.15), ylim=(low - 0.15, high + 0.15))
    return tidy(figure, [axis], axis)


def _is_curve(found: Results, policy: str, regime: str) -> bool:
    return any(path.has_curve for path in found.forks(policy, regime).values())


def _width(half_width: float) -> float:
    return 0.0 if math.isnan(half_width) else half_width


def _saved(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
