"""List warnings for a reader of a matrix: too few seeds, unmatched policies, missing values.

A warning gives the reason of a missing value and the setting to change. Other modules decide which values are missing.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from frpo.config.retention import RetentionRecipe
from frpo.downstream.before import SAMPLES
from frpo.downstream.kl_spacing import Gap, updates_within
from frpo.downstream.results import Results
from frpo.downstream.retained import ForkPath, paired

MATCHED = 0.1
"""Largest relative difference in mean KL to the reference at which two policies still count as matched."""


def caveats(found: Results) -> list[str]:
    """Return all warnings about a matrix, as sentences."""
    recipe, told = found.plan.recipe, []
    if found.single:
        told.append("one seed: intervals are over its held-out prompts; how much other seeds would differ is not known")
    elif len(recipe.seeds) < 3:
        told.append(f"{len(recipe.seeds)} seeds are too few for a reliable interval")
    for pair in found.pairs:
        difference = paired(*(found.policy_by_seed(policy, "eval/kl") for policy in pair))
        level = found.value(pair[1], "eval/kl")
        if difference.count and abs(difference.mean) > MATCHED * level:
            told.append(f"{pair[0]} and {pair[1]} are not at the same KL to their reference ({difference.mean:+.2f} of "
                        f"{level:.2f} nats): what they keep is not comparable")
    told += _no_gains(found)
    told += _unknown_distances(found)
    told += _blanks(found)
    for number, record in found.heldout.items():
        for name, count in record["overlap"].items():
            if count:
                told.append(f"seed {number}: {name} was trained on {count} of {record['heldout']} held-out prompts")
    for seed in found.plan.seeds if recipe.certificate else ():
        told += [f"{name}, seed {seed.seed}: no certificate, since some of its samples have no reward"
                 for name in recipe.forked if (name, seed.seed) not in found.certified
                 and (seed.measured(name) / SAMPLES).is_file()]
    for (policy, regime), seeds in found.states.items():
        lost = [seed for seed in seeds.get("done", ()) if regime and (policy, regime, seed) not in found.paths]
        if lost:
            told.append(f"{policy}/{regime}: seed(s) {', '.join(map(str, lost))} finished, but their metrics.jsonl "
                        "holds no probe; move their folders away and run `frpo retention` again")
    told += [f"{name} failed: {error}" for name, error in found.failures.items()]
    missing = {f"{policy}/{regime}" if regime else policy: seeds["missing"]
               for (policy, regime), seeds in found.states.items() if "missing" in seeds}
    return told + [f"{name}: seed(s) {', '.join(map(str, seeds))} missing" for name, seeds in missing.items()]


def _no_gains(found: Results) -> list[str]:
    """Name the policies with less reward than before their training. Name the chosen policy unless it has more."""
    gains = {name: gain for name in found.plan.recipe.shown if (gain := found.gain(name)).count}
    told = {name: f"{gain.mean:+.3f}" + ("" if math.isnan(gain.half_width) else f" ± {gain.half_width:.3f}")
            for name, gain in gains.items()}
    clear = {name: gain.mean for name, gain in gains.items() if gain.differs or math.isnan(gain.half_width)}
    chosen = found.chosen
    below = [f"{name} ({told[name]})" for name, gain in clear.items() if gain < 0 and name != chosen]
    warned = []
    if chosen in gains and not clear.get(chosen, 0.0) > 0:
        warned.append(f"the chosen policy {chosen} is not above the reward before training ({told[chosen]})")
    return warned + ([f"below the reward before training: {', '.join(below)}"] if below else [])


def _unknown_distances(found: Results) -> list[str]:
    """Name the policies without a KL to a reference, and how to get this KL. Warn about different references."""
    recipe, told = found.plan.recipe, []
    references = {name: recipe.policies[name].reference for name in recipe.shown if recipe.policies[name].reference}
    if len(set(references.values())) > 1:
        told.append("policies have different references; compare the KL only between policies of the same reference: "
                    + ", ".join(f"{name} to {reference}" for name, reference in references.items()))
    for name in recipe.shown if len(recipe.shown) > 1 else ():
        reference, has_path = recipe.policies[name].reference, recipe.policies[name].path is not None
        lacking = [seed for seed in recipe.seeds if "eval/kl" not in found.policies.get((name, seed), {})]
        reference = reference or (None if has_path else "the model that it began with")
        if lacking and reference:
            told.append(f"{name}: its KL to {reference} is not measured for seed(s) {', '.join(map(str, lacking))}; "
                        "run the same command again to measure it")
        unknown = [seed for seed in recipe.seeds if "kept/reward" not in found.policies.get((name, seed), {})]
        if unknown and recipe.policies[name].is_point and recipe.policies[name].reference is None:
            told.append(f"{name}: its reward is not measured for seed(s) {', '.join(map(str, unknown))}; run the same "
                        "command again to measure it")
        infinite = [seed for seed, kl in found.policy_by_seed(name, "eval/kl").items() if math.isnan(kl)]
        if infinite:
            told.append(f"{name}: its KL to the reference was not finite for seed(s) {', '.join(map(str, infinite))}")
        if lacking and has_path and not reference:
            told.append(f"{name} is given by path, so its KL to a reference is not known; set "
                        f"policies.{name}.reference to the policy that it was trained from")
    return told


def _blanks(found: Results) -> list[str]:
    """List the blank values along the KL with the reason: a fork stays near its policy, its probes lie too far apart,
    or probes have no KL or no reward.
    """
    recipe, told = found.plan.recipe, []
    every_gap: list[Gap] = []
    for regime in recipe.regimes:
        near = []
        for policy in recipe.forked:
            forks = {seed: path for seed, path in found.forks(policy, regime).items() if path.has_curve}
            broken = {seed: unknown for seed, path in forks.items() if (unknown := _unknown(path, found.reward))}
            if broken:
                told.append(f"{policy} through {regime}: some probes have no KL or no reward; they are left out along "
                            "the KL, and without a reward there is no mean over updates: "
                            + ", ".join(f"seed {seed}, updates {', '.join(map(str, each))}"
                                        for seed, each in broken.items()))
            short = sum(path.largest_kl(found.reward) < recipe.measure.max_kl
                        for seed, path in forks.items() if seed not in broken)
            near += [f"{policy} ({short} of {len(forks)})"] if short else []
            gaps = [(seed, gap) for seed, path in forks.items()
                    for gap in path.gaps(found.reward, recipe.measure.max_kl)]
            if gaps:
                told.append(f"{policy} through {regime}: neighbouring probes are too far apart in KL; values between "
                            f"them are left blank: {', '.join(_where(*each) for each in gaps)}")
            every_gap += [gap for _, gap in gaps]
        if near:
            told.append(f"{regime}: forks that stay within {recipe.measure.max_kl:g} nats have no mean over KL: "
                        f"{', '.join(near)}")
    probed = {int(step) for path in found.paths.values() for step in path.step_S}
    return told + _advice(recipe, probed, every_gap)


def _unknown(path: ForkPath, reward: str) -> list[int]:
    """Return the updates of probes without a KL or without a reward. The KL at the start counts as 0."""
    lacking_S = np.isnan(np.where(path.step_S == 0, 0.0, path.kl_S) + path.metrics[reward])
    return [int(step) for step in path.step_S[lacking_S]]


def _where(seed: int, gap: Gap) -> str:
    (low, high), (first, last) = gap.kl, gap.updates
    return f"{low:.3g} to {high:.3g} nats (seed {seed}, updates {first} to {last})"


def _advice(recipe: RetentionRecipe, probed: Iterable[int], gaps: Sequence[Gap]) -> list[str]:
    """Advise how to fill gaps: with probes between two updates, or with smaller updates if the two are consecutive."""
    told, at = [], recipe.measure.at
    more = sorted({update for gap in gaps for update in updates_within(gap)})
    if more:
        follow = "" if at is None else "leave measure.at out, so that probes follow the KL, or "
        told.append(f"to fill these gaps {follow}set measure.at to {sorted({*(probed if at is None else at), *more})}; "
                    "to measure a finished fork again, move its folder "
                    f"{recipe.run.dir}/seedN/forks/POLICY/REGIME away")
    if any(gap.updates[1] - gap.updates[0] == 1 for gap in gaps):
        told.append("no probe fits between two consecutive updates; to fill such a gap, lower learner.lr of the fork "
                    "or raise its learner.warmup_steps")
    return told
