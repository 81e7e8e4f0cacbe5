"""The reward curve of one or several runs as a picture, from their metrics files."""
from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend has to be chosen first


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file, one a step; null is what was not finite."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]


def draw_reward_curve(runs: Mapping[str, Path], picture: Path) -> Path:
    """Training reward as a line, held-out reward with its 95 % interval as points; `runs`: name -> metrics file."""
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
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    return picture
