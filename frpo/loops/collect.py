"""Collect the batch of one step: sample groups, score them while others are generated, replace uninformative groups.

This module draws whole groups. It does not read tokens, and uses advantages only to decide whether a group teaches.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from frpo.objectives.base import AdvantageEstimator
from frpo.objectives.constraint import Mixture
from frpo.objectives.scalarise import Scalarised
from frpo.rewards import ScoreReport, ScoreStream, shuffled
from frpo.rollout.engine import Sampling
from frpo.run.build import SamplingParts
from frpo.telemetry.progress import ProgressBar, counted
from frpo.types import GroupId, Prompt, RunState, ScoredBatch, ScoredGroup


def collect(parts: SamplingParts, state: RunState, bar: ProgressBar) -> ScoredBatch:
    """Collect `rollout.prompts_per_step` scored groups.

    With `rollout.dynamic`, replace groups that teach nothing by groups of the next prompts. Each round draws as many
    groups as are missing, until all groups teach or the limit of draws is reached. If groups are still missing then,
    fill the batch with groups that teach nothing, in the order of drawing. No group that teaches is left out.
    """
    size, dynamic = parts.recipe.rollout.prompts_per_step, parts.recipe.rollout.dynamic
    objective = parts.recipe.objective
    mixture, scalarised = objective.mixture(state.controllers), parts.recipe.scalarised
    limit = size if dynamic is None else size * dynamic.max_draws
    drawn: list[ScoredGroup] = []
    informative: set[GroupId] = set()
    counts: Counter[str] = Counter()
    positions = 0
    while len(informative) < size and len(drawn) < limit:
        choice = parts.stream.choose(state.data_cursor + positions, min(size - len(informative), limit - len(drawn)))
        report = rollouts(parts, state, bar, choice.prompts, first=len(drawn), cursor=state.data_cursor + positions)
        parts.stream.record(report.groups)
        drawn += report.groups
        positions += choice.positions_used
        informative |= {scored.group.group_id for scored in report.groups
                        if dynamic is None
                        or teaches(scored, objective.advantage, dynamic.epsilon, mixture, scalarised)}
        counts.update(report.counts)
        if parts.recipe.data.selection is not None:
            counts.update({"rollout/passed_over": choice.positions_used - len(choice.prompts),
                           "rollout/revisited": choice.revisited, "rollout/forced": choice.forced})
    counts.update({"rollout/drawn": len(drawn), "rollout/informative": len(informative)})
    uninformative = [scored.group.group_id for scored in drawn if scored.group.group_id not in informative]
    chosen = informative.union(uninformative[:size - len(informative)])
    return ScoredBatch(chosen=tuple(s for s in drawn if s.group.group_id in chosen), positions=positions,
                       replaced=tuple(s for s in drawn if s.group.group_id not in chosen), counts=counts,
                       selection=parts.stream.state)


def rollouts(parts: SamplingParts, state: RunState, bar: ProgressBar, prompts: Sequence[Prompt], *,
             first: int, cursor: int) -> ScoreReport:
    """Sample groups of these prompts with the state's policy version, and score them.

    first: number of prompts that this step has drawn before. cursor: position of these prompts in the stream; the
    seeds are computed from the cursor. With `rollout.max_staleness` the version is the oldest that may serve, because
    weights may be pushed meanwhile.
    """
    section, phase = parts.recipe.rollout, parts.timer.phase
    stream = parts.sampler.stream(
        prompts, step=state.step, first_draw=first, version=state.policy_version,
        or_newer=section.max_staleness > 0, first_sample=cursor * section.group_size, group_size=section.group_size,
        sampling=Sampling(temperature=section.temperature, top_p=section.top_p,
                          max_new_tokens=section.max_new_tokens))
    with ScoreStream(parts.rewards) as scoring:
        with phase("generate"):
            for done, group in enumerate(stream, start=1):
                scoring.add(group)
                counted("generate", done, len(prompts))
        with phase("reward"):  # scoring that is left after generation
            report = scoring.result()
    if parts.recipe.shuffle_rewards:
        seed = parts.recipe.run.seed * 1_000_003 + state.step + first * 2**32
        report = replace(report, groups=shuffled(report.groups, seed=seed))
    return report


def teaches(scored: ScoredGroup, estimator: AdvantageEstimator, epsilon: float, mixture: Mixture | None = None,
            scalarised: Scalarised | None = None) -> bool:
    """Return whether rewards or constrained costs give any sample an advantage beyond `epsilon`, of either sign."""
    rewards_G = scored.rewards_G if scalarised is None else scalarised.of_group(scored)
    streams = [(estimator, rewards_G)]
    if mixture is not None:
        rewards_G, negative_costs_G = mixture.streams(scored, rewards_G, np.zeros(rewards_G.size))
        streams = [(estimator, rewards_G), (mixture.constraint.advantage, negative_costs_G)]
    return any(np.abs(each.advantages(values_G).advantages_G).max() > epsilon for each, values_G in streams)
