"""The quick start: train a policy and a control with shuffled rewards, then fine-tune forks and measure what they keep.

The control makes the gain believable: same data and same number of updates, but rewards of other completions. At the
end, forks of the policies go through the same fine-tuning for another task. All trainings share one set of started
processes. The policy is a real small language model, or a tiny model that is made on the spot.
"""
from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from frpo.config.loader import load_recipe
from frpo.config.retention import RetentionRecipe
from frpo.config.sections import Recipe
from frpo.data.sets.arithmetic import comparisons
from frpo.downstream.archive import write_archive
from frpo.downstream.command import REPORT, show, write_report
from frpo.downstream.pictures import draw_all
from frpo.downstream.plan import Plan, make_plan
from frpo.downstream.reading import collect
from frpo.downstream.report import section_of
from frpo.downstream.results import Results
from frpo.downstream.stages import run_plan
from frpo.downstream.tables import fork_table, policy_table
from frpo.errors import ConfigError, ModelError
from frpo.learner.smollm2 import make_smollm2
from frpo.loops.rl import Trainer
from frpo.report.curve import draw_reward_curve, read_metrics
from frpo.report.page import Section, TableText, write_page
from frpo.report.runs import chart_runs, read_runs
from frpo.rollout.engine import Sampling
from frpo.rollout.sampler import EVALUATION
from frpo.run.build import Processes, RunParts, SamplingParts, build
from frpo.run.checkpoint import CheckpointStore
from frpo.run.journal import open_journal
from frpo.telemetry.progress import say
from frpo.telemetry.timer import PhaseTimer

Answers = list[tuple[str, str]]
"""Pairs of a question and the answer to it."""

Ends = tuple[Mapping[str, float], Mapping[str, float]]
"""Metrics of the first and the last held-out evaluation of a training."""

CONTROL, MATRIX = "control", "retention"
"""Folders of the control and of the forks within the run's folder."""


@dataclass(frozen=True, kw_only=True)
class Tour:
    """The settings of one quick start.

    recipe, matrix: names of recipes. downstream: the regime of fine-tuning that forks go through. means: a description
    of that regime. shown: number of held-out prompts whose likeliest answers are shown before and after training.
    """

    recipe: str
    matrix: str
    downstream: str
    means: str
    shown: int


TOURS = {
    "tiny": Tour(recipe="quickstart", matrix="quickstart_retention", downstream="larger", shown=6,
                 means="fine-tuning for another task: which of two numbers is larger"),
    "smollm2": Tour(recipe="quickstart_smollm2", matrix="quickstart_smollm2_retention", downstream="gsm8k", shown=4,
                    means="fine-tuning on solved problems of GSM8K, school mathematics")}
"""Quick starts, by name of the trained model."""

ABOUT = (
    "The control gets the same rewards, shuffled over the completions of a step. Its updates are as strong, but their "
    "direction has no meaning: the control may lose what the model could do, and must not gain.",
    "Below, forks (copies) of the first model and of the trained policy are fine-tuned for another task. Their reward "
    "before this fine-tuning comes from other samples than the reward above, so the two numbers differ by chance.")

SAMPLE = Path(str(files("frpo.data.sets"))) / "gsm8k_sample.jsonl"
"""48 problems of GSM8K (Cobbe et al., 2021; MIT License, beside it)."""


def run_quickstart(overrides: Sequence[str], model: str = "smollm2") -> int:
    """Run all trainings, print tables, draw pictures.

    Returns 0 if the policy has a gain, the control has none, and every fork was fine-tuned; else 1. model: smollm2 or
    tiny; tiny also replaces smollm2 if that model is not available. overrides: section.key=value over the recipe.
    """
    started = time.perf_counter()
    tour, recipe = _prepared(model, overrides)
    recipe = _into_fresh_folder(recipe)
    matrix = _matrix(tour, recipe, overrides)
    answers = _run(tour, recipe, matrix)
    kept, ends = collect(matrix), {name: _ends(folder / "metrics.jsonl") for name, folder in _folders(recipe).items()}
    _report(tour, recipe, kept, ends, answers_table(*answers))
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes.")
    gained, lured = (_verdict(*both) for both in ends.values())
    print(_verdict_line(gained, lured))
    return 0 if gained and not lured and not kept.failures else 1


def prepare_downstream(folder: Path, seed: int) -> None:
    """Write the data on which forks are fine-tuned. Both matrices name this function as their setup."""
    folder.mkdir(parents=True, exist_ok=True)
    solved = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    for name, pairs in (("larger", comparisons(480, seed)),
                        ("gsm8k", [(row["question"], row["answer"]) for row in solved])):
        text = "".join(json.dumps({"prompt": asked, "response": answer}) + "\n" for asked, answer in pairs)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _run(tour: Tour, recipe: Recipe, matrix: Plan) -> tuple[Answers, Answers]:
    """Train the policy, then the control, then the forks, all on the same processes.

    Returns the policy's likeliest answers before and after training.
    """
    steps, first = recipe.run.num_steps, Path(recipe.run.dir) / "first_state"
    with build(recipe) as parts:
        parts.learner.save(str(first))
        parts.engines.push(0)
        before = _likeliest(parts.sampling, tour.shown, version=0)
        say(f"--- 1 of 3: FRPO, {steps} steps")
        state = Trainer(parts).fit()
        after = _likeliest(parts.sampling, tour.shown, version=state.policy_version)
        parts.learner.load(str(first))
        say(f"--- 2 of 3: the control, {steps} steps with rewards shuffled over the completions; it must not gain")
        with _control_parts(parts) as control:
            Trainer(control).fit()
        write_archive(matrix.recipe)
        say(f"--- 3 of 3: forks of the policies, {tour.means}")
        run_plan(matrix, Processes(pool=parts.sampling.pool, ranks=parts.learner.ranks, device=parts.learner.device))
    for folder in (first, control.run_dir / "checkpoints", *(Path(matrix.recipe.run.dir).rglob("checkpoints"))):
        shutil.rmtree(folder)  # no run continues from them, and they are large for a real model
    return before, after


def _verdict_line(gained: bool, lured: bool) -> str:
    return (f"Gain on held-out prompts beyond the first model's interval: {'yes' if gained else 'NO'}; "
            f"gain under shuffled rewards: {'YES' if lured else 'none'}")


def _folders(recipe: Recipe) -> dict[str, Path]:
    """Return names and folders of the two trainings. The policy has the same name as in the matrix."""
    run_dir = Path(recipe.run.dir)
    return {"frpo": run_dir, "control (rewards shuffled)": run_dir / CONTROL}


def _report(tour: Tour, recipe: Recipe, kept: Results, ends: Mapping[str, Ends], answers: TableText) -> None:
    """Print the tables, draw the pictures, write the page, and print the paths."""
    folders, run_dir = _folders(recipe), Path(recipe.run.dir)
    picture = draw_reward_curve({name: folder / "metrics.jsonl" for name, folder in folders.items()},
                                run_dir / "reward.png")
    show([_ends_table(ends), answers, policy_table(kept), fork_table(kept, f"through {tour.downstream}")])
    kept_picture = draw_all(kept, run_dir).get(f"Kept through {tour.downstream}", "no fork has two points to draw")
    write_report(kept)
    page = write_page("Quick start", [
        Section(title="Training", text=(_verdict_line(*(_verdict(*both) for both in ends.values())), *ABOUT),
                pictures={"Mean reward": picture}, charts={"Mean reward": chart_runs(read_runs(folders), folders)},
                tables=(_ends_table(ends), answers)),
        section_of(kept, run_dir / MATRIX)], run_dir / REPORT)
    print(f"{tour.downstream}: {tour.means}. What forks keep: {kept_picture}")
    print(f"All results on one page: {page}  picture: {picture}  model: {run_dir / 'export'}  "
          f"metrics: {run_dir / 'metrics.jsonl'}")


def answers_table(before: Answers, after: Answers) -> TableText:
    """Make a table of the same questions with the policy's answers before and after training."""
    return TableText(
        title="Likeliest answers to held-out prompts", note="temperature 0", columns=("asked", "before", "after"),
        rows=tuple((asked, was, now) for (asked, was), (_, now) in zip(before, after, strict=True)), laid_out=True)


def _prepared(model: str, overrides: Sequence[str]) -> tuple[Tour, Recipe]:
    """Make the model of the quick start if needed, and return its tour and recipe.

    If the model cannot be made, print the reason and return tour and recipe of the tiny model. Raises ConfigError if
    the overrides name another model, because the matrix would not fork that model.
    """
    tour = TOURS[model]
    recipe, own = load_recipe(tour.recipe, overrides), load_recipe(tour.recipe).model.path
    if own is not None and Path(recipe.model.path or "") != Path(own):
        raise ConfigError(f"the quick start trains only its own model, {own}, given model.path = {recipe.model.path}; "
                          f"to train another model, run `frpo train {tour.recipe} model.path=...`")
    if recipe.model.path is None or Path(recipe.model.path).is_dir():
        return tour, recipe
    try:
        make_smollm2(Path(recipe.model.path))
        return tour, recipe
    except ModelError as error:
        say(f"{error}. This quick start uses a tiny model instead, made on the spot (--model tiny)")
        return TOURS["tiny"], load_recipe(TOURS["tiny"].recipe, overrides)


def _likeliest(sampling: SamplingParts, count: int, version: int) -> Answers:
    """Sample greedy answers to the first held-out prompts, not longer than in training."""
    prompts, limit = sampling.prompts.heldout[:count], sampling.recipe.rollout.max_new_tokens
    groups = sampling.sampler.sample(
        prompts, step=0, first_sample=0, group_size=1, version=version, purpose=EVALUATION,
        sampling=Sampling(temperature=0.0, top_p=1.0, max_new_tokens=limit))
    return [(prompt.messages[-1]["content"], group.completions[0].text) for prompt, group in zip(prompts, groups)]


def _matrix(tour: Tour, recipe: Recipe, overrides: Sequence[str]) -> Plan:
    """Plan the matrix, with the quick start's overrides for the training and the measurement of its policies too."""
    found = load_recipe(tour.matrix, [f"run.dir={Path(recipe.run.dir) / MATRIX}", f"seeds=[{recipe.run.seed}]"],
                        RetentionRecipe)
    extra = {"extra": [override.replace("$", "$$") for override in overrides]}
    policies = {name: policy.model_copy(update=extra) if policy.recipe else policy
                for name, policy in found.policies.items()}
    kept = found.measure.kept.model_copy(update=extra)
    return make_plan(found.model_copy(update={
        "policies": policies, "measure": found.measure.model_copy(update={"kept": kept})}))


def _into_fresh_folder(recipe: Recipe) -> Recipe:
    """Return the recipe; append -2, -3, ... to run.dir if the folder holds an earlier quick start."""
    number = 1
    folder = Path(recipe.run.dir)
    while (folder / "metrics.jsonl").is_file():
        number += 1
        folder = Path(f"{recipe.run.dir}-{number}")
    if number == 1:
        return recipe
    say(f"{recipe.run.dir} holds an earlier quick start; this one writes into {folder}")
    return _with_run(recipe, dir=str(folder))


def _with_run(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"run": recipe.run.model_copy(update=changes)})


@contextmanager
def _control_parts(parts: RunParts) -> Iterator[RunParts]:
    """Make parts for the control: the same live parts, with a recipe that shuffles rewards and has another run.dir."""
    run_dir = parts.run_dir / CONTROL
    recipe = _with_run(parts.recipe, dir=str(run_dir), name="control", save_every=0)
    recipe = recipe.model_copy(update={"shuffle_rewards": True})
    with open_journal(recipe, CheckpointStore(run_dir, recipe), None, tuple(parts.journal.files)) as journal:
        yield replace(parts, sampling=replace(parts.sampling, recipe=recipe, timer=PhaseTimer()), journal=journal)


def _ends(metrics: Path) -> Ends:
    """Return the first and the last row of metrics with a held-out evaluation."""
    rows = [row for row in read_metrics(metrics) if "eval/reward" in row]
    return rows[0], rows[-1]


def _verdict(first: Mapping[str, float], last: Mapping[str, float]) -> bool:
    """Return whether the interval after training lies wholly above the interval before training."""
    return last["eval/reward"] - last["eval/interval"] > first["eval/reward"] + first["eval/interval"]


def _ends_table(ends: Mapping[str, Ends]) -> TableText:
    rows = tuple((name, *(f"{row['eval/reward']:.3f} ± {row['eval/interval']:.3f}" for row in both))
                 for name, both in ends.items())
    return TableText(title="Mean reward on held-out prompts", note="95 % interval", rows=rows,
                     columns=("run", "before", "trained"))
