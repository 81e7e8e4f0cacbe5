"""Read the metrics and samples of finished stages from files and combine them into `Results`.

Missing values are left out; `caveats` reports them. This module draws nothing.
"""
from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from frpo.config.sections import Recipe
from frpo.downstream.before import SAMPLES, evaluation, read_distance, rows_of
from frpo.downstream.caveats import caveats
from frpo.downstream.certificate import certify
from frpo.downstream.checks import HELD_OUT
from frpo.downstream.plan import Plan, SeedPlan, Stage
from frpo.downstream.results import UTILITY, Certified, Fork, Results
from frpo.downstream.retained import ForkPath, read_path, summary
from frpo.downstream.stages import KL, STARTS
from frpo.errors import ConfigError
from frpo.report.curve import read_metrics

PROBED = {"kept/reward", "kept/decile", "kept/interval"}
"""Metrics that every probe measures."""


def collect(plan: Plan) -> Results:
    """Collect everything that has been measured so far. Raises ConfigError if no stage is done."""
    measured = [(seed, stage, path) for seed in plan.seeds for stage in seed.forks if stage.done
                if (path := read_path(rows_of(stage), KL)).metrics.keys() >= PROBED]
    if not any(stage.done for stage in plan.stages):
        raise ConfigError(f"{plan.recipe.run.dir} has no finished stage; run `frpo retention` first")
    exact = bool(measured) and all({"exact/reward", "exact/decile"} <= set(path.metrics) for _, _, path in measured)
    reward, decile = ("exact/reward", "exact/decile") if exact else ("kept/reward", "kept/decile")
    paths: dict[Fork, ForkPath] = {(stage.policy, stage.regime or "", stage.seed): path for _, stage, path in measured}
    summaries: dict[Fork, dict[str, float]] = {}
    for fork, path in paths.items():
        summaries[fork] = summary(path, reward, decile, plan.recipe.measure.max_kl)
        if UTILITY in path.metrics:
            summaries[fork] |= {"utility": float(path.metrics[UTILITY][-1])}
    policies: dict[tuple[str, int], Mapping[str, float]] = {}
    for seed in plan.seeds:
        known = {stage.policy: evaluation(stage) for stage in seed.policies.values() if stage.done}
        known |= {name: _given(plan, name) for name in seed.given}
        policies |= {(name, seed.seed): _with_distance(plan, seed, name, metrics) | _start(paths, name, seed.seed)
                     for name, metrics in known.items()}
    untrained = {(stage.policy, seed.seed): before for seed in plan.seeds for stage in seed.policies.values()
                 if stage.done and (before := _untrained(plan, seed, stage, paths))}
    found = Results(
        plan=plan, reward=reward, decile=decile, paths=paths, summaries=summaries, policies=policies,
        untrained=untrained,
        certified=_certificates(plan, paths), states=_states(plan), heldout=_heldout(plan),
        failures={stage.name: stage.failure for stage in plan.stages if stage.failure and not stage.done},
        starts=_starts(plan), pushes=tuple(
            float(value) for path in paths.values() for value in path.metrics.get("time/push", ())),
        seconds={stage.name: stage.done["seconds"] for stage in plan.stages if stage.done})
    return replace(found, warnings=tuple(caveats(found)))


def _with_distance(plan: Plan, seed: SeedPlan, policy: str, metrics: dict[str, float]) -> dict[str, float]:
    """Add the metrics that were measured against the policy's reference. Without a `reference` in the recipe, add only
    metrics that are not known.
    """
    measured = read_distance(plan.recipe, seed, policy) or {}
    if plan.recipe.policies[policy].reference is not None:  # its training may have had another reference
        return {name: value for name, value in metrics.items() if not name.startswith("eval/kl")} | measured
    known = "kept/reward" in metrics
    return {name: value for name, value in measured.items() if not known or name.startswith("eval/kl")} | metrics


def _given(plan: Plan, policy: str) -> dict[str, float]:
    """Return the known metrics of a given policy. A model from which other policies begin, or against which they are
    measured, is their reference. Its KL to the reference is 0.
    """
    others = [section for name, section in plan.recipe.policies.items() if name != policy]
    is_reference = any(policy in (section.start, section.reference) for section in others)
    return {"eval/kl": 0.0} if is_reference and plan.recipe.policies[policy].reference is None else {}


def _untrained(plan: Plan, seed: SeedPlan, stage: Stage, paths: Mapping[Fork, ForkPath]) -> dict[str, float]:
    """Return the metrics that a policy's training measured on held-out prompts before the first update. The result is
    empty if the policy's current reward was measured on another task.
    """
    section = plan.recipe.policies[stage.policy]
    first = next((row for row in rows_of(stage) if row["step"] == 0 and "eval/reward" in row), None)
    again = section.reference is not None or any(fork[::2] == (stage.policy, seed.seed) for fork in paths)
    if first is None or (again and not _same_task(stage, seed)):
        return {}
    found = {"kept/reward": first["eval/reward"], "kept/interval": first.get("eval/interval", math.nan)}
    return found | ({"eval/kl": 0.0} if section.reference in (None, section.start) else {})


def _same_task(stage: Stage, seed: SeedPlan) -> bool:
    """Return whether a training evaluates the task of `measure.kept`: the same completions of the same prompts."""
    if not isinstance(stage.recipe, Recipe):
        return False
    own, kept = ((each.data, each.rewards, each.rollout.max_new_tokens, each.evaluate.temperature)
                 for each in (stage.recipe, seed.kept))
    return own == kept


def _start(paths: Mapping[Fork, ForkPath], policy: str, seed: int) -> dict[str, float]:
    """Return the metrics of the first fork's probe before its first update; empty without a fork."""
    for (name, _, number), path in paths.items():
        if (name, number) == (policy, seed):
            return {metric: float(values[0]) for metric, values in path.metrics.items()
                    if metric.startswith(("kept/", "utility/", "exact/"))}
    return {}


def _certificates(plan: Plan, paths: Mapping[Fork, ForkPath]) -> dict[tuple[str, int], Certified]:
    section = plan.recipe.certificate
    found: dict[tuple[str, int], Certified] = {}
    if section is None:
        return found
    for seed in plan.seeds:
        for name in plan.recipe.forked:
            file = seed.measured(name) / SAMPLES
            if not file.is_file():
                continue
            with np.load(file) as stored:
                rewards_PN = stored["rewards_PN"]
            if not np.isfinite(rewards_PN).all():
                continue
            points = [(kl, reward, half) for (p, _, s), path in paths.items() if (p, s) == (name, seed.seed)
                      for kl, reward, half in zip(path.kl_S, path.metrics["kept/reward"],
                                                  path.metrics["kept/interval"], strict=True)
                      if not math.isnan(kl + reward)]
            found[name, seed.seed] = Certified(
                certificate=certify(rewards_PN, section.lambdas, section.confidence),
                points=tuple((float(kl), float(reward), float(half)) for kl, reward, half in points))
    return found


def _states(plan: Plan) -> dict[tuple[str, str | None], dict[str, list[int]]]:
    states: dict[tuple[str, str | None], dict[str, list[int]]] = {}
    for stage in plan.stages:
        state = "done" if stage.done else "failed" if stage.failure else "missing"
        states.setdefault((stage.policy, stage.regime), {}).setdefault(state, []).append(stage.seed)
    return states


def _starts(plan: Plan) -> tuple[float, ...]:
    path = Path(plan.recipe.run.dir) / STARTS
    return tuple(row["seconds"] for row in read_metrics(path)) if path.is_file() else ()


def _heldout(plan: Plan) -> dict[int, Any]:
    def read(seed: SeedPlan) -> dict[str, Any] | None:
        path = seed.folder / HELD_OUT
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    return {seed.seed: record for seed in plan.seeds if (record := read(seed))}
