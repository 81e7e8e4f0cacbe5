"""`frpo rollout`: sample and score the groups of a run's first steps without a learner, to debug rewards.

Prompts, seeds, group ids, dynamic sampling and selection are the same as in a run. The groups of the first step equal
those of a run bit for bit. Later steps sample the same policy, version 0, because nothing is learned. There is no
reference, so `objective.kl_in_reward` subtracts nothing from the advantages. Rows have the format of a run's traces.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from frpo.config.loader import recipe_digest
from frpo.config.sections import EvaluateSection, Recipe
from frpo.evaluation.heldout import heldout_metrics
from frpo.evaluation.model import table_rows
from frpo.held import held_folder
from frpo.loops.collect import collect
from frpo.objectives.stage import compute_advantages
from frpo.run.build import SamplingParts, build_engines, check_prompts
from frpo.run.traces import new_file, trace_rows
from frpo.telemetry.intervals import mean_interval
from frpo.telemetry.jsonl import JsonlFile
from frpo.telemetry.progress import ProgressBar
from frpo.telemetry.step import mishaps, rollout_metrics
from frpo.types import AdvantagedGroup, RunState

FILE = "rollouts.jsonl"


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """All groups of some steps, counts of events by metric name, and the seconds spent on generating."""

    groups: Sequence[AdvantagedGroup]
    counts: Mapping[str, float]
    seconds: float


def run_rollout(recipe: Recipe, steps: int, output: str | None) -> int:
    """Sample steps 0 to `steps` - 1, write their trace rows into `output` or rollouts.jsonl of run.dir, print a table.

    Raises ConfigError, before any work, if the file exists already or cannot be written, or if a run is writing into
    run.dir.
    """
    with held_folder(Path(recipe.run.dir)):
        path = new_file(Path(recipe.run.dir) / FILE if output is None else Path(output))
        with build_engines(recipe, check_prompts(recipe)) as serving:
            rollouts = sample_steps(serving, steps, path)
    print_summary(steps, rollouts)
    print(f"groups: {path}  To train on them without engines: rollout.replay={path} run.num_steps={steps}")
    return 0


def sample_steps(serving: SamplingParts, steps: int, path: Path) -> Rollouts:
    """Collect the steps one by one. Write each step before the next begins, so that an error loses no finished step."""
    objective, timer = serving.recipe.objective, serving.timer
    state = RunState(step=0, policy_version=0, data_cursor=0, recipe_digest=recipe_digest(serving.recipe),
                     file_offsets={})
    groups: list[AdvantagedGroup] = []
    counts: Counter[str] = Counter()
    seconds = 0.0
    with ProgressBar(steps, 0, f"{serving.recipe.run.name} rollout") as bar:
        while state.step < steps:
            batch = collect(serving, state, bar)
            state = replace(state, controllers=objective.after_batch(state.controllers, batch.drawn))
            mixture = objective.mixture(state.controllers)
            chosen, replaced = (compute_advantages(part, objective.advantage, [None] * len(part), mixture=mixture,
                                                   scalarised=serving.recipe.scalarised)
                                for part in (batch.chosen, batch.replaced))
            with closing(JsonlFile(path)) as file:
                for row in (*trace_rows(chosen), *trace_rows(replaced, trained=False)):
                    file.append(row)
            groups += [*chosen, *replaced]
            counts.update(batch.counts)
            seconds += timer.seconds["generate"]
            metrics = rollout_metrics([*chosen, *replaced], timer.seconds["generate"]) | timer.collect()
            state = replace(state, step=state.step + 1, data_cursor=state.data_cursor + batch.positions)
            bar.step(state.step, metrics)
            bar.advance()
    return Rollouts(groups=groups, counts=counts, seconds=seconds)


def print_summary(steps: int, rollouts: Rollouts) -> None:
    """Print each metric with its value and, if there is one, the half-width of its 95 % interval over groups.

    Below the table, print the failures of rewards.
    """
    table = Table(title=f"{steps} step{'s' if steps > 1 else ''}, 95 % interval")
    for column in ("metric", "value", "interval"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, value, interval in summary(rollouts):
        table.add_row(name, f"{value:.4g}", "" if interval is None else f"± {interval:.2g}")
    Console().print(table)
    for line in mishaps(rollouts.counts):
        print(line)


def summary(rollouts: Rollouts) -> list[tuple[str, float, float | None]]:
    """List (metric, value, interval or None) over all groups, including groups that dynamic sampling replaced."""
    rows = table_rows(heldout_metrics([group.scored for group in rollouts.groups], EvaluateSection()))
    rows.append(("teach nothing", *mean_interval(group.stats["zero_advantage"] for group in rollouts.groups)))
    rows += [(name.removeprefix("rollout/").replace("_", " "), float(value), None)
             for name, value in rollouts.counts.items()
             if name.startswith("rollout/") and name not in ("rollout/drawn", "rollout/informative")]  # shown already
    tokens = sum(len(completion.token_ids) for group in rollouts.groups
                 for completion in group.scored.group.completions)
    return [*rows, ("tokens per second", tokens / rollouts.seconds, None)]
