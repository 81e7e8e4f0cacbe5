"""The files of finished stages become `Results`: metrics and samples are read and put together.

What is missing is left out, and told by `caveats`. Nothing is drawn here.
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
from frpo.errors import ConfigError
from frpo.evaluate.certificate import certify
from frpo.evaluate.curve import read_metrics
from frpo.evaluate.retained import ForkPath, read_path, summary
from frpo.retention.before import SAMPLES, read_distance
from frpo.retention.caveats import caveats
from frpo.retention.plan import Plan, SeedPlan, Stage
from frpo.retention.results import UTILITY, Certified, Fork, Results
from frpo.retention.stages import HELD_OUT, KL, STARTS

PROBED = {"kept/reward", "kept/decile", "kept/interval"}
"""What every probe measures."""


def collect(plan: Plan) -> Results:
    """Everything that has been measured so far. Raises ConfigError where that is nothing."""
    measured = [(seed, stage, path) for seed in plan.seeds for stage in seed.forks if stage.done
                if (path := read_path(_rows(stage), KL)).metrics.keys() >= PROBED]
    if not any(stage.done for stage in plan.stages):
        raise ConfigError(f"{plan.recipe.run.dir} has no finished stage to tell of; run `frpo retention` first")
    exact = bool(measured) and all({"exact/reward", "exact/decile"} <= set(path.metrics) for _, _, path in measured)
    reward, decile = ("exact/reward", "exact/decile") if exact else ("kept/reward", "kept/decile")
    paths = {(stage.policy, stage.regime, stage.seed): path for _, stage, path in measured}
    summaries = {}
    for fork, path in paths.items():
        summaries[fork] = summary(path, reward, decile, plan.recipe.measure.max_kl)
        if UTILITY in path.metrics:
            summaries[fork] |= {"utility": float(path.metrics[UTILITY][-1])}
    policies: dict[tuple[str, int], Mapping[str, float]] = {}
    for seed in plan.seeds:
        known = {stage.policy: _evaluation(stage) for stage in seed.policies.values() if stage.done}
        for name, metrics in known.items():
            if plan.recipe.policies[name].reference is not None:
                metrics.pop("eval/kl", None)  # of its training, which may have had another reference
        known |= {name: _given(plan, name) for name in seed.given}
        policies |= {(name, seed.seed): metrics | (read_distance(plan.recipe, seed, name) or {})
                     | _start(paths, name, seed.seed) for name, metrics in known.items()}
    found = Results(
        plan=plan, reward=reward, decile=decile, paths=paths, summaries=summaries, policies=policies,
        certified=_certificates(plan, paths), states=_states(plan), heldout=_heldout(plan),
        failures={stage.name: stage.failure for stage in plan.stages if stage.failure and not stage.done},
        starts=_starts(plan), pushes=tuple(
            float(value) for path in paths.values() for value in path.metrics.get("time/push", ())),
        seconds={stage.name: stage.done["seconds"] for stage in plan.stages if stage.done})
    return replace(found, warnings=tuple(caveats(found)))


def _rows(stage: Stage) -> list[dict[str, float]]:
    path = stage.run_dir / "metrics.jsonl"
    return read_metrics(path) if path.is_file() else []


def _evaluation(stage: Stage) -> dict[str, float]:
    """The metrics of the last row that has held-out ones, or of the last row; its own reward counts as that kept."""
    rows = _rows(stage)
    evaluated = [row for row in rows if any(name.startswith("eval/") for name in row)]
    last = dict((evaluated or rows or [{}])[-1])
    if not isinstance(stage.recipe, Recipe):
        last.pop("eval/kl", None)  # a fine-tuning's is per token, not of sequences
    return last | ({"kept/reward": last["eval/reward"]} if "eval/reward" in last else {})


def _given(plan: Plan, policy: str) -> dict[str, float]:
    """A model that others begin with, or are measured against, is their reference: it is at no distance from it."""
    others = [section for name, section in plan.recipe.policies.items() if name != policy]
    is_reference = any(policy in (section.start, section.reference) for section in others)
    return {"eval/kl": 0.0} if is_reference and plan.recipe.policies[policy].reference is None else {}


def _start(paths: Mapping[Fork, ForkPath], policy: str, seed: int) -> dict[str, float]:
    """What the probes of any fork found before its first update."""
    for (name, _, number), path in paths.items():
        if (name, number) == (policy, seed):
            return {metric: float(values[0]) for metric, values in path.metrics.items()
                    if metric.startswith(("kept/", "utility/", "exact/"))}
    return {}


def _certificates(plan: Plan, paths: Mapping[Fork, ForkPath]) -> dict[tuple[str, int], Certified]:
    section, found = plan.recipe.certificate, {}
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
