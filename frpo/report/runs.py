"""Show trainings side by side: one panel per measure, as a picture and as interactive curves."""
from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frpo.report.chart import STYLES, Chart, colored, line, panel, points
from frpo.report.curve import plt, read_metrics
from frpo.report.page import TableText
from frpo.telemetry.jsonl import read_rows


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Measure of one panel. interval: metric of the half-width at 95 %.

    tuned: True for fine-tunings only, False for other runs only, None for all runs.
    beside: another metric. The panel lists runs that have `beside` but lack this measure, with the reason `unless`.
    """

    metric: str
    interval: str | None = None
    tuned: bool | None = None
    beside: str | None = None
    unless: str = ""


MEASURES = {
    "reward, training": Measure(metric="reward/mean"),
    "reward, held-out": Measure(metric="eval/reward", interval="eval/interval"),
    "KL to the reference, nats a token": Measure(
        metric="policy/kl_ref", beside="reward/mean", unless="objective.kl_coef was 0"),
    "KL to the reference, held-out, nats a sequence": Measure(
        metric="eval/kl", interval="eval/kl_interval", tuned=False, beside="eval/reward",
        unless="objective.kl_coef was 0, or evaluate.temperature not 1"),
    "entropy, nats a token": Measure(metric="policy/entropy"), "tokens a completion": Measure(metric="rollout/length"),
    "constrained cost, training": Measure(metric="constraint/cost"),
    "multiplier of the cost": Measure(metric="constraint/nu"),
    "accuracy of the order of pairs, training": Measure(metric="preference/accuracy"),
    "accuracy of the order of pairs, held-out": Measure(metric="eval/accuracy", interval="eval/interval"),
    "cross-entropy, training, nats a token": Measure(metric="sft/nll"),
    "cross-entropy, held-out": Measure(metric="eval/nll"),
    "KL to the reference, training, nats a token": Measure(metric="sft/kl"),
    "KL to the reference, held-out, nats a token": Measure(metric="eval/kl", tuned=True)}
"""Measures by title of their panel."""

TUNED = {"sft/nll", "eval/nll"}
"""Metrics that only a fine-tuning has."""

WRAPPED = 60
"""Width of the text below a panel, in characters."""

TOLD = 4
"""Number of held-out prompts whose answers are shown over time."""

Rows = Sequence[Mapping[str, float]]


def panels(runs: Mapping[str, Rows]) -> dict[str, Measure]:
    """Return title -> measure: MEASURES, then every reward component. Leave out measures for which no run has two
    points.
    """
    names = sorted({name for rows in runs.values() for row in rows for name in row
                    if name.startswith("reward/") and name.endswith("/mean") and name != "reward/mean"})
    components = {f"reward {name.split('/')[1]}, training": Measure(metric=name) for name in names
                  } if len(names) > 1 else {}
    return {title: measure for title, measure in (MEASURES | components).items()
            if any(len(_known(rows, measure)) > 1 for rows in runs.values())}


def draw_runs(runs: Mapping[str, Rows], picture: Path) -> Path | None:
    """Draw all panels into one picture; return None if there is nothing to draw."""
    shown = panels(runs)
    if not shown:
        return None
    columns = min(3, len(shown))
    figure, axes = plt.subplots(math.ceil(len(shown) / columns), columns, layout="constrained", squeeze=False,
                                figsize=(4.6 * columns, 3.2 * math.ceil(len(shown) / columns)))
    for axis, (title, measure) in zip(axes.flat, shown.items()):
        _draw_panel(axis, title, measure, runs)
    for axis in axes.flat[len(shown):]:
        axis.set_visible(False)
    if len(runs) > 1:
        axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    return picture


def _draw_panel(axis: Any, title: str, measure: Measure, runs: Mapping[str, Rows]) -> None:
    metric, interval = measure.metric, measure.interval
    for (name, rows), color in colored(runs.items()):
        if known := _known(rows, measure):
            widths = [row.get(interval, 0.0) for row in known] if interval else None
            axis.errorbar([row["step"] for row in known], [row[metric] for row in known], yerr=widths, color=color,
                          linestyle=STYLES[color], linewidth=1.2, capsize=2 if interval else 0, label=name,
                          marker="o" if interval else None, markersize=3)
    axis.set(title=title, xlabel="\n".join(["step", *_missing(measure, runs)]))
    axis.title.set_fontsize(9)
    axis.xaxis.label.set_fontsize(8)
    axis.grid(alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)


def chart_runs(runs: Mapping[str, Rows], folders: Mapping[str, Path]) -> Chart:
    """Return the same panels as interactive curves. A click on a held-out point shows its completions."""
    found = {title: panel([trace for (name, rows), color in colored(runs.items())
                           for trace in _traces(name, color, title, measure, rows)], "step", "",
                          "<br>".join(_missing(measure, runs)))
             for title, measure in panels(runs).items()}
    samples: dict[str, list[Mapping[str, Any]]] = {}
    for name, folder in folders.items():
        for row in read_samples(folder):
            samples.setdefault(f"{name}/{row['step']}", []).append(row)
    return Chart(panels=found, samples=samples)


def _missing(measure: Measure, runs: Mapping[str, Rows]) -> list[str]:
    """Return lines that name the runs with `measure.beside` that lack the measure, and the reason; empty without any.
    """
    names = [name for name, rows in runs.items() if not _known(rows, measure)
             and any(measure.beside in row for row in rows)]
    told = f"not shown, because {measure.unless}: {', '.join(names)}"
    return textwrap.wrap(told, WRAPPED, break_on_hyphens=False) if names else []


def _traces(name: str, color: str, title: str, measure: Measure, rows: Rows) -> list[dict[str, Any]]:
    """Return the line and the points of a run in one panel; empty if the run lacks the measure."""
    metric, interval = measure.metric, measure.interval
    known = _known(rows, measure)
    if not known:
        return []
    x, y = [row["step"] for row in known], [row[metric] for row in known]
    hover = [f"step {row['step']:.0f}<br>{title} {row[metric]:.4g}" for row in known]
    widths = [row.get(interval, math.nan) for row in known] if interval else None
    keys = [f"{name}/{step:.0f}" for step in x] if metric.startswith("eval/") else None
    return [line(name, color, x, y), points(name, color, x, y, hover, keys, widths)]


def answers_over_time(folder: Path) -> TableText | None:
    """Make a table of the policy's answers to the first held-out prompts at up to four evaluations; None without any.
    """
    rows = read_samples(folder)
    steps = sorted({row["step"] for row in rows})
    by_prompt: dict[str, dict[int, str]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], {})[row["step"]] = _answer(row)
    if len(steps) > 4:  # the first, the last and two between
        steps = [steps[round(place * (len(steps) - 1) / 3)] for place in range(4)]
    told = tuple((prompt, *(said.get(step, "") for step in steps)) for prompt, said in list(by_prompt.items())[:TOLD])
    if not told:
        return None
    return TableText(title="Sampled answers to held-out prompts", note="in brackets: the reward", laid_out=True,
                     columns=("asked", *(f"step {step}" for step in steps)), rows=told)


def read_samples(folder: Path) -> list[Mapping[str, Any]]:
    """Read the held-out completions that a training kept. Completions of other tasks are left out."""
    file = folder / "samples.jsonl"
    return [row for row in read_rows(file) if row["task"] == "eval"] if file.is_file() else []


def read_runs(folders: Mapping[str, Path]) -> dict[str, Rows]:
    """Read the metrics of each run: name -> rows."""
    return {name: read_metrics(folder / "metrics.jsonl") for name, folder in folders.items()}


def _answer(sample: Mapping[str, Any]) -> str:
    """Return a completion with its reward in brackets. null stands for a reward that was not finite."""
    reward = math.nan if sample["reward"] is None else sample["reward"]
    return f"{sample['completion']}\n[{reward:.3g}]"


def _known(rows: Rows, measure: Measure) -> Rows:
    """Return the rows with a finite value of the measure; empty for a run of the other kind (`Measure.tuned`)."""
    metric = measure.metric
    if measure.tuned is not None and measure.tuned != any(TUNED & row.keys() for row in rows):
        return []
    return [row for row in rows if metric in row and math.isfinite(row[metric])]
