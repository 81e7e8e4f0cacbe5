"""Store measurements of a policy before any fork: samples for its certificate, its reward and KL to its reference.

    <run.dir>/seed0/policies/NAME/certificate.npz     rewards_PN of many samples
    <run.dir>/seed0/policies/NAME/reference_kl.json   the reference, and the metrics kept/... of held-out samples; the
                                                      reference of a model that is only shown is that model itself

This module reads and writes files. `stages` does the sampling.
"""
from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from frpo.config.retention import RetentionRecipe
from frpo.config.sections import Recipe
from frpo.downstream.plan import SeedPlan, Stage
from frpo.report.curve import read_metrics
from frpo.types import ScoredGroup

SAMPLES, DISTANCE = "certificate.npz", "reference_kl.json"
START = "/start"
"""Name that stands for the model with which the policy's own training began. No policy has this name."""


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Measurements that are still to be made.

    samples: completions per prompt for the certificate; 0: none.
    reference: the policy to which the KL is measured, or START. The policy itself: measure only its reward. None:
    measure nothing.
    """

    samples: int
    reference: str | None

    def __bool__(self) -> bool:
        return self.samples > 0 or self.reference is not None


def missing(recipe: RetentionRecipe, seed: SeedPlan, policy: str) -> Missing:
    """List what is still to be measured of a policy."""
    wanted = recipe.certificate if policy in recipe.forked else None
    reference = reference_of(recipe, seed, policy)
    if wanted is not None and (seed.measured(policy) / SAMPLES).is_file():
        wanted = None
    known = reference is None or read_distance(recipe, seed, policy) is not None
    return Missing(samples=0 if wanted is None else wanted.samples, reference=None if known else reference)


def complete(recipe: RetentionRecipe, seed: SeedPlan) -> bool:
    """Return whether all stages and all measurements of a seed are done."""
    return all(stage.done for stage in seed.stages) and not any(missing(recipe, seed, name) for name in recipe.shown)


def reference_of(recipe: RetentionRecipe, seed: SeedPlan, policy: str) -> str | None:
    """Return the reference to which the KL of a policy is measured before any fork.

    The result is the policy's `reference`. Without one, a trained policy gets START if its own training has measured no
    KL. A given policy without a `reference` that is not forked gets its own name: nothing else measures its reward.
    None: the KL is not measured again, or the policy is given and its start is not known.
    """
    section, stage = recipe.policies[policy], seed.policies.get(policy)
    if section.reference is not None:
        return section.reference
    if stage is None:
        return policy if section.is_point else None
    return None if "eval/kl" in evaluation(stage) else START


def rows_of(stage: Stage) -> list[dict[str, float]]:
    """Read the rows of a stage's metrics file; empty without the file."""
    path = stage.run_dir / "metrics.jsonl"
    return read_metrics(path) if path.is_file() else []


def evaluation(stage: Stage) -> dict[str, float]:
    """Return the metrics of the last row with held-out metrics, or of the last row. Rewards of its own evaluation are
    also returned as kept/...
    """
    rows = rows_of(stage)
    evaluated = [row for row in rows if any(name.startswith("eval/") for name in row)]
    last = dict((evaluated or rows or [{}])[-1])
    if not isinstance(stage.recipe, Recipe):
        last.pop("eval/kl", None)  # the KL of a fine-tuning is per token, not per sequence
    kept = {name.replace("eval/", "kept/", 1): value for name, value in last.items() if name.startswith("eval/")}
    return last | {name: value for name, value in kept.items() if "kept/reward" in kept and "/kl" not in name}


def write_samples(seed: SeedPlan, policy: str, scored: Sequence[ScoredGroup]) -> None:
    """Write the rewards of a policy's samples into SAMPLES."""
    folder = seed.measured(policy)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"unfinished-{SAMPLES}"
    np.savez_compressed(unfinished, rewards_PN=np.stack([group.rewards_G for group in scored]))
    unfinished.replace(folder / SAMPLES)


def write_distance(seed: SeedPlan, policy: str, reference: str, metrics: Mapping[str, float]) -> None:
    """Write the metrics of a policy's held-out samples. metrics: kept/reward, kept/kl (nats per sequence) and so on."""
    folder = seed.measured(policy)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"unfinished-{DISTANCE}"
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    unfinished.write_text(json.dumps({"reference": reference, "metrics": finite}), encoding="utf-8")
    unfinished.replace(folder / DISTANCE)


def read_distance(recipe: RetentionRecipe, seed: SeedPlan, policy: str) -> dict[str, float] | None:
    """Read the metrics of a policy against its reference (`reference_of`); None if they are still to be measured.

    The KL to the reference is called eval/kl, as in a training's metrics.
    """
    path = seed.measured(policy) / DISTANCE
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "metrics" not in record or record["reference"] != reference_of(recipe, seed, policy):
        return None
    return {name.replace("kept/kl", "eval/kl"): math.nan if value is None else value
            for name, value in record["metrics"].items()}
