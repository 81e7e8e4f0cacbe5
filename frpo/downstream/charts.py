"""Build interactive curves of the reward that forks keep: as in `curves`, with each probe's values and completions."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from frpo.downstream.curves import sampling_interval
from frpo.downstream.plan import Stage
from frpo.downstream.results import Fork, Results
from frpo.downstream.retained import ForkPath
from frpo.report.chart import Chart, colored, line, panel, points
from frpo.telemetry.jsonl import read_rows

POINTS = 101
"""Number of points of a line along the KL. The line breaks off where neighbouring probes lie too far apart."""

TASK = "kept"
"""Name of the original task, whose completions are shown."""


def kept_charts(found: Results) -> dict[str, Chart]:
    """Return charts by title, with the same titles as in `pictures.draw_all`. A click on a probe shows its completions.
    """
    return {f"Kept {title}": _kept(found, title) for title in found.groups}


def _kept(found: Results, title: str) -> Chart:
    group = found.groups[title]
    single = len(found.plan.recipe.forked) == 1
    colors = dict(colored(found.plan.recipe.regimes if single else found.plan.recipe.forked))
    by_update: list[dict[str, Any]] = []
    by_kl: list[dict[str, Any]] = []
    samples: dict[str, Sequence[Mapping[str, Any]]] = {}
    for name, policy, regime in group:
        for number, (fork, path) in enumerate(_forks(found, policy, regime)):
            told, keys = _told(found, fork, path), _keys(fork, path)
            kl_S, reward_S = np.maximum(path.kl_S, 0.0), path.metrics[found.reward]
            widths = sampling_interval(found, path, found.reward)
            lines = {"showlegend": number == 0, "opacity": 0.7}
            grid_K = np.union1d(np.linspace(0.0, path.largest_kl(found.reward), POINTS), np.maximum(path.kl_S, 0.0))
            by_update += [line(name, colors[name], path.step_S, reward_S, **lines),
                          points(name, colors[name], path.step_S, reward_S, told, keys, widths)]
            by_kl += [line(name, colors[name], grid_K, path.along_kl(found.reward, grid_K), **lines),
                      points(name, colors[name], kl_S, reward_S, told, keys, widths)]
            samples |= _samples(found, fork, keys)
    reward = "reward of the original task"
    return Chart(panels={"over updates": panel(by_update, "updates of the fork", reward),
                         "over KL": panel(by_kl, "KL from the policy, nats a sequence", reward)}, samples=samples)


def _forks(found: Results, policy: str, regime: str) -> Iterator[tuple[Fork, ForkPath]]:
    for seed, path in found.forks(policy, regime).items():
        yield (policy, regime, seed), path


def _keys(fork: Fork, path: ForkPath) -> list[str]:
    return [f"{'/'.join(map(str, fork))}/{step:.0f}" for step in path.step_S]


def _told(found: Results, fork: Fork, path: ForkPath) -> list[str]:
    """Return the text to show under the pointer at each probe."""
    lines = []
    for number, step in enumerate(path.step_S):
        values = {"reward": found.reward, "lowest decile": found.decile, "new task": "utility/reward"}
        shown = [f"{label} {path.metrics[metric][number]:.3f}" for label, metric in values.items()
                 if metric in path.metrics]
        lines.append("<br>".join([f"seed {fork[2]}, update {step:.0f}", f"KL {path.kl_S[number]:.3f} nats", *shown]))
    return lines


def _samples(found: Results, fork: Fork, keys: list[str]) -> Mapping[str, list[Mapping[str, Any]]]:
    """Return the kept completions of a fork's probes, by the keys of its points."""
    file = _stage(found, fork).run_dir / "samples.jsonl"
    if not file.is_file():
        return {}
    by_step: dict[str, list[Mapping[str, Any]]] = {}
    for row in read_rows(file):
        if row["task"] == TASK:
            by_step.setdefault(f"{'/'.join(map(str, fork))}/{row['step']}", []).append(row)
    return {key: by_step[key] for key in keys if key in by_step}


def _stage(found: Results, fork: Fork) -> Stage:
    return next(stage for seed in found.plan.seeds for stage in seed.forks
                if (stage.policy, stage.regime, stage.seed) == fork)
