"""What one step learns from: groups sampled, scored while others are generated, replaced where they teach nothing.

It draws whole groups and never looks at tokens or advantages other than whether there are any.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from frpo.objectives.base import AdvantageEstimator
from frpo.rewards import ScoreReport, ScoreStream, shuffled
from frpo.rollout.engine import Sampling
from frpo.run.build import RunParts, SamplingParts
from frpo.telemetry.progress import ProgressBar, counted
from frpo.types import GroupId, Prompt, RunState, ScoredBatch, ScoredGroup


def collect(parts: RunParts | SamplingParts, state: RunState, bar: ProgressBar) -> ScoredBatch:
    """`rollout.prompts_per_step` scored groups.

    With `rollout.dynamic`, groups that teach nothing are replaced by those of the next prompts, as many as are missing
    at a time, until all teach or the limit of draws is met; what is then missing is filled up with them, in the order
    of drawing. No group that teaches is left out.
    """
    size, dynamic = parts.recipe.rollout.prompts_per_step, parts.recipe.rollout.dynamic
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
                    if dynamic is None or teaches(scored, parts.recipe.objective.advantage, dynamic.epsilon)}
        counts.update(report.counts)
        if parts.recipe.data.selection is not None:
            counts.update({"rollout/passed_over": choice.positions_used - len(choice.prompts),
                           "rollout/revisited": choice.revisited, "rollout/forced": choice.forced})
    counts.update({"rollout/drawn": len(drawn), "rollout/telling": len(informative)})
    uninformative = [scored.group.group_id for scored in drawn if scored.group.group_id not in informative]
    chosen = informative.union(uninformative[:size - len(informative)])
    return ScoredBatch(chosen=tuple(s for s in drawn if s.group.group_id in chosen), positions=positions,
                       replaced=tuple(s for s in drawn if s.group.group_id not in chosen), counts=counts,
                       selection=parts.stream.state)


def rollouts(parts: RunParts | SamplingParts, state: RunState, bar: ProgressBar, prompts: Sequence[Prompt], *,
             first: int, cursor: int) -> ScoreReport:
    """Scored groups of these prompts, sampled by the state's policy version.

    first: prompts that this step has drawn before. cursor: where in the stream they come from; seeds follow from it.
    With `rollout.max_staleness` the version is the oldest which may serve: weights may be pushed meanwhile.
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
        with phase("reward"):  # what is left of it once generation is over
            report = scoring.result()
    if parts.recipe.shuffle_rewards:
        seed = parts.recipe.run.seed * 1_000_003 + state.step + first * 2**32
        report = replace(report, groups=shuffled(report.groups, seed=seed))
    return report


def teaches(scored: ScoredGroup, estimator: AdvantageEstimator, epsilon: float) -> bool:
    """Whether the rewards of a group give any of its samples an advantage beyond `epsilon`, of either sign."""
    return bool(np.abs(estimator.advantages(scored.rewards_G).advantages_G).max() > epsilon)
