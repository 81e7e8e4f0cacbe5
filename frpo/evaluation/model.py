"""`frpo evaluate`: measure a model folder on a recipe's held-out prompts, with the recipe's rewards, without a learner.

Only rollout engines are started, so there is no KL to a reference. `heldout` defines the metrics.
"""
from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from frpo.config.loader import recipe_digest
from frpo.config.sections import Recipe
from frpo.data.source import looks_local
from frpo.errors import ConfigError, here
from frpo.evaluation.heldout import heldout_metrics, interval_of, scored_heldout
from frpo.run.build import build_engines, check_prompts
from frpo.run.traces import scored_row
from frpo.telemetry.jsonl import JsonlFile
from frpo.types import ScoredGroup

RESULT = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics of one model, and the scored completions from which they were computed."""

    metrics: Mapping[str, float]
    scored: Sequence[ScoredGroup]
    data_digest: str


def run_evaluate(recipe: Recipe, model: str, result: str | None) -> int:
    """Evaluate, print the table, and write the metrics into `result`, or into evaluation.json in the model's folder.

    Also write the completions beside the metrics, as <name>.traces.jsonl, unless telemetry.traces is off.
    """
    path = result_path(model, result)
    evaluation = evaluate_model(recipe, model)
    record = {
        "model": model, "recipe": recipe.run.name, "recipe_digest": recipe_digest(of_model(recipe, model)),
        "data_digest": evaluation.data_digest, "seed": recipe.run.seed, "samples": recipe.evaluate.samples,
        "temperature": recipe.evaluate.temperature,
        "metrics": {k: v if math.isfinite(v) else None for k, v in evaluation.metrics.items()}}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print_table(model, evaluation.metrics)
    print(f"metrics: {path}")
    if recipe.telemetry.traces:
        print(f"completions: {write_traces(path, evaluation.scored)}")
    return 0


def write_traces(result: Path, scored: Sequence[ScoredGroup]) -> Path:
    """Write one JSON object per held-out prompt into a file beside the metrics; replace an earlier file."""
    path = result.with_suffix(".traces.jsonl")
    path.unlink(missing_ok=True)
    file = JsonlFile(path)
    for group in scored:
        file.append(scored_row(group))
    file.close()
    return path


def evaluate_model(recipe: Recipe, model: str) -> Evaluation:
    """Sample and score every held-out prompt of `recipe` with the model at `model` instead of the recipe's.

    Raises ConfigError if the recipe has no held-out prompts.
    """
    recipe = of_model(recipe, model)
    prompts = check_prompts(recipe)
    if not prompts.heldout:
        raise ConfigError(f"there are no held-out prompts to evaluate on; raise data.heldout (given "
                          f"{recipe.data.heldout}) or give data.heldout_path")
    with build_engines(recipe, prompts) as serving:
        scored = scored_heldout(serving, step=0, version=0)
        return Evaluation(metrics=heldout_metrics(scored, recipe.evaluate, constraint=recipe.objective.constraint),
                          scored=scored,
                          data_digest=prompts.digest)


def of_model(recipe: Recipe, model: str) -> Recipe:
    """Return the recipe with its model replaced by the whole weights at `model`."""
    section = recipe.model.model_copy(update={"path": model, "tiny": None, "lora": None})
    return recipe.model_copy(update={"model": section})


def result_path(model: str, result: str | None) -> Path:
    """Return the file for the metrics. Raises ConfigError, before any work, if the file cannot be written."""
    if result is None and not Path(model).is_dir() and looks_local(model):
        raise ConfigError(f"model {model!r} is not a folder ({here()}); give a run's export, another folder with a "
                          "Hugging Face model, or a hub id")
    if result is None and not Path(model).is_dir():
        raise ConfigError(f"{model!r} is not a folder, so it cannot hold {RESULT}; give --json PATH, or a folder as "
                          "model")
    path = Path(model) / RESULT if result is None else Path(result)
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise ConfigError(f"{path} cannot be written; give --json PATH in an existing folder that you may write to")
    return path


def print_table(model: str, metrics: Mapping[str, float]) -> None:
    """Print each metric with its value and, if there is one, the half-width of its 95 % interval."""
    table = Table(title=f"{model} on {metrics['eval/prompts']:.0f} held-out prompts, 95 % interval")
    for column in ("metric", "value", "interval"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, value, interval in table_rows(metrics):
        table.add_row(name, f"{value:.4g}", "" if interval is None else f"± {interval:.2g}")
    Console().print(table)


def table_rows(metrics: Mapping[str, float]) -> list[tuple[str, float, float | None]]:
    """List (metric, value, interval or None), each interval in the row of its metric."""
    owners = {interval_of(name): name for name in metrics}
    return [(name.removeprefix("eval/"), value, metrics.get(interval_of(name)))
            for name, value in metrics.items() if owners.get(name) is None]
