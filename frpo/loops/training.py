"""Run one training, from a recipe to the exported model and the picture of its reward or loss curve."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frpo.cluster.launcher import follows, with_launcher_ranks
from frpo.cluster.team import follow, meet
from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import AnyRecipe
from frpo.config.preference import RewardModelRecipe
from frpo.config.sections import Recipe
from frpo.learner.lora import adapter_summary
from frpo.loops.reward_model import RewardModelTrainer
from frpo.loops.rl import Trainer
from frpo.loops.sft import FineTuner
from frpo.plan.command import note_misfits
from frpo.report.curve import draw_loss_curve, draw_preference_curve, draw_reward_curve, read_metrics
from frpo.run.build import build
from frpo.run.build_finetune import build_finetune
from frpo.run.restart import run_with_restarts
from frpo.telemetry.progress import remark, say


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a kind of recipe is trained and shown. metric: the held-out metric of the last line. unit: of the length."""

    loop: Callable[[Any], Trainer | FineTuner]
    build: Callable[[Any], AbstractContextManager[Any]]
    draw: Callable[[Mapping[str, Path], Path], Path]
    picture: str
    metric: str
    unit: str


WAYS: Mapping[type, Way] = {
    Recipe: Way(loop=Trainer, build=build, draw=draw_reward_curve, picture="reward.png", metric="eval/reward",
                unit="step"),
    FinetuneRecipe: Way(loop=FineTuner, build=build_finetune, draw=draw_loss_curve, picture="loss.png",
                        metric="eval/nll", unit="update"),
    RewardModelRecipe: Way(loop=RewardModelTrainer, build=build_finetune, draw=draw_preference_curve,
                           picture="accuracy.png", metric="eval/accuracy", unit="update")}


def run_training(recipe: AnyRecipe) -> None:
    """Train to the last step, from the newest checkpoint if there is one, and print the paths of all results.

    Under a launcher, the other ranks follow the first rank. Raises the errors of `restart.run_with_restarts`.
    """
    recipe = with_launcher_ranks(recipe)
    meet(recipe)
    if follows():
        follow(recipe)
        return
    note_misfits(recipe)
    way = WAYS[type(recipe)]

    def fit(parts: Any) -> Any:
        remark(adapters(recipe))
        return way.loop(parts).fit()

    state, folder = run_with_restarts(recipe, way.build, fit), Path(recipe.run.dir)
    picture = way.draw({recipe.run.name: folder / "metrics.jsonl"}, folder / way.picture)
    say(heldout_line(folder / "metrics.jsonl", way.metric))
    unit = way.unit
    adapter = "" if recipe.model.lora is None else f"adapter: {folder / 'export' / 'adapter'}  "
    samples = f"samples: {folder / 'samples.jsonl'}  " if (folder / "samples.jsonl").is_file() else ""
    say(f"{state.step} {unit}{'' if state.step == 1 else 's'} done. Model: {folder / 'export'}  {adapter}"
        f"metrics: {folder / 'metrics.jsonl'}  {samples}picture: {picture}")


def heldout_line(metrics: Path, name: str) -> str:
    """Describe the first and the last held-out value of a metric, with its 95 % interval if there is one."""
    values = []
    for row in read_metrics(metrics):
        if name in row:
            interval = row.get("eval/interval", math.nan)
            values.append(f"{row[name]:.3g}" + ("" if math.isnan(interval) else f" ± {interval:.2g}"))
    return f"held-out {name.removeprefix('eval/')}: {' -> '.join(values[:1] + values[1:][-1:]) or 'not measured'}"


def adapters(recipe: AnyRecipe) -> list[str]:
    """Describe in words what the recipe's adapters train and leave frozen.

    Return an empty list without adapters or without model.path.
    """
    if recipe.model.lora is None or recipe.model.path is None:
        return []
    return [adapter_summary(recipe.model, recipe.model.path, scores=recipe.learner_spec.is_reward_model)]
