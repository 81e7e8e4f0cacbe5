"""What is measured of a policy before any fork: samples for its certificate, and its KL to its reference.

    <run.dir>/seed0/policies/NAME/certificate.npz     rewards_PN of many samples
    <run.dir>/seed0/policies/NAME/reference_kl.json   the reference, the KL in nats a sequence, its interval

It reads and writes files. Sampling is the business of `stages`.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from frpo.config.retention import RetentionRecipe
from frpo.retention.plan import SeedPlan
from frpo.telemetry import mean_interval
from frpo.types import ScoredGroup

SAMPLES, DISTANCE = "certificate.npz", "reference_kl.json"


@dataclass(frozen=True, kw_only=True)
class Missing:
    """What is still to be measured. samples: completions a prompt for the certificate; 0: none. reference: the policy
    to which the KL is measured; None: it is not.
    """

    samples: int
    reference: str | None

    def __bool__(self) -> bool:
        return self.samples > 0 or self.reference is not None


def missing(recipe: RetentionRecipe, seed: SeedPlan, policy: str) -> Missing:
    """What the folder of a policy lacks."""
    wanted, reference = recipe.certificate, recipe.policies[policy].reference
    sampled = wanted is None or (seed.measured(policy) / SAMPLES).is_file()
    known = reference is None or read_distance(recipe, seed, policy) is not None
    return Missing(samples=0 if sampled else wanted.samples, reference=None if known else reference)


def write_samples(seed: SeedPlan, policy: str, scored: Sequence[ScoredGroup]) -> None:
    """Keep the rewards of a policy's samples."""
    folder = seed.measured(policy)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"unfinished-{SAMPLES}"
    np.savez_compressed(unfinished, rewards_PN=np.stack([group.rewards_G for group in scored]))
    unfinished.replace(folder / SAMPLES)


def write_distance(seed: SeedPlan, policy: str, reference: str, kl: Sequence[np.ndarray]) -> None:
    """Keep the mean over prompts of a policy's KL. kl: per prompt (G) nats of its completions."""
    folder = seed.measured(policy)
    folder.mkdir(parents=True, exist_ok=True)
    mean, half_width = mean_interval(float(kl_G.mean()) for kl_G in kl)
    unfinished = folder / f"unfinished-{DISTANCE}"
    unfinished.write_text(json.dumps({"reference": reference, "kl": mean, "interval": half_width}), encoding="utf-8")
    unfinished.replace(folder / DISTANCE)


def read_distance(recipe: RetentionRecipe, seed: SeedPlan, policy: str) -> dict[str, float] | None:
    """The KL of a policy to the reference that the recipe names, as metrics; None if it is not measured."""
    path = seed.measured(policy) / DISTANCE
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if record.get("reference") != recipe.policies[policy].reference:
        return None
    return {"eval/kl": record["kl"], "eval/kl_interval": record["interval"]} if record else None
