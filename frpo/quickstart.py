"""The quick start: train a policy made on the spot, then a control in which rewards are shuffled; see what is left.

The control is what makes the gain believable: same data, same updates, rewards that belong to other completions. At the
end forks of the policy, of a Dr. GRPO policy and of the model they began as go through the same fine-tuning for another
task. All of it shares one set of started processes.
"""
from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from frpo.builder import Parts, Stack, build
from frpo.checkpoint import CheckpointStore
from frpo.config.loader import load_recipe
from frpo.config.retention import RetentionRecipe
from frpo.config.sections import Recipe
from frpo.data.arithmetic import comparisons
from frpo.evaluate.curve import draw_reward_curve, read_metrics
from frpo.journal import open_journal
from frpo.retention.archive import write_archive
from frpo.retention.command import show, write_report
from frpo.retention.pictures import draw_all
from frpo.retention.plan import Plan, make_plan
from frpo.retention.reading import collect
from frpo.retention.stages import run_plan
from frpo.retention.tables import fork_table, policy_table
from frpo.trainer import Trainer

DOWNSTREAM = "larger"
"""The regime of `quickstart_retention`."""


def run_quickstart(overrides: Sequence[str]) -> int:
    """Run everything, print tables, draw pictures. Returns 0 if the gain is real and the control has none, else 1.

    overrides: section.key=value over the recipe `quickstart`.
    """
    started = time.perf_counter()
    recipe = _into_fresh_folder(load_recipe("quickstart", overrides))
    run_dir = Path(recipe.run.dir)
    matrix = _matrix(run_dir, recipe.run.seed, overrides)
    with build(recipe) as parts:
        first = str(run_dir / "first_state")
        parts.learner.save(first)
        Trainer(parts).fit()
        parts.learner.load(first)
        with _control_parts(parts) as control:
            Trainer(control).fit()
        write_archive(matrix.recipe)
        run_plan(matrix, Stack(pool=parts.pool, ranks=parts.learner.ranks, device=parts.learner.device))
    kept = collect(matrix)
    runs = {"FRPO": run_dir / "metrics.jsonl", "control (rewards shuffled)": control.run_dir / "metrics.jsonl"}
    picture = draw_reward_curve(runs, run_dir / "reward.png")
    ends = {name: _ends(path) for name, path in runs.items()}
    _print_table(ends)
    show([policy_table(kept), fork_table(kept, f"through {DOWNSTREAM}")])
    print(f"Kept through fine-tuning for another task: {draw_all(kept, run_dir)[f'Kept through {DOWNSTREAM}']}  "
          f"all of it: {write_report(kept)}")
    minutes = (time.perf_counter() - started) / 60
    print(f"{minutes:.1f} minutes. Picture: {picture}  model: {run_dir / 'export'}  "
          f"metrics: {run_dir / 'metrics.jsonl'}")
    gained, lured = (_verdict(*ends[name]) for name in runs)
    print(f"Gain on held-out prompts beyond the warm-started model's interval: {'yes' if gained else 'NO'}; "
          f"gain under shuffled rewards: {'YES' if lured else 'none'}")
    return 0 if gained and not lured else 1


def prepare_downstream(folder: Path, seed: int) -> None:
    """The setup of `quickstart_retention`: what forks are fine-tuned on."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": question, "response": answer} for question, answer in comparisons(480, seed)]
    (folder / f"{DOWNSTREAM}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _matrix(run_dir: Path, seed: int, overrides: Sequence[str]) -> Plan:
    """Where a policy is trained and where it is measured, the quick start's own overrides hold too."""
    recipe = load_recipe("quickstart_retention", [f"run.dir={run_dir / 'retention'}", f"seeds=[{seed}]"],
                         RetentionRecipe)
    extra = {"extra": [override.replace("$", "$$") for override in overrides]}
    policies = {name: policy.model_copy(update=extra) if policy.recipe else policy
                for name, policy in recipe.policies.items()}
    kept = recipe.measure.kept.model_copy(update=extra)
    return make_plan(recipe.model_copy(update={
        "policies": policies, "measure": recipe.measure.model_copy(update={"kept": kept})}))


def _into_fresh_folder(recipe: Recipe) -> Recipe:
    """The recipe itself, or with -2, -3, ... at the end of run.dir where an earlier quick start lies already."""
    number = 1
    folder = Path(recipe.run.dir)
    while (folder / "metrics.jsonl").is_file():
        number += 1
        folder = Path(f"{recipe.run.dir}-{number}")
    return recipe if number == 1 else _with_run(recipe, dir=str(folder))


def _with_run(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"run": recipe.run.model_copy(update=changes)})


@contextmanager
def _control_parts(parts: Parts) -> Iterator[Parts]:
    """The same live parts under a recipe that shuffles rewards and writes into its own folder."""
    run_dir = parts.run_dir / "control"
    recipe = _with_run(parts.recipe, dir=str(run_dir), name="control", save_every=0)
    recipe = recipe.model_copy(update={"shuffle_rewards": True})
    with open_journal(recipe, CheckpointStore(run_dir, recipe), None, tuple(parts.journal.files)) as journal:
        yield replace(parts, recipe=recipe, run_dir=run_dir, journal=journal)


def _ends(metrics: Path) -> tuple[dict[str, float], dict[str, float]]:
    """First and last row with a held-out evaluation."""
    rows = [row for row in read_metrics(metrics) if "eval/reward" in row]
    return rows[0], rows[-1]


def _verdict(first: dict[str, float], last: dict[str, float]) -> bool:
    """Whether the intervals before and after are apart, the later one above."""
    return last["eval/reward"] - last["eval/interval"] > first["eval/reward"] + first["eval/interval"]


def _print_table(ends: dict[str, tuple[dict[str, float], dict[str, float]]]) -> None:
    table = Table(title="Mean reward on held-out prompts, 95 % interval")
    for column in ("run", "warm-started", "trained"):
        table.add_column(column)
    for name, rows in ends.items():
        table.add_row(name, *(f"{row['eval/reward']:.3f} ± {row['eval/interval']:.3f}" for row in rows))
    Console().print(table)
