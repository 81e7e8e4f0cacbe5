"""`--dry-run`: check a run before any engine starts. Print the resolved recipe, and below it the findings.

An error of the recipe is raised, as in the run. A setting with a surprising effect gives a line with "note:".
"""
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch

from frpo.cluster.device import check_backend, lacking_packages, settled
from frpo.config.loader import AnyRecipe, dump_recipe
from frpo.config.sections import Recipe
from frpo.config.text import as_yaml
from frpo.learner.model import lacking_weights
from frpo.loops.training import adapters
from frpo.rewards.trial import report_lines
from frpo.run.build import check, reward_suite, tokenizer_of, try_rewards
from frpo.run.build_finetune import FinetunePreflight, GivenRecipe, check_finetune
from frpo.telemetry.step import mishaps
from frpo.types import Pair


def show(recipe: AnyRecipe) -> None:
    """Check a recipe and print the findings. Raises an FrpoError whose message names the change that is needed."""
    lines = _of_training(recipe) if isinstance(recipe, Recipe) else _of_finetuning(recipe)
    print(as_yaml(dump_recipe(recipe)).rstrip())
    for line in (*lines, *adapters(recipe)):
        print(f"# {line}")


def _of_training(recipe: Recipe) -> list[str]:
    checked = check(recipe)
    with reward_suite(recipe, checked.prompts) as rewards:
        trial = try_rewards(rewards, recipe, checked.prompts)
    prompts = checked.prompts
    model = recipe.model.path or "made on the spot"
    return [
        *report_lines(trial.groups), *mishaps(trial.counts),
        f"checked: model {model}, resume {checked.resume[0] if checked.resume else 'from the start'}",
        *prompts.summary("prompts", recipe.data), *_notes(recipe, len(prompts.train), checked.notes)]


def _of_finetuning(recipe: GivenRecipe) -> list[str]:
    checked = check_finetune(recipe)
    examples = checked.examples
    lines = [
        f"checked: model {recipe.model.path or 'made on the spot'}, resume "
        f"{checked.resume[0] if checked.resume else 'from the start'}",
        *examples.summary(recipe.ITEMS, recipe.data),
        f"length: {checked.updates} updates of {min(recipe.data.batch_size, len(examples.train))} {recipe.ITEMS}, each "
        f"{recipe.ITEMS[:-1]} {checked.updates / checked.per_epoch:.3g} times"]
    if recipe.data.batch_size > len(examples.train):
        lines.append(f"note: data.batch_size = {recipe.data.batch_size} is more than the {len(examples.train)} "
                     f"training {recipe.ITEMS}, so every update takes all of them")
    return [*lines, *recipe.run.notes(), *_first_example(recipe, checked),
            *recipe.learner.notes(checked.updates, recipe.model.lora is not None),
            *_common_notes(recipe, engines=False)]


def _first_example(recipe: GivenRecipe, checked: FinetunePreflight) -> Iterator[str]:
    """Show the text of the first example and the part that is learned, or of a pair; each cut to 300 characters."""
    example, tokenizer = checked.examples.train[0], tokenizer_of(recipe.model)
    if isinstance(example, Pair):
        for place, ids in (("should score higher", example.first), ("lower", example.second)):
            yield f"first pair, {example.origin}, {place}: {tokenizer.decode([*ids])!r:.300}"
        return
    learned = [token for token, flag in zip(example.token_ids, example.loss_mask) if flag]
    yield f"first example, {example.origin}: {tokenizer.decode([*example.token_ids])!r:.300}"
    yield f"  learned part: {tokenizer.decode(learned)!r:.300}"


def _notes(recipe: Recipe, prompts: int, notes: Sequence[str]) -> Iterator[str]:
    per_step, steps = recipe.rollout.prompts_per_step, recipe.run.num_steps
    yield (f"length: {steps} steps x {per_step} prompts x {recipe.rollout.group_size} completions, each prompt "
           f"{per_step * steps / prompts:.3g} times")
    yield from recipe.learner.notes(recipe.updates, recipe.model.lora is not None)
    yield from notes
    if per_step > prompts:
        yield (f"note: rollout.prompts_per_step = {per_step} is more than the {prompts} training prompts, so a step "
               "draws some of them twice")
    yield from _common_notes(recipe, engines=recipe.rollout.replay is None)


def _common_notes(recipe: AnyRecipe, engines: bool) -> Iterator[str]:
    if lacking := lacking_weights(recipe.model):
        yield f"note: the run would stop with this error: {lacking}"
    device, reason = _device(recipe, engines)
    yield f"device: {device} ({reason})"
    cores = os.cpu_count() or 1
    threads = recipe.learner.num_ranks * recipe.learner.threads
    sampling = recipe.rollout.num_engines * recipe.rollout.threads if isinstance(recipe, Recipe) and engines else 0
    if device == "cpu" and max(threads, sampling) > cores:
        yield (f"note: learner.num_ranks x learner.threads = {threads} and rollout.num_engines x rollout.threads = "
               f"{sampling} on {cores} cores; more threads than cores are slow, lower the numbers")
    if "RAY_ADDRESS" in os.environ:
        yield (f"note: device and cores are those of this machine, but the run joins the Ray cluster "
               f"{os.environ['RAY_ADDRESS']}")


def _device(recipe: AnyRecipe, engines: bool) -> tuple[str, str]:
    """Return the device that run.device selects on this machine, and the reason.

    Raises ConfigError if run.device is cuda and the recipe cannot run on cuda here.
    """
    asked = recipe.run.device
    lacking = [] if asked == "cpu" else lacking_packages(engines)
    needed = recipe.learner.num_ranks
    if engines and isinstance(recipe, Recipe):
        needed += recipe.rollout.num_engines * recipe.rollout.tensor_parallel_size
    if asked != "cpu" and not lacking and "RAY_ADDRESS" not in os.environ and torch.cuda.device_count() < needed:
        lacking.append(f"the recipe needs {needed} GPUs, this machine shows {torch.cuda.device_count()}")
    device = settled(asked, lacking, quiet=True)
    if engines and isinstance(recipe, Recipe):
        check_backend(recipe, device)
    return device, f"run.device: {asked}" + (f", since {'; '.join(lacking)}" if lacking else "")
