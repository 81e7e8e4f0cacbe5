"""Define the recipe of a retention matrix: policies, their later fine-tunings, and the measures of retention.

The parts of the matrix are recipes of the other kinds, given by name with overrides. This module defines only their
connections.
"""
from __future__ import annotations

import re
from itertools import product
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from frpo.config.base import FunctionName, PathText, Section, WholeRecipe
from frpo.config.sections import Bounds
from frpo.config.text import unwritable

OVERRIDES = "values that replace those of the recipe, as section.key=value; $seed, $setup and $run stand for the " \
            "seed, the setup's folder of this seed, and run.dir"


EXTRA = "more overrides, applied after `overrides`; a YAML anchor can then share `overrides` between entries"

Pair = Annotated[tuple[str, str], Field(strict=False)]

IN_MAPPINGS, NOT_IN_NAMES = re.compile(r"[{}\"' ]"), re.compile(r"[^\w.=+\[\],-]+")
"""Characters that are removed from values in the name of a policy of `over`, and characters that are replaced by _.

The name is also the name of a folder.
"""
MAX_NAME = 200
"""Most bytes in the name of a policy or regime. File systems allow 255."""


class RetentionRunSection(Section):
    name: str = Field("retention", description="name of the matrix, shown in logs and in the report")
    dir: PathText = Field("runs/retention", description="folder of everything: policies, forks, results, report")
    restarts: int = Field(
        2, ge=0, description="most restarts of engines and ranks after one of them has died, in the whole matrix")


class PolicySection(Section):
    """A policy whose retention is measured: a model, or a recipe that trains the policy from a model."""

    path: PathText | None = Field(None, description="model that exists already, such as the folder of an export")
    recipe: PathText | None = Field(
        None, description="recipe of `frpo train` or `frpo finetune` that trains the policy")
    start: str | None = Field(None, description="policy that the recipe starts from; null: the recipe's own model")
    overrides: list[str] = Field([], description=OVERRIDES)
    extra: list[str] = Field([], description=EXTRA)
    reference: str | None = Field(
        None, description="policy to which the KL is measured, such as the model before training; null: with `recipe` "
                          "the recipe's own KL to its reference, with `path` no KL")
    over: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="section.key -> values; each combination becomes a policy with the name NAME-key=value; {}: "
                        "one policy")
    fork: bool = Field(
        True, description="true: forks of the policy are fine-tuned; false: it is a start or a reference of others. "
                          "With `path` or `reference` it is then also a point of the frontier")

    @property
    def is_point(self) -> bool:
        """Whether the policy is measured and shown although it is not forked."""
        return not self.fork and (self.path is not None or self.reference is not None)

    @model_validator(mode="after")
    def _one_source(self) -> PolicySection:
        if (self.path is None) == (self.recipe is None):
            raise ValueError("give exactly one of path (a model that exists) and recipe (how it is made)")
        if self.path is not None and (self.start is not None or self.overrides or self.extra):
            raise ValueError("path is a model that exists; start, overrides and extra belong to a recipe: leave them "
                             "out")
        return self


class RegimeSection(Section):
    """A fine-tuning that forks go through."""

    recipe: PathText = Field(description="recipe of `frpo finetune` or `frpo train`")
    means: str | None = Field(None, description="what forks are fine-tuned for, in words for the report")
    overrides: list[str] = Field([], description=OVERRIDES)
    extra: list[str] = Field([], description=EXTRA)
    policies: list[str] | None = Field(None, description="policies whose forks go through this fine-tuning; null: all")


class TaskSection(Section):
    """Held-out prompts, and the rewards of their completions."""

    means: str | None = Field(None, description="what the task is, in words for the report")
    recipe: PathText = Field(description="recipe of `frpo train`; its data, rewards, rollout and evaluate are used")
    overrides: list[str] = Field([], description=OVERRIDES)
    extra: list[str] = Field([], description=EXTRA)


class MeasureSection(Section):
    kept: TaskSection = Field(description="the task that policies were trained for")
    utility: TaskSection | None = Field(None, description="the task that forks are fine-tuned for; null: not measured")
    at: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="updates of a fork after which it is measured, besides its start and its last update; null: "
                          "eight times at equal distances, and in between as its KL grows")
    overlap: Literal["refuse", "keep"] = Field(
        "refuse", description="held-out prompts of `kept` that policies or forks are trained on. refuse: an error; "
                              "keep: measured anyway")
    max_kl: float = Field(
        2.0, gt=0, description="retention is averaged over KL from 0 to this value, in nats from the policy; pictures "
                               "show twice this range")
    exact: FunctionName | None = Field(
        None, description="'package.module:function', called with (folder, prompts, **exact_kwargs); it computes "
                          "metrics without sampling, if outcomes can be enumerated; null: only samples")
    exact_kwargs: dict[str, Any] = Field({}, description="keyword arguments of `exact`; $seed stands for the seed")

    @property
    def pictured_kl(self) -> float:
        """KL in nats up to which pictures show lines and `at: null` measures forks."""
        return 2 * self.max_kl


class CertificateSection(Section):
    samples: int = Field(
        256, ge=4, description="completions per held-out prompt; one half chooses lambda, the other half gives the "
                               "bound")
    lambdas: list[Annotated[float, Field(gt=0)]] = Field(
        [10.0, 5.0, 2.0, 1.0, 0.7, 0.5, 0.35, 0.25, 0.2], min_length=1,
        description="values from which lambda is chosen; small ones need many samples")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="confidence level of the lower limit of the bound")


class ChooseSection(Section):
    """Rule that chooses the best of all policies."""

    measure: str = Field(
        "kept/reward", description="measure whose largest value is best: a metric of policies such as kept/reward, or "
                                   "a number of the forks of a regime such as REGIME/over KL")
    bounds: dict[str, Bounds] = Field(
        {}, description="measure -> [low, high] that a policy must respect, such as {eval/kl: [null, 0.5]}; null: no "
                        "limit")


class RowSection(Section):
    """A row of a table: one measure of several forks."""

    title: str = Field(description="title of the row")
    forks: list[Pair] = Field(min_length=1, description="one [policy, regime] for each column of the table")
    measure: str = Field(
        description="metric of the last probe, such as kept/reward or exact/..., or a number of the forks, such as "
                    "over KL or over updates")
    beside: str | None = Field(None, description="a second measure, whose mean is shown in brackets; null: none")
    published: dict[str, list[float | None]] = Field(
        {}, description="label -> numbers published for the same columns; '' as label: numbers of this row's measure")


class TableSection(Section):
    """A table with the layout of a paper."""

    title: str = Field(description="title above the table")
    note: str = Field("", description="how to read the table, such as the meaning of the brackets")
    columns: list[str] = Field(min_length=1, description="headings of the columns")
    rows: list[RowSection] = Field(min_length=1, description="rows from top to bottom")
    before: str | None = Field(
        None, description="heading of a column with each row's measure before any update; null: no such column")
    percent: bool = Field(False, description="true: measures are shares, shown in per cent")
    differences: list[Pair] = Field([], description="pairs [a, b] of columns; each gives a - b, seed by seed")
    published: str | None = Field(
        None, description="source of the published numbers, shown in the heading of their column")

    @model_validator(mode="after")
    def _fits(self) -> TableSection:
        for row in self.rows:
            if len(row.forks) != len(self.columns):
                raise ValueError(f"row {row.title!r} has {len(row.forks)} forks for the {len(self.columns)} columns "
                                 f"{', '.join(self.columns)}; give one [policy, regime] for each")
            for what, numbers in row.published.items():
                if len(numbers) > len(self.columns):
                    raise ValueError(f"row {row.title!r}: published {what!r} has {len(numbers)} numbers for "
                                     f"{len(self.columns)} columns; give at most one for each")
            if row.published and self.published is None:
                raise ValueError(f"row {row.title!r} has published numbers, but the table has no `published`; set it "
                                 "to their source")
        for column in (column for pair in self.differences for column in pair):
            if column not in self.columns:
                raise ValueError(f"differences: {column!r} is not a column; choose from {', '.join(self.columns)}")
        return self


class RetentionRecipe(WholeRecipe):
    """Recipe of a whole matrix: policies x regimes x seeds."""

    COMMAND = "retention"

    run: RetentionRunSection = Field(RetentionRunSection(), description="name, folder")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [0], min_length=1, description="run.seed of every recipe; results are compared seed by seed")
    setup: FunctionName | None = Field(
        None, description="'package.module:function', called with (folder, seed); it makes the models and files of a "
                          "seed; null: none")
    policies: dict[str, PolicySection] = Field(
        min_length=1, description="policies by name: models, or recipes that train them")
    downstream: dict[str, RegimeSection] = Field(
        {}, description="regimes by name: the fine-tunings that forks go through")
    measure: MeasureSection = Field(description="tasks and measures of retention")
    certificate: CertificateSection | None = Field(
        CertificateSection(), description="lower bound of the reward after any fine-tuning; null: none")
    compare: list[Pair] = Field([], description="pairs [a, b] of policies to compare; each gives a - b, seed by seed")
    controls: list[Pair] = Field([], description="pairs of policies that must show no difference")
    tables: list[TableSection] = Field([], description="additional tables of the report, each with a picture")
    choose: ChooseSection | None = Field(None, description="rule that chooses the best policy; null: none is chosen")
    only_policies: list[str] | None = Field(
        None, description="run only these policies, their starts and their references; null: all")
    only_regimes: list[str] | None = Field(None, description="run only these regimes; null: all")
    quick: list[str] = Field([], description="overrides of this recipe that --quick applies")

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        """Expand each policy with `over` to several policies, each with its values as overrides."""
        policies = values.get("policies") if isinstance(values, dict) else None
        if not isinstance(policies, dict):
            return values
        expanded: dict[str, Any] = {}
        for name, policy in policies.items():
            grid = policy.get("over") if isinstance(policy, dict) else None
            own = policy.get("extra", []) if isinstance(policy, dict) else []
            if not (isinstance(name, str) and isinstance(grid, dict) and grid and all(grid.values())
                    and all(isinstance(key, str) for key in grid) and not any(unwritable(grid))
                    and all(isinstance(each, list) for each in (own, *grid.values()))):
                expanded[name] = policy  # as it is, or to be refused
                continue
            for combination in product(*grid.values()):
                chosen = dict(zip(grid, combination))
                label = "-".join([name, *(f"{key.rpartition('.')[2]}={_yaml(value)}" for key, value in chosen.items())])
                label = NOT_IN_NAMES.sub("_", IN_MAPPINGS.sub("", label))
                if label in expanded or label in policies:
                    raise ValueError(f"policies.{name}.over: two policies get the name {label!r}; rename one, or give "
                                     "values with different letters and digits")
                extra = [*own, *(f"{key}={_yaml(value)}" for key, value in chosen.items())]
                expanded[label] = {**policy, "over": {}, "extra": extra}
        return {**values, "policies": expanded}

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds must differ, given {seeds}")
        return seeds

    @model_validator(mode="after")
    def _names(self) -> RetentionRecipe:
        for kind, names in (("policy", self.policies), ("regime", self.downstream)):
            for name in names:
                if not name or set(name) & set("/\\:") or name.startswith("."):
                    raise ValueError(f"{kind} {name!r} cannot name a folder; use letters, digits, - and _")
                if len(name.encode()) > MAX_NAME:
                    raise ValueError(f"{kind} {name!r} has {len(name.encode())} bytes, too long for the name of a "
                                     f"folder; shorten it to at most {MAX_NAME}")
        forks = [name for name, policy in self.policies.items() if policy.fork]
        if not forks:
            raise ValueError("no policy has fork: true, so there is nothing to measure; set fork: true for one or more")
        for name, policy in self.policies.items():
            for key, other in (("start", policy.start), ("reference", policy.reference)):
                if other is not None and other not in self.policies:
                    raise ValueError(f"policies.{name}.{key}: {other!r} is not a policy; choose from "
                                     f"{', '.join(self.policies)}")
        self._check_references()
        named = {key: [name for pair in getattr(self, key) for name in pair] for key in ("compare", "controls")}
        if self.only_policies is not None and not {*forks} & {*self.only_policies}:
            given = ", ".join(map(repr, self.only_policies)) or "none"
            raise ValueError(f"only_policies: a forked policy is needed, given {given}; choose from "
                             f"{', '.join(forks)}")
        points = [name for name, policy in self.policies.items() if policy.is_point]
        named["only_policies"] = [name for name in self.only_policies or [] if name not in points]
        for name in self.only_regimes or []:
            if name not in self.downstream:
                raise ValueError(f"only_regimes: {name!r} is not a regime; choose from {', '.join(self.downstream)}")
        for regime, section in self.downstream.items():
            named[f"downstream.{regime}.policies"] = section.policies or []
        for key, chosen in named.items():
            for name in chosen:
                if name not in forks:
                    raise ValueError(f"{key}: {name!r} is not a forked policy; choose from {', '.join(forks)}")
        titles = [table.title for table in self.tables]
        if len(set(titles)) < len(titles):
            raise ValueError(f"tables: titles must differ, given {', '.join(titles)}")
        for table in self.tables:
            for row in table.rows:
                self._check_row(f"tables {table.title!r}, row {row.title!r}", row, forks)
        self.order()
        return self

    def _check_references(self) -> None:
        """Check that every chain of references ends at a policy without one: no model is trained from itself."""
        for name in self.policies:
            chain = [name]
            while (reference := self.policies[chain[-1]].reference) is not None:
                if reference in chain:
                    raise ValueError(f"policies.{name}.reference: {' -> '.join([*chain, reference])} is a circle; name "
                                     "the policy that each was trained from, and none for the first")
                chain.append(reference)

    def _check_row(self, where: str, row: RowSection, forks: list[str]) -> None:
        for policy, regime in row.forks:
            if policy not in forks:
                raise ValueError(f"{where}: {policy!r} is not a forked policy; choose from {', '.join(forks)}")
            if regime not in self.downstream:
                raise ValueError(f"{where}: {regime!r} is not a regime; choose from {', '.join(self.downstream)}")
            if policy not in (self.downstream[regime].policies or forks):
                raise ValueError(f"{where}: downstream.{regime}.policies does not have {policy!r}; add it there")

    @property
    def forked(self) -> list[str]:
        """Policies that are fine-tuned further and measured."""
        return [name for name, policy in self.policies.items()
                if policy.fork and (self.only_policies is None or name in self.only_policies)]

    @property
    def shown(self) -> list[str]:
        """Policies of tables and of the frontier: forked policies, then others that have a `path` or a `reference`."""
        return self.forked + [name for name, policy in self.policies.items() if policy.is_point
                              and (self.only_policies is None or name in self.only_policies)]

    @property
    def regimes(self) -> dict[str, RegimeSection]:
        return {name: section for name, section in self.downstream.items()
                if self.only_regimes is None or name in self.only_regimes}

    def needed(self) -> list[str]:
        """List the shown policies, their starts and their references, each policy after its start."""
        wanted: set[str] = set()
        waiting = self.shown
        while waiting:
            name = waiting.pop()
            if name not in wanted:
                wanted.add(name)
                others = (self.policies[name].start, self.policies[name].reference)
                waiting += [other for other in others if other is not None]
        return [name for name in self.order() if name in wanted]

    def order(self) -> list[str]:
        """List all policies, each after its start. Raises ValueError if policies start from each other."""
        done: list[str] = []
        while len(done) < len(self.policies):
            ready = [name for name, policy in self.policies.items()
                     if name not in done and (policy.start is None or policy.start in done)]
            if not ready:
                waiting = [name for name in self.policies if name not in done]
                raise ValueError(f"policies {', '.join(waiting)} start from each other; set start to null for one of "
                                 "them")
            done += ready
        return done


def _yaml(value: Any) -> str:
    """Format a value as YAML on one line, as in an override."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
