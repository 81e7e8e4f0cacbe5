"""What is measured of a policy before any fork: samples for its certificate, its reward and KL to its reference.

    <run.dir>/seed0/policies/NAME/certificate.npz     rewards_PN of many samples
    <run.dir>/seed0/policies/NAME/reference_kl.json   the reference, and the metrics kept/... of held-out samples; the
                                                      reference of a model that is only shown is that model itself

It reads and writes files. Sampling is the business of `stages`.
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
"""In the place of a reference's name: the model that the policy's own training began with. No policy is called so."""


@dataclass(frozen=True, kw_only=True)
class Missing:
    """What is still to be measured. samples: completions a prompt for the certificate; 0: none. reference: the policy
    to which the KL is measured, or START; the policy itself: only its reward is; None: nothing is.
    """

    samples: int
    reference: str | None

    def __bool__(self) -> bool:
        return self.samples > 0 or self.reference is not None


def missing(recipe: RetentionRecipe, seed: SeedPlan, policy: str) -> Missing:
    """What the folder of a policy lacks."""
    wanted = recipe.certificate if policy in recipe.forked else None
    reference = reference_of(recipe, seed, policy)
    if wanted is not None and (seed.measured(policy) / SAMPLES).is_file():
        wanted = None
    known = reference is None or read_distance(recipe, seed, policy) is not None
    return Missing(samples=0 if wanted is None else wanted.samples, reference=None if known else reference)


def complete(recipe: RetentionRecipe, seed: SeedPlan) -> bool:
    """Whether nothing of this seed is left to do."""
    return all(stage.done for stage in seed.stages) and not any(missing(recipe, seed, name) for name in recipe.shown)


def reference_of(recipe: RetentionRecipe, seed: SeedPlan, policy: str) -> str | None:
    """What the KL of a policy is measured to before any fork: its `reference`, or START where its own training has
    measured none; itself, if it is given and not forked, so that nothing else measures its reward; None: it is not
    measured again, or the policy is given and nobody knows what it began with.
    """
    section, stage = recipe.policies[policy], seed.policies.get(policy)
    if section.reference is not None:
        return section.reference
    if stage is None:
        return policy if section.is_point else None
    return None if "eval/kl" in evaluation(stage) else START


def rows_of(stage: Stage) -> list[dict[str, float]]:
    """Those of its metrics file."""
    path = stage.run_dir / "metrics.jsonl"
    return read_metrics(path) if path.is_file() else []


def evaluation(stage: Stage) -> dict[str, float]:
    """The metrics of the last row that has held-out ones, or of the last row; its own rewards count as those kept."""
    rows = rows_of(stage)
    evaluated = [row for row in rows if any(name.startswith("eval/") for name in row)]
    last = dict((evaluated or rows or [{}])[-1])
    if not isinstance(stage.recipe, Recipe):
        last.pop("eval/kl", None)  # a fine-tuning's is per token, not of sequences
    kept = {name.replace("eval/", "kept/", 1): value for name, value in last.items() if name.startswith("eval/")}
    return last | {name: value for name, value in kept.items() if "kept/reward" in kept and "/kl" not in name}


def write_samples(seed: SeedPlan, policy: str, scored: Sequence[ScoredGroup]) -> None:
    """Keep the rewards of a policy's samples."""
    folder = seed.measured(policy)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"unfinished-{SAMPLES}"
    np.savez_compressed(unfinished, rewards_PN=np.stack([group.rewards_G for group in scored]))
    unfinished.replace(folder / SAMPLES)


def write_distance(seed: SeedPlan, policy: str, reference: str, metrics: Mapping[str, float]) -> None:
    """Keep what held-out samples say of a policy. metrics: kept/reward, kept/kl (nats a sequence) and so on."""
    folder = seed.measured(policy)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"unfinished-{DISTANCE}"
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    unfinished.write_text(json.dumps({"reference": reference, "metrics": finite}), encoding="utf-8")
    unfinished.replace(folder / DISTANCE)


def read_distance(recipe: RetentionRecipe, seed: SeedPlan, policy: str) -> dict[str, float] | None:
    """What was measured of a policy against the reference that the recipe names; None if that is still to do.

    The KL to the reference is called eval/kl, as in a training's metrics.
    """
    path = seed.measured(policy) / DISTANCE
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "metrics" not in record or record["reference"] != reference_of(recipe, seed, policy):
        return None
    return {name.replace("kept/kl", "eval/kl"): math.nan if value is None else value
            for name, value in record["metrics"].items()}
