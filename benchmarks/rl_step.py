"""What a step of the real loop costs, objective by objective, on the same engine, learner ranks, prompts and seeds.

    python benchmarks/rl_step.py [--steps 20] [--recipe quickstart] [section.key=value ...]

Every round takes one step with each variant from the same weights (the learning rate is next to zero), in turning
order, so that ratios within a round compare like with like. Then the same engine samples the same groups once more,
with nothing scored and nothing else running: what a rollout in the loop is compared with. Nothing here passes or fails.
"""
from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from frpo.config.loader import dump_recipe, load_recipe, recipe_from_dict
from frpo.config.sections import Recipe
from frpo.loops.rl import Trainer
from frpo.objectives.stage import compute_advantages
from frpo.rollout.engine import Sampling
from frpo.run.build import RunParts, build
from frpo.telemetry.progress import ProgressBar
from frpo.types import RolloutGroup, RunState

VARIANTS = {
    "Dr. GRPO": {"advantage": {"name": "dr_grpo"}, "reweight": "frozen"},
    "FRPO": {"advantage": {"name": "frpo"}, "reweight": "frozen"},
    "FRPO, reweight: current": {"advantage": {"name": "frpo"}, "reweight": "current"},
}
PHASES = ("generate", "reward", "score", "reweight", "learn", "sync")
WITHIN_LEARN = "reweight"
OUTSIDE_TARGET, ROLLOUT_TARGET = 0.05, 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="rounds after one that warms up")
    parser.add_argument("--recipe", default="quickstart", help="recipe whose model, data and sizes are used")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(parsed.recipe, [
            # One surrogate serves all variants; two updates, so that there is something to reweight.
            "objective.surrogate={name: reinforce}", "objective.advantage={name: frpo}", "learner.updates_per_step=2",
            "learner.lr=1.0e-12", "checks.parameters_move=false", "telemetry.traces=false", f"run.dir={folder}",
            *parsed.overrides])
        with build(recipe) as parts:
            rows = measure(parts, recipe, parsed.steps)
            rows["advantages"] = advantage_seconds(parts, recipe)
    report(rows)
    if parsed.json:
        parsed.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def measure(parts: RunParts, recipe: Recipe, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each variant, per round: whole steps and phases; tokens a second of its rollout over those alone."""
    trainers = {name: Trainer(replace(parts, recipe=variant(recipe, changes))) for name, changes in VARIANTS.items()}
    rows = {name: {key: [] for key in ("step", *PHASES, "rollout")} for name in trainers}
    start = RunState(step=0, policy_version=0, data_cursor=0, recipe_digest="", file_offsets={})
    version, speeds = 0, {}
    parts.engines.push(version)
    with ProgressBar(1, 0, "rl_step") as bar:
        for index in track(range(rounds + 1), description="rounds"):
            order = list(trainers)[index % len(trainers):] + list(trainers)[:index % len(trainers)]
            for name in order:
                began = time.perf_counter()
                state, metrics = trainers[name].step(replace(start, policy_version=version), bar)
                whole, version = time.perf_counter() - began, state.policy_version
                phases, speeds[name] = parts.timer.collect(), metrics["time/tokens_per_second"]
                if index > 0:
                    rows[name]["step"].append(whole)
                    for phase in PHASES:
                        rows[name][phase].append(phases.get(f"time/{phase}", 0.0))
            alone = tokens_per_second_alone(parts, recipe, version)
            if index > 0:
                for name in trainers:
                    rows[name]["rollout"].append(speeds[name] / alone)
    return rows


def tokens_per_second_alone(parts: RunParts, recipe: Recipe, version: int) -> float:
    """What the engines make of the groups of a step when nobody scores them.

    It comes after a push and ends with one, as a step does, so that prefix caches are empty each time.
    """
    began = time.perf_counter()
    groups = sampled(parts, recipe, version)
    seconds = time.perf_counter() - began
    parts.engines.push(version)
    return sum(len(completion.token_ids) for group in groups for completion in group.completions) / seconds


def sampled(parts: RunParts, recipe: Recipe, version: int) -> list[RolloutGroup]:
    """The groups of the first step, by seeds the same at every call."""
    section = recipe.rollout
    return parts.sampling.sampler.sample(
        parts.sampling.stream.take(0, section.prompts_per_step), step=0, first_sample=0, group_size=section.group_size,
        version=version, sampling=Sampling(
            temperature=section.temperature, top_p=section.top_p, max_new_tokens=section.max_new_tokens))


def advantage_seconds(parts: RunParts, recipe: Recipe, repeats: int = 20) -> dict[str, float]:
    """Seconds that the advantages of one rollout batch take on the controller: all that FRPO adds to Dr. GRPO."""
    groups = sampled(parts, recipe, parts.sampling.pool.policy_versions()[0])
    scored, found = parts.sampling.rewards.score(groups).groups, {}
    for name in ("Dr. GRPO", "FRPO"):
        estimator = variant(recipe, VARIANTS[name]).objective.advantage
        began = time.perf_counter()
        for _ in range(repeats):
            compute_advantages(scored, estimator, [None] * len(scored))
        found[name] = (time.perf_counter() - began) / repeats
    return found


def variant(recipe: Recipe, changes: Mapping[str, object]) -> Recipe:
    values = dump_recipe(recipe)
    values["objective"] |= changes
    return recipe_from_dict(values)


def report(rows: dict) -> None:
    advantages = rows["advantages"]
    base = rows["Dr. GRPO"]["step"]
    table = Table(title=f"One step in seconds, median of {len(base)} rounds; ratios: medians of those within a round")
    for column in ("variant", "step", "/ Dr. GRPO", *PHASES):
        table.add_column(column)
    for name in VARIANTS:
        steps = rows[name]["step"]
        ratio = statistics.median(mine / theirs for mine, theirs in zip(steps, base, strict=True))
        table.add_row(name, f"{statistics.median(steps):.3f}", f"{ratio:.3f}",
                      *(f"{statistics.median(rows[name][phase]):.3f}" for phase in PHASES))
    console = Console(width=120, soft_wrap=True)
    console.print(table)
    share = (advantages["FRPO"] - advantages["Dr. GRPO"]) / statistics.median(base)
    console.print(f"Advantages of a batch: Dr. GRPO {1e3 * advantages['Dr. GRPO']:.2f} ms, FRPO "
                  f"{1e3 * advantages['FRPO']:.2f} ms; the difference is {share:.2%} of a Dr. GRPO step.")
    current = rows["FRPO, reweight: current"]
    forward = [reweight / (score / 2) for reweight, score in zip(current["reweight"], current["score"], strict=True)]
    console.print(f"Reweighting an update, over a forward pass of the reference on as many samples: "
                  f"{statistics.median(forward):.2f}")
    outside = {name: statistics.median(map(share_outside, *(rows[name][key] for key in ("step", *PHASES))))
               for name in VARIANTS}
    console.print(f"Share of a step outside {', '.join(PHASES)} (target <= {OUTSIDE_TARGET:.0%}): "
                  + "; ".join(f"{name} {share:.1%}" for name, share in outside.items()))
    console.print(f"Rollout tokens a second in the loop over the engine's alone (target >= {ROLLOUT_TARGET:g}): "
                  + "; ".join(f"{name} {statistics.median(rows[name]['rollout']):.3f}" for name in VARIANTS))


def share_outside(step: float, *phases: float) -> float:
    named = dict(zip(PHASES, phases, strict=True))
    return 1 - (sum(named.values()) - named[WITHIN_LEARN]) / step


if __name__ == "__main__":
    main()
