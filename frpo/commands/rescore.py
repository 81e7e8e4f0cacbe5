"""`frpo rescore`: score the groups of a trace file again by a recipe's rewards, to see the effect of a changed reward.

Prompts and their columns come from the traces, rewards and advantage from the recipe. The recipe's model and data are
not read. No engine and no learner is started. `shuffle_rewards` is not applied. `objective.kl_in_reward` is not applied
either, because there is no reference.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from frpo.config.sections import Recipe
from frpo.data.prompts import PromptSet
from frpo.errors import DataError, RewardError
from frpo.objectives.stage import compute_advantages
from frpo.rewards import RewardSuite, ScoreReport
from frpo.run.build import reward_suite
from frpo.run.traces import Traced, new_file, read_groups, trace_rows
from frpo.telemetry.jsonl import JsonlFile
from frpo.telemetry.progress import ProgressBar
from frpo.telemetry.step import mishaps
from frpo.types import GroupId, Prompt, ScoredGroup

SLICE = 64
"""Largest number of groups in one call of a reward."""

SHOWN, WIDTH = 5, 60
"""Number of changed completions to print, and number of characters of each."""

SUM = ""
"""Name of the summed reward beside the components. No component can have this name."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A completion with changed values: component -> (before, now), NaN if there is no value."""

    group_id: GroupId
    sample: int
    values: Mapping[str, tuple[float, float]]
    text: str


class Comparison:
    """Values before and now, by component. A component of only one side is NaN on the other side."""

    def __init__(self) -> None:
        self.pairs: dict[str, list[np.ndarray]] = {}
        self.first: list[Change] = []

    def add(self, before: ScoredGroup, now: ScoredGroup) -> None:
        """Add one group with its scores before and now."""
        old, new = _values(before), _values(now)
        nothing = np.full(len(before.rewards_G), np.nan)
        both = {name: np.stack([old.get(name, nothing), new.get(name, nothing)]) for name in old | new}
        for name, pair_2G in both.items():
            self.pairs.setdefault(name, []).append(pair_2G)
        if len(self.first) < SHOWN:
            self.first += list(_changes(before, both))[:SHOWN - len(self.first)]

    def rows(self) -> list[tuple[str, float, float, int, int, float]]:
        """List (component, mean before, mean now, changed, completions, largest change), the sum last.

        A mean or change without any value is NaN. A value that exists on one side only counts as changed, but not for
        the largest change.
        """
        rows = []
        for name in sorted(self.pairs, key=lambda name: name == SUM):
            before_N, now_N = np.concatenate(self.pairs[name], axis=1)
            sizes = np.abs(now_N - before_N)
            largest = np.nanmax(sizes) if not np.isnan(sizes).all() else np.nan
            rows.append((name, _mean(before_N), _mean(now_N), int(_differ(before_N, now_N).sum()), len(now_N),
                         float(largest)))
        return rows


def run_rescore(traces: str, recipe: Recipe, output: str | None) -> int:
    """Score the groups of `traces` again, print the changes, and write the groups with new values into `output`.

    The file is called <output>.unfinished until all groups are scored. Raises ConfigError if `output` exists already.
    Raises DataError if the traces are missing, empty or not traces. Raises RewardError, with the line numbers in the
    traces, if a reward fails.
    """
    path, target = Path(traces), None if output is None else new_file(Path(output))
    prompts, count = read_prompts(path)
    comparison, counts = Comparison(), Counter[str]()
    unfinished = None if target is None else target.with_name(f"{target.name}.unfinished")
    with ExitStack() as stack:
        rewards = stack.enter_context(reward_suite(recipe, prompts))
        if unfinished:
            unfinished.unlink(missing_ok=True)
            file = stack.enter_context(closing(JsonlFile(unfinished)))
        bar = stack.enter_context(ProgressBar(count, 0, "rescore"))
        controllers: Mapping[str, float] = {}
        for _, step in groupby(scored_again(path, rewards, recipe, counts), key=lambda pair: pair[0].step):
            pairs = list(step)
            for traced, now in pairs:
                comparison.add(traced.scored, now)
                bar.advance()
            if unfinished:
                drawn = sorted((now for _, now in pairs), key=lambda scored: scored.group.group_id)
                controllers = recipe.objective.after_batch(controllers, drawn)
                for row in new_rows(pairs, recipe, controllers):
                    file.append(row)
    print_comparison(traces, count, comparison)
    for line in mishaps(counts):
        print(line)
    if target is not None and unfinished is not None:
        unfinished.rename(target)
        print(f"rescored: {target}")
    return 0


def read_prompts(path: Path) -> tuple[PromptSet, int]:
    """Read all prompts of the traces, each once, and count the groups.

    Raises DataError, before any scoring, if a line is no trace or if the file has no group.
    """
    prompts: dict[str, Prompt] = {}
    count = 0
    for traced in read_groups(path):
        prompts.setdefault(traced.scored.group.prompt.uid, traced.scored.group.prompt)
        count += 1
    if count == 0:
        raise DataError(f"{path} holds no rollout group; give the traces.jsonl of a run, or a file of `frpo rollout`")
    return PromptSet(train=tuple(prompts.values()), heldout=(), digest="", skipped={}), count


def scored_again(path: Path, rewards: RewardSuite, recipe: Recipe, counts: Counter[str]
                 ) -> Iterator[tuple[Traced, ScoredGroup]]:
    """Yield every group of the file with the same group scored again. counts: gets the failures of rewards."""
    # No call is larger than a call in a run, because the time limits of rewards are set for that size.
    for part in slices(path, min(SLICE, recipe.rollout.prompts_per_step)):
        report = rescored(path, rewards, part)
        counts.update(report.counts)
        yield from zip(part, report.groups, strict=True)


def slices(path: Path, size: int) -> Iterator[list[Traced]]:
    """Yield the groups of the file, `size` at a time."""
    groups = read_groups(path)
    while part := list(islice(groups, size)):
        yield part


def rescored(path: Path, rewards: RewardSuite, part: Sequence[Traced]) -> ScoreReport:
    """Score these groups again. A RewardError names the lines of these groups in the traces."""
    try:
        return rewards.score([traced.scored.group for traced in part])
    except RewardError as error:
        raise type(error)(f"{path}, lines {part[0].line} to {part[-1].line}: {error}") from None


def new_rows(pairs: Sequence[tuple[Traced, ScoredGroup]], recipe: Recipe, controllers: Mapping[str, float]
             ) -> Iterator[dict[str, Any]]:
    """Yield the trace rows of a step's groups with new rewards, components, advantages and statistics.

    Groups that were learned from and groups that were replaced are scalarised apart, as in a run.
    """
    objective = recipe.objective
    for trained, part in groupby(pairs, key=lambda pair: pair[0].trained):
        groups = [now for _, now in part]
        weighed = compute_advantages(groups, objective.advantage, [None] * len(groups),
                                     mixture=objective.mixture(controllers), scalarised=recipe.scalarised)
        yield from trace_rows(weighed, trained=trained)


def print_comparison(traces: str, groups: int, comparison: Comparison) -> None:
    """Print the values of every component before and now, and the first completions that changed."""
    table = Table(title=f"{traces}: {groups} group{'s' if groups > 1 else ''} scored again")
    for column in ("reward", "mean before", "mean now", "changed", "largest change"):
        table.add_column(column, justify="left" if column == "reward" else "right")
    for name, before, now, changed, count, largest in comparison.rows():
        table.add_row(Text(_label(name)), _number(before), _number(now), f"{changed} of {count}", _number(largest))
    Console().print(table)
    if comparison.first:
        _print_changes(comparison.first)


def _print_changes(changes: Sequence[Change]) -> None:
    table = Table(title="First changed completions")
    for column in ("group", "sample", "reward", "before", "now", "completion"):
        table.add_column(column, justify="right" if column in ("before", "now") else "left")
    for change in changes:
        names = sorted(change.values, key=lambda name: name == SUM)
        table.add_row(
            str(list(change.group_id)), str(change.sample), Text("\n".join(map(_label, names))),
            "\n".join(_number(change.values[name][0]) for name in names),
            "\n".join(_number(change.values[name][1]) for name in names), Text(shortened(change.text)))
    Console().print(table)


def shortened(text: str) -> str:
    """Return the text in one line. Leave out the middle of a long text: the part that is judged is mostly at an end."""
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else f"{line[:WIDTH // 2]} ... {line[-WIDTH // 2:]}"


def _values(scored: ScoredGroup) -> dict[str, np.ndarray]:
    return {**scored.terms, SUM: scored.rewards_G}


def _changes(group: ScoredGroup, both: Mapping[str, np.ndarray]) -> Iterator[Change]:
    for i, completion in enumerate(group.group.completions):
        values = {name: (float(pair_2G[0, i]), float(pair_2G[1, i])) for name, pair_2G in both.items()
                  if _differ(pair_2G[0, i], pair_2G[1, i])}
        if values:
            yield Change(group_id=group.group.group_id, sample=i, values=values, text=completion.text)


def _differ(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    return ~((before == now) | (np.isnan(before) & np.isnan(now)))


def _mean(values_N: np.ndarray) -> float:
    kept = values_N[~np.isnan(values_N)]
    return float(kept.mean()) if len(kept) else float("nan")


def _label(name: str) -> str:
    return "weighted sum" if name == SUM else name


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4g}"
