"""Check a seed of a matrix before it begins: models, data, rewards, and stages that train on held-out prompts.

A run makes these checks before its first engine starts. `--dry-run` makes the checks and stops. Every error names the
policy, the stage or the measure that it concerns.
"""
from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import dump_recipe
from frpo.config.model import ModelSection
from frpo.config.retention import RetentionRecipe
from frpo.config.sections import Recipe
from frpo.data.examples import load_examples
from frpo.data.prompts import PromptSet, load_prompts
from frpo.downstream.before import DISTANCE, SAMPLES, complete
from frpo.downstream.plan import DONE, Plan, SeedPlan, Stage
from frpo.downstream.probe import Task
from frpo.errors import ConfigError, DataError, FrpoError, ModelError
from frpo.learner.model import check_reference, vocabulary_difference
from frpo.loading import load_function
from frpo.run.build import check_prompts, tokenizer_of, tried_rewards
from frpo.run.checkpoint import MARKER
from frpo.types import Example

HELD_OUT = "heldout.json"
KEPT = "measure.kept"
MADE = tuple(f"{of}/{what}" for of in ("policies/*", "forks/*/*")
             for what in (DONE, SAMPLES, DISTANCE, f"checkpoints/*/{MARKER}"))
"""Files in the folder of a seed that show that the seed has begun: a stage is done or has a checkpoint, or a policy was
measured.
"""


def check_plan(plan: Plan) -> list[str]:
    """Check every seed that is not complete, without writing anything. Returns the names of stages, policies and
    measures that cannot be checked before the setup has run.
    """
    waiting: dict[str, None] = {}
    for seed in plan.seeds:
        if complete(plan.recipe, seed):
            continue
        unmade = _unmade(plan.recipe, seed)
        waiting |= dict.fromkeys(unmade)
        check_seed(plan.recipe, seed, unmade)
        with tasks_of(seed, unmade) as tasks:
            seen = _trained_on(seed, unmade)
            if tasks and tasks[0].name == "kept":
                _heldout_record(seed, tasks[0].prompts, seen, plan.recipe.measure.overlap)
    return list(waiting)


def check_seed(recipe: RetentionRecipe, seed: SeedPlan, unmade: Sequence[str] = ()) -> None:
    """Check setup and exact functions, models, references and rewards, except those that are `unmade`. Raises an
    FrpoError that names what to change.
    """
    setup = None if seed.setup_done.is_file() else recipe.setup
    for key, function in (("setup", setup), ("measure.exact", recipe.measure.exact)):
        if function is not None:
            load_function(function, key, ConfigError)
    made = replace(seed, given={name: path for name, path in seed.given.items() if f"policies.{name}" not in unmade},
                   policies={name: stage for name, stage in seed.policies.items() if stage.name not in unmade},
                   forks=tuple(stage for stage in seed.forks if stage.name not in unmade))
    if KEPT not in unmade:
        check_models(made)
        check_references(recipe, made)
    check_rewards(made)


@contextmanager
def tasks_of(seed: SeedPlan, unmade: Sequence[str] = ()) -> Iterator[list[Task]]:
    """Yield the measured tasks, each with held-out prompts and running rewards."""
    with ExitStack() as stack:
        found = []
        for name, recipe in (("kept", seed.kept), ("utility", seed.utility)):
            if recipe is not None and f"measure.{name}" not in unmade:
                with about(f"measure.{name}, seed {seed.seed}"):
                    prompts = check_prompts(recipe)
                    rewards = stack.enter_context(tried_rewards(recipe, prompts))
                found.append(Task(name=name, recipe=recipe, prompts=prompts, rewards=rewards))
        yield found


def check_models(seed: SeedPlan) -> None:
    """Raise ModelError if a policy's model is missing, or its tokenizer is not the one of measure.kept."""
    with about(f"{KEPT}, seed {seed.seed}"):
        measured = tokenizer_of(seed.kept.model)
    first = {name: _model_at(seed, path) for name, path in seed.given.items()}
    first |= {name: stage.first.recipe.model for name, stage in seed.policies.items()}
    for name, model in first.items():
        with about(f"policy {name}, seed {seed.seed}"):
            differing = vocabulary_difference(measured, tokenizer_of(model))
            if differing:
                raise ModelError(f"its tokenizer differs from that of {KEPT} ({differing}); use models of one family, "
                                 "because all policies of a matrix share their engines")


def check_references(recipe: RetentionRecipe, seed: SeedPlan) -> None:
    """Raise ModelError if a policy and its reference both exist and their logits differ in size."""
    for name, path in seed.given.items():
        reference = recipe.policies[name].reference
        if reference is not None and reference in seed.given:
            model = _model_at(seed, path)
            with about(f"policies.{name}.reference = {reference}, seed {seed.seed}"):
                check_reference(model, seed.given[reference], tokenizer_of(model))


def check_rewards(seed: SeedPlan) -> None:
    """Try the rewards of the stages that are still to run, equal rewards once. Raises an error that names the stage."""
    tried = set()
    for stage in seed.stages:
        recipe = stage.recipe
        if stage.done or not isinstance(recipe, Recipe) or (key := str((recipe.rewards, recipe.data))) in tried:
            continue
        tried.add(key)
        with about(stage.name):
            prompts = load_prompts(recipe.data, tokenizer_of(stage.first.recipe.model), recipe.run.seed)
            with tried_rewards(recipe, prompts, actors=False):
                pass


def record_heldout(seed: SeedPlan, prompts: PromptSet, allowed: str) -> None:
    """Record, before anything is trained, which prompts are held out and how many of them will be trained on.

    Raises DataError if the matrix began with other held-out prompts, or if there is an overlap that is refused.
    """
    record = _heldout_record(seed, prompts, _trained_on(seed), allowed)
    path = seed.folder / HELD_OUT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")


def has_begun(matrix: Path) -> bool:
    """Return whether the folder of a matrix holds any file that depends on the choice of held-out prompts."""
    return any(next(matrix.glob(f"seed*/{made}"), None) for made in MADE)


def forget_heldout(matrix: Path) -> None:
    """Remove the records of held-out prompts if the matrix has not begun. Each seed then writes its record anew."""
    if not has_begun(matrix):
        for path in matrix.glob(f"seed*/{HELD_OUT}"):
            path.unlink()


@contextmanager
def about(name: str) -> Iterator[None]:
    """Put `name`, the subject of an error, before its message."""
    try:
        yield
    except FrpoError as error:
        raise type(error)(f"{name}: {error}") from None


def _unmade(recipe: RetentionRecipe, seed: SeedPlan) -> list[str]:
    """List the names of stages, given policies and measures that need a file which the setup has still to make."""
    if recipe.setup is None or seed.setup_done.is_file():
        return []
    needs: dict[str, Any] = {f"policies.{name}": path for name, path in seed.given.items()}
    needs |= {KEPT: dump_recipe(seed.kept), "measure.utility": seed.utility and dump_recipe(seed.utility)}
    needs |= {stage.name: (dump_recipe(stage.recipe), str(stage.first.recipe.model.path)) for stage in seed.stages}
    return [name for name, values in needs.items() if str(seed.setup) in str(values)]


def _heldout_record(seed: SeedPlan, prompts: PromptSet, seen: dict[str, set[tuple[int, ...]]], allowed: str
                    ) -> dict[str, Any]:
    """Make the record of held-out prompts. seen: prompts by the stage that trains on them.

    Raises DataError for fewer than two held-out prompts, for a refused overlap, or if the matrix has begun with others.
    """
    heldout = {prompt.token_ids: prompt.uid for prompt in prompts.heldout}
    if len(heldout) < 2:
        raise DataError(f"{KEPT} holds out {len(heldout)} prompt(s), but an interval needs at least 2; give more in "
                        "data.heldout_path, or raise data.heldout")
    overlap = {name: len(set(heldout) & prompts) for name, prompts in seen.items()}
    record = {"heldout": len(heldout), "uids": sorted(heldout.values()), "overlap": overlap}
    path = seed.folder / HELD_OUT
    others = path.is_file() and json.loads(path.read_text(encoding="utf-8"))["uids"] != record["uids"]
    if others and has_begun(seed.folder.parent):
        raise DataError(f"{path} lists other held-out prompts than {KEPT} has now; choose another run.dir "
                        "(`frpo sweep`: --dir), or restore the data with which this matrix began")
    trained = {name: count for name, count in overlap.items() if count}
    if trained and allowed == "refuse":
        told = ", ".join(f"{count} of {name}" for name, count in trained.items())
        raise DataError(f"some of the {len(heldout)} held-out prompts of {KEPT} are also training prompts: {told}. "
                        "Hold out other prompts, or set measure.overlap to keep to measure on training data")
    return record


def _trained_on(seed: SeedPlan, unmade: Sequence[str] = ()) -> dict[str, set[tuple[int, ...]]]:
    """Return the token ids of every prompt that a stage trains on, by POLICY or POLICY/REGIME."""
    found = {}
    for stage in seed.stages:
        if stage.name not in unmade:
            with about(stage.name):
                found[f"{stage.policy}/{stage.regime}" if stage.regime else stage.policy] = set(_prompts_of(stage))
    return found


def _prompts_of(stage: Stage) -> list[tuple[int, ...]]:
    recipe, tokenizer = stage.recipe, tokenizer_of(stage.first.recipe.model)
    if isinstance(recipe, FinetuneRecipe):
        examples = load_examples(recipe.data, tokenizer, recipe.model.max_length, recipe.run.seed).train
        return [_prompt_of(example) for example in examples]
    return [prompt.token_ids for prompt in load_prompts(recipe.data, tokenizer, recipe.run.seed).train]


def _prompt_of(example: Example) -> tuple[int, ...]:
    return example.token_ids[:example.loss_mask.index(True)]


def _model_at(seed: SeedPlan, path: str) -> ModelSection:
    """Return the model section of measure.kept for a model that exists at `path`."""
    return seed.kept.model.model_copy(update={"path": path, "tiny": None})
