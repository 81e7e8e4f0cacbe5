"""Collecting a step's batch: which prompts are drawn, which groups are kept. Engines and rewards answer by rule."""
from types import SimpleNamespace

import numpy as np
import pytest

from frpo.collect import collect, teaches
from frpo.config.rollout import DynamicSection
from frpo.data.prompts import PromptStream
from frpo.objectives.frpo import FRPO
from frpo.objectives.group import GRPO
from frpo.rewards import ScoreReport
from frpo.telemetry import PhaseTimer
from frpo.types import Completion, Prompt, RolloutGroup, RunState, ScoredGroup

PROMPTS = tuple(Prompt(uid=str(i), messages=(), token_ids=(i,)) for i in range(20))


def scored(rewards, draw=0):
    completions = tuple(
        Completion(text="", token_ids=(1,), logprobs=(0.0,), loss_mask=(True,), version_spans=(), seed=0,
                   finish_reason="stop") for _ in rewards)
    group = RolloutGroup(group_id=(5, draw), prompt=PROMPTS[draw], completions=completions)
    return ScoredGroup(group=group, rewards_G=np.array(rewards, dtype=float), terms={})


class Sampler:
    """Answers from memory, last prompt first; keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def stream(self, prompts, *, step, first_draw, first_sample, group_size, sampling, version):
        self.asked.append((first_draw, first_sample, [int(prompt.uid) for prompt in prompts]))
        for i in reversed(range(len(prompts))):
            group = scored([0.0] * group_size).group
            yield RolloutGroup(group_id=(step, first_draw + i), prompt=prompts[i], completions=group.completions)


class Rewards:
    """A group has one good completion where its prompt is among `telling`."""

    def __init__(self, telling):
        self.telling = telling

    def score(self, groups):
        def rewards(group):
            return np.array([float(int(group.prompt.uid) in self.telling), 0.0])

        return ScoreReport(groups=[ScoredGroup(group=g, rewards_G=rewards(g), terms={}) for g in groups],
                           counts={"reward/r/abstained": len(groups)})


def collected(telling, dynamic=None, cursor=2, size=4):
    parts = SimpleNamespace(
        sampler=Sampler(), rewards=Rewards(telling), stream=PromptStream(PROMPTS, 0, shuffle=False), timer=PhaseTimer(),
        recipe=SimpleNamespace(
            rollout=SimpleNamespace(prompts_per_step=size, group_size=2, dynamic=dynamic, temperature=1.0, top_p=1.0,
                                    max_new_tokens=4),
            objective=SimpleNamespace(advantage=FRPO()), run=SimpleNamespace(seed=0), shuffle_rewards=False))
    state = RunState(step=5, policy_version=9, data_cursor=cursor, recipe_digest="", file_offsets={})
    batch = collect(parts, state, SimpleNamespace(note=lambda text: None))
    return batch, parts.sampler.asked


def uids(groups):
    return [int(group.group.prompt.uid) for group in groups]


def test_without_dynamic_sampling_the_next_prompts_are_the_batch():
    batch, asked = collected(telling={3})
    assert asked == [(0, 4, [2, 3, 4, 5])] and uids(batch.chosen) == [2, 3, 4, 5] and batch.replaced == ()
    assert batch.counts == {"rollout/drawn": 4, "rollout/telling": 4, "reward/r/abstained": 4}


def test_groups_that_teach_nothing_are_replaced_by_as_many_as_are_missing():
    """Of 2-5 only 3 and 5 teach, of 6, 7 only 7, then 8 does: three rounds, seeds and ids go on counting."""
    batch, asked = collected(telling={3, 5, 7, 8}, dynamic=DynamicSection())
    assert asked == [(0, 4, [2, 3, 4, 5]), (4, 12, [6, 7]), (6, 16, [8])]
    assert uids(batch.chosen) == [3, 5, 7, 8] and uids(batch.replaced) == [2, 4, 6]
    assert [scored.group.group_id for scored in batch.chosen] == [(5, 1), (5, 3), (5, 5), (5, 6)]
    assert batch.counts == {"rollout/drawn": 7, "rollout/telling": 4, "reward/r/abstained": 7}


def test_at_the_limit_the_batch_is_filled_up_in_the_order_of_drawing_and_loses_nothing_that_teaches():
    batch, asked = collected(telling={9}, dynamic=DynamicSection(max_draws=2))
    assert sum(len(prompts) for _, _, prompts in asked) == 8
    assert uids(batch.chosen) == [2, 3, 4, 9] and uids(batch.replaced) == [5, 6, 7, 8]


def test_a_batch_that_teaches_at_once_is_drawn_once():
    batch, asked = collected(telling=set(range(20)), dynamic=DynamicSection())
    assert len(asked) == 1 and batch.replaced == ()


@pytest.mark.parametrize("rewards, tells", [
    ([1.0, 0.0], True), ([1.0, 1.0], False), ([1.0, np.nan], False), ([np.nan, np.nan], False),
    ([0.5, 0.5 + 1e-12], False)])  # not equal, but no difference that teaches
def test_a_group_teaches_if_an_advantage_exceeds_epsilon(rewards, tells):
    assert teaches(scored(rewards), FRPO(), epsilon=1e-6) is tells
    assert teaches(scored(rewards), GRPO(), epsilon=1e-6) is tells
