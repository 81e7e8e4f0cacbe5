"""Turn a retention recipe into stages: the trainings, their order, start models, folders and states.

    <run.dir>/seed0/setup/                     files made by the setup
    <run.dir>/seed0/policies/NAME/             a policy's own run; forks start from export/
    <run.dir>/seed0/forks/NAME/REGIME/         a fork's own run; its metrics hold the probes

Every recipe is loaded and checked here, before anything starts. A stage is done if its folder has a `done.json`, which
holds the digest of the stage's inputs. An interrupted stage continues from its own checkpoints.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from frpo.config.loader import PolicyRecipe, load_policy, load_recipe, recipe_digest, relative
from frpo.config.retention import RetentionRecipe, TaskSection
from frpo.config.sections import Recipe, repository_file
from frpo.downstream.measures import check_measures
from frpo.errors import ConfigError

DONE, FAILED = "done.json", "failed.json"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training. start: the model that the training begins with; None: its recipe makes a model on the spot.

    origin: the stage that makes the start model; None if no stage makes it.
    regime: regime of a fork; None for a policy. matrix: the folder of the whole matrix.
    """

    policy: str
    regime: str | None
    seed: int
    matrix: str
    recipe: PolicyRecipe
    start: str | None
    origin: Stage | None

    @property
    def name(self) -> str:
        return f"{self.policy}, seed {self.seed}" + (f", {self.regime}" if self.regime else "")

    @property
    def first(self) -> Stage:
        """Return the first stage in the chain of origins that leads to this stage."""
        return self.origin.first if self.origin else self

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.run.dir)

    @property
    def model(self) -> str:
        """Return the folder of the model that the stage makes."""
        return str(self.run_dir / "export")

    @property
    def digest(self) -> str:
        """Return a digest of all recipe values that the result depends on. A moved matrix keeps its digests."""
        origin = self.origin.digest if self.origin else relative(self.start, self.matrix) or ""
        length = self.recipe.run.num_steps if isinstance(self.recipe, Recipe) else self.recipe.run.num_epochs
        decisive = f"{recipe_digest(self.recipe, self.matrix)} {length} {origin}"
        return hashlib.sha256(decisive.encode()).hexdigest()[:16]

    @property
    def done(self) -> dict[str, Any] | None:
        """Return the record of the stage's end; None if the stage is not done. Raises ConfigError if the folder holds
        the result of another recipe.
        """
        record = self._read(DONE)
        if record is not None and record["digest"] != self.digest:
            raise ConfigError(f"{self.run_dir} holds the result of another recipe than {self.name} has now; choose "
                              "another run.dir, or move that folder away to run the stage again")
        return record

    @property
    def failure(self) -> str | None:
        """Return the error of the last failure; None without a failure."""
        record = self._read(FAILED)
        return None if record is None else record["error"]

    def finish(self, **facts: Any) -> None:
        _write(self.run_dir / DONE, {"digest": self.digest, **facts})
        (self.run_dir / FAILED).unlink(missing_ok=True)

    def fail(self, error: str) -> None:
        _write(self.run_dir / FAILED, {"error": error})

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.run_dir / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@dataclass(frozen=True, kw_only=True)
class SeedPlan:
    """Plan of one seed: all its stages, each after the policy that it starts from, and the recipes of the measures.

    given: model of every policy that exists already, by the policy's name.
    """

    seed: int
    folder: Path
    policies: Mapping[str, Stage]
    given: Mapping[str, str]
    forks: tuple[Stage, ...]
    kept: Recipe
    utility: Recipe | None

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (*self.policies.values(), *self.forks)

    @property
    def setup(self) -> Path:
        """Return the folder of the files that the recipe's setup makes."""
        return self.folder / "setup"

    @property
    def setup_done(self) -> Path:
        """Return the path of the file that exists after the setup has run."""
        return self.folder / "setup.done"

    def model_of(self, policy: str) -> str:
        """Return the folder of the policy's model, which may not exist yet."""
        return self.policies[policy].model if policy in self.policies else self.given[policy]

    def has(self, policy: str) -> bool:
        """Return whether the policy's model exists."""
        return policy in self.given or self.policies[policy].done is not None

    def measured(self, policy: str) -> Path:
        """Return the folder of the policy's measurements before any fork."""
        return self.folder / "policies" / policy


@dataclass(frozen=True, kw_only=True)
class Plan:
    recipe: RetentionRecipe
    seeds: tuple[SeedPlan, ...]

    @property
    def stages(self) -> Iterator[Stage]:
        return (stage for seed in self.seeds for stage in seed.stages)

    def model_of(self, policy: str) -> str:
        """Return the folder of the policy's model of the first seed."""
        return self.seeds[0].model_of(policy)

    def check_done(self) -> None:
        """Raise ConfigError if the folder of a stage holds the result of another recipe."""
        for stage in self.stages:
            stage.done  # noqa: B018

    def check(self) -> None:
        """Raise ConfigError unless one set of processes can run all stages and the plan measures what `choose` names.
        """
        first = self.seeds[0]
        check_measures(self.recipe, first.kept, [stage.recipe for stage in first.policies.values()])
        for seed in self.seeds:
            recipes = {stage.name: stage.recipe for stage in seed.stages} | {"measure.utility": seed.utility}
            for name, recipe in recipes.items():
                if recipe is not None:
                    _check_shared(name, recipe, seed.kept)


SHARED = {"learner": ("num_ranks", "ranks", "threads"), "rollout": ("num_engines", "tensor_parallel_size", "hook"),
          "model": ("dtype",)}
"""Keys that define the processes. They must be equal in all recipes that have the section."""


def _check_shared(name: str, recipe: PolicyRecipe, kept: Recipe) -> None:
    for section, keys in SHARED.items():
        for key in keys if hasattr(recipe, section) else ():
            given, wanted = getattr(getattr(recipe, section), key), getattr(getattr(kept, section), key)
            if given != wanted:
                raise ConfigError(f"{name}: {section}.{key} = {given!r}, but measure.kept has {wanted!r}; set both to "
                                  "the same value, because all recipes share one set of engines and ranks")
    if isinstance(recipe, Recipe) and recipe.model.max_length > kept.model.max_length:
        raise ConfigError(f"{name}: model.max_length = {recipe.model.max_length} is above the {kept.model.max_length} "
                          "of measure.kept, which is the limit of the engines; raise model.max_length of measure.kept")
    if isinstance(recipe, Recipe) and recipe.rollout.replay is not None:
        raise ConfigError(f"{name}: rollout.replay trains without engines, but a matrix needs them; set it to null")


def make_plan(recipe: RetentionRecipe, beside: Path = Path()) -> Plan:
    """Load every recipe and check the plan. beside: the folder of the matrix's own file, for messages about paths.

    Raises ConfigError for a mistake in a recipe; the error names the policy or the regime.
    """
    plan = Plan(recipe=recipe, seeds=tuple(_seed_plan(recipe, seed, beside) for seed in recipe.seeds))
    plan.check()
    return plan


def _seed_plan(recipe: RetentionRecipe, seed: int, beside: Path) -> SeedPlan:
    folder = Path(recipe.run.dir) / f"seed{seed}"
    words = {"seed": str(seed), "setup": str(folder / "setup"), "run": recipe.run.dir}
    policies: dict[str, Stage] = {}
    given: dict[str, str] = {}
    for name in recipe.needed():
        section = recipe.policies[name]
        if section.path is not None:
            given[name] = _filled(section.path, words, f"policies.{name}.path")
            continue
        assert section.recipe is not None, "a policy has a path or a recipe"
        policies[name] = _stage(
            f"policies.{name}", section.recipe, [*section.overrides, *section.extra], words, folder / "policies" / name,
            beside, policy=name, regime=None, start=given.get(section.start or ""),
            origin=policies.get(section.start or ""))
    forks = tuple(
        _stage(f"downstream.{regime}", section.recipe, [*section.overrides, *section.extra], words,
               folder / "forks" / name / regime, beside, policy=name, regime=regime, start=given.get(name),
               origin=policies.get(name))
        for name in recipe.forked for regime, section in recipe.regimes.items()
        if section.policies is None or name in section.policies)
    measure = recipe.measure
    return SeedPlan(seed=seed, folder=folder, policies=policies, given=given, forks=forks,
                    kept=_task("measure.kept", measure.kept, words, beside),
                    utility=None if measure.utility is None else _task("measure.utility", measure.utility, words,
                                                                       beside))


def _stage(key: str, recipe: str, overrides: list[str], words: Mapping[str, str], run_dir: Path, beside: Path, *,
           policy: str, regime: str | None, start: str | None, origin: Stage | None) -> Stage:
    """Load the recipe of a stage. start: a given model to begin with. origin: the stage that makes the start model.

    If start and origin are None, the stage begins with the recipe's own model.
    """
    model = origin.model if origin else start
    fixed = [f"run.dir={run_dir}", f"run.seed={words['seed']}", f"run.name={policy}"]
    if model is not None:
        fixed += [f"model.path={model}", "model.tiny=null"]
    found = _loaded(key, load_policy, _filled(recipe, words, key),
                    [*(_filled(o, words, key) for o in overrides), *fixed], beside)
    return Stage(policy=policy, regime=regime, seed=int(words["seed"]), matrix=words["run"], recipe=found,
                 start=found.model.path, origin=origin)


def _task(key: str, section: TaskSection, words: Mapping[str, str], beside: Path) -> Recipe:
    overrides = [*(_filled(o, words, key) for o in (*section.overrides, *section.extra)), f"run.seed={words['seed']}"]
    found = _loaded(key, load_recipe, _filled(section.recipe, words, key), overrides, beside)
    if found.evaluate.temperature != 1.0:
        raise ConfigError(f"{key}: {section.recipe} evaluates at temperature {found.evaluate.temperature:g}; the KL of "
                          "sequences is unbiased only at 1; add evaluate.temperature=1.0 to its overrides")
    if found.data.heldout == 0 and found.data.heldout_path is None:
        raise ConfigError(f"{key}: {section.recipe} holds no prompts out, so nothing can be measured; raise "
                          "data.heldout or give data.heldout_path")
    return found


def _loaded(key: str, load: Callable[[str, Sequence[str]], Any], recipe: str, overrides: Sequence[str], beside: Path
            ) -> Any:
    try:
        return load(recipe, overrides)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}{_nearby(recipe, beside)}") from None


def _nearby(recipe: str, beside: Path) -> str:
    """Return a hint at a recipe's place if its name is unknown but a file lies here or beside the matrix's file."""
    try:
        repository_file("recipes", recipe, ".yaml")
        return ""
    except FileNotFoundError:
        places = [folder / name for folder in (Path(), beside) for name in (recipe, f"{recipe}.yaml")]
        there = next((place for place in places if place.is_file()), None)
        return f"\n{there} exists: write recipe: {there}. Paths begin in the working directory" if there else ""


def _filled(text: str, words: Mapping[str, str], key: str) -> str:
    try:
        return Template(text).substitute(words)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{key}: {text!r} has an unknown $ word ({error}); allowed: "
                          f"{', '.join('$' + word for word in words)}, and $$ for a dollar sign") from None


def _write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=1), encoding="utf-8")
    unfinished.replace(path)


