"""Draw reward and loss curves of one or several runs as pictures, from their metrics files."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from frpo.telemetry.jsonl import read_rows

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend has to be chosen first
from matplotlib.ticker import MaxNLocator


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the rows of a metrics file, one per step. null, which stands for a value that was not finite, becomes NaN.
    """
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in read_rows(path)]


def draw_reward_curve(runs: Mapping[str, Path], picture: Path) -> Path:
    """Draw training reward as a line, held-out reward with its 95 % interval as points; `runs`: name -> metrics file.
    """
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for color, (name, path) in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], runs.items()):
        rows = read_metrics(path)
        trained = [(row["step"], row["reward/mean"]) for row in rows if "reward/mean" in row]
        heldout = [(row["step"], row["eval/reward"], row["eval/interval"]) for row in rows if "eval/reward" in row]
        if trained:
            axes.plot(*zip(*trained), color=color, alpha=0.35, linewidth=1, label=f"{name}: training prompts")
        if heldout:
            steps, means, intervals = zip(*heldout)
            axes.errorbar(steps, means, yerr=intervals, color=color, marker="o", markersize=4, capsize=3,
                          label=f"{name}: held-out prompts")
    axes.set(xlabel="step", ylabel="mean reward")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    return picture


LOSSES = (("cross-entropy of responses (nats a token)", "sft/nll", "eval/nll"),
          ("KL to the reference (nats a token)", "sft/kl", "eval/kl"))


PREFERENCES = (("accuracy of the order", "preference/accuracy", "eval/accuracy"),
               ("mean difference of scores", "preference/margin", "eval/margin"),
               ("accuracy of the sign", "preference/sign_accuracy", "eval/sign_accuracy"))


def draw_preference_curve(runs: Mapping[str, Path], picture: Path) -> Path:
    """Draw how a reward model orders pairs: training as a line, held-out pairs as points. `runs`: name -> metrics file.
    """
    return _draw_panels(runs, picture, PREFERENCES, "pairs")


def draw_loss_curve(runs: Mapping[str, Path], picture: Path) -> Path:
    """Draw cross-entropy, and KL to the reference where it was measured: training as a line, held-out examples as
    points. `runs`: name -> metrics file.
    """
    return _draw_panels(runs, picture, LOSSES, "examples")


def _draw_panels(runs: Mapping[str, Path], picture: Path, shown: Sequence[tuple[str, str, str]], items: str) -> Path:
    """Draw the panels (label, training metric, held-out metric) that a run has measured."""
    read = {name: read_metrics(path) for name, path in runs.items()}
    known = {key for rows in read.values() for row in rows for key in row}
    panels = [panel for panel in shown if known & set(panel[1:])]
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, (label, trained, heldout) in zip(axes[0], panels):
        for color, (name, rows) in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], read.items()):
            for key, style in ((trained, {"alpha": 0.4, "linewidth": 1}), (heldout, {"marker": "o", "markersize": 4})):
                points = [(row["step"], row[key]) for row in rows if key in row]
                if points:
                    axis.plot(*zip(*points), color=color, **style,
                              label=f"{name}: {'training' if key == trained else 'held-out'} {items}")
        axis.set(xlabel="update", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    return picture
