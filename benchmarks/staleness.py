"""What sampling ahead of the learner saves: the real loop with `rollout.max_staleness` 0, 1 and 2 on one stack.

    python benchmarks/staleness.py [--steps 12] [--slow 2.0] [--recipe quickstart] [section.key=value ...]

Engines and learner of a small machine share its cores, so that nothing can overlap in earnest. Both are therefore made
slow by sleeping: `--slow` seconds are added to the sampling of a batch and to its learning, and stand for work on
devices of their own. --slow 0 measures this machine as it is. Everything else is the real loop, in-flight pushes,
corrections and all. Nothing here passes or fails.
"""
from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from frpo.config.loader import dump_recipe, load_recipe, recipe_from_dict
from frpo.config.sections import Recipe
from frpo.loops.rl import Trainer
from frpo.run.build import RunParts, build
from frpo.telemetry.progress import ProgressBar
from frpo.types import RolloutGroup, RunState

STALENESS = (0, 1, 2)
TARGET = 1.6


class SlowSampler:
    """A sampler whose batches take longer, by what is slept before the first group."""

    def __init__(self, sampler: Any, seconds: float):
        self.sampler, self.seconds = sampler, seconds

    def stream(self, *prompts: Any, **options: Any) -> Iterator[RolloutGroup]:
        groups = self.sampler.stream(*prompts, **options)
        time.sleep(self.seconds)
        return groups


class SlowLearner:
    """A learner whose updates take longer; all else is the real one's."""

    def __init__(self, learner: Any, seconds: float):
        self.learner, self.seconds = learner, seconds

    def forward_backward(self, *update: Any, **options: Any) -> Any:
        time.sleep(self.seconds)
        return self.learner.forward_backward(*update, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.learner, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="steps of each setting after two that warm up")
    parser.add_argument("--slow", type=float, default=2.0, help="seconds added to sampling and to learning of a step")
    parser.add_argument("--recipe", default="quickstart", help="recipe whose model, data and sizes are used")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(parsed.recipe, [
            "learner.lr=1.0e-6", "checks.parameters_move=false", "telemetry.traces=false", "data.heldout=0",
            f"run.num_steps={1 + len(STALENESS) * (parsed.steps + 3)}", f"run.dir={folder}", *parsed.overrides])
        with build(recipe) as parts:
            rows = measure(parts, recipe, parsed.steps, parsed.slow)
    report(rows, parsed.slow)
    if parsed.json:
        parsed.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def measure(parts: RunParts, recipe: Recipe, steps: int, slow: float) -> dict[int, dict[str, list[float]]]:
    """Per setting: seconds of every step, and its largest staleness in optimizer updates."""
    slowed = replace(parts, sampling=replace(parts.sampling, sampler=SlowSampler(parts.sampling.sampler, slow)),
                     learner=SlowLearner(parts.learner, slow))
    state = RunState(step=0, policy_version=0, data_cursor=0, recipe_digest="", file_offsets={})
    parts.engines.push(0)
    found = {}
    with ProgressBar(1, 0, "staleness") as bar:
        for k in STALENESS:
            trainer = Trainer(replace(slowed, recipe=variant(recipe, k, last=state.step + steps + 2)))
            trainer.batches.start(state, None)
            seconds, staleness = [], []
            for index in track(range(steps + 2), description=f"max_staleness {k}"):
                began = time.perf_counter()
                state, metrics, _ = trainer.step(state, bar)
                if index >= 2:
                    seconds.append(time.perf_counter() - began)
                    staleness.append(metrics["rollout/staleness_max"])
                parts.timer.collect()
            trainer.batches.close()
            found[k] = {"seconds": seconds, "staleness": staleness}
    return found


def variant(recipe: Recipe, max_staleness: int, last: int) -> Recipe:
    values = dump_recipe(recipe)
    values["rollout"]["max_staleness"] = max_staleness
    values["run"]["num_steps"] = last
    return recipe_from_dict(values)


def report(rows: dict[int, dict[str, list[float]]], slow: float) -> None:
    base = statistics.median(rows[0]["seconds"])
    table = Table("max_staleness", "step, s", "sync / it", "oldest token, updates", title=(
        f"Median of {len(rows[0]['seconds'])} steps; {slow:g} s slept in sampling and in learning each"))
    for k, row in rows.items():
        median = statistics.median(row["seconds"])
        table.add_row(str(k), f"{median:.3f}", f"{base / median:.2f}", f"{max(row['staleness']):.0f}")
    console = Console(width=120, soft_wrap=True)
    console.print(table)
    console.print(f"Target with max_staleness 1: {TARGET} times the synchronous loop.")


if __name__ == "__main__":
    main()
