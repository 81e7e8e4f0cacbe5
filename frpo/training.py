"""One training from a recipe to its export and the picture of its curve: what `frpo train` and `frpo finetune` do."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from frpo.builder import build
from frpo.config.loader import AnyRecipe
from frpo.config.sections import Recipe
from frpo.evaluate.curve import draw_loss_curve, draw_reward_curve
from frpo.finetune import FineTuner
from frpo.finetune_parts import build_finetune
from frpo.learner.lora import adapter_summary
from frpo.progress import remark, say
from frpo.supervise import outlive
from frpo.trainer import Trainer


def run_training(recipe: AnyRecipe) -> int:
    """Train to the last step and say where everything is. Returns 0; raises what `supervise.outlive` raises."""
    by_reward = isinstance(recipe, Recipe)
    loop, parts_of = (Trainer, build) if by_reward else (FineTuner, build_finetune)

    def fit(parts: Any) -> Any:
        remark(adapters(recipe))
        return loop(parts).fit()

    state, folder = outlive(recipe, parts_of, fit), Path(recipe.run.dir)
    draw, name = (draw_reward_curve, "reward.png") if by_reward else (draw_loss_curve, "loss.png")
    picture = draw({recipe.run.name: folder / "metrics.jsonl"}, folder / name)
    unit = "step" if by_reward else "update"
    adapter = "" if recipe.model.lora is None else f"adapter: {folder / 'export' / 'adapter'}  "
    say(f"{state.step} {unit}{'' if state.step == 1 else 's'} done. Model: {folder / 'export'}  {adapter}"
        f"metrics: {folder / 'metrics.jsonl'}  picture: {picture}")
    return 0


def adapters(recipe: AnyRecipe) -> list[str]:
    """What the recipe's adapters train and what they leave frozen, in words; nothing without adapters."""
    if recipe.model.lora is None or recipe.model.path is None:
        return []
    return [adapter_summary(recipe.model, recipe.model.path)]
