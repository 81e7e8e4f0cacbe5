"""The probe of a fork: which updates it looks at, its metrics, and the lowest decile."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from frpo.config.loader import load_recipe
from frpo.evaluate.probe import Task, TaskProbe, lowest_decile, task_metrics
from frpo.telemetry import PhaseTimer
from frpo.types import Completion, Prompt, RolloutGroup, RunState, ScoredGroup


@pytest.mark.parametrize("rewards, worst", [
    (np.arange(20.0), 0.5),                       # the mean of 0 and 1
    ([1.0] * 14 + [0.0], 1 / 3),                  # one and a half samples: 0, and half of a 1
    ([1.0] * 14 + [0.0] + [np.nan] * 15, 1 / 3),
    ([5.0, np.nan], 5.0), ([0.3], 0.3), ([2.0] * 7, 2.0)])
def test_the_mean_of_the_lowest_tenth(rewards, worst):
    assert lowest_decile(np.array(rewards)) == pytest.approx(worst)


def test_of_nothing_it_is_nan():
    assert np.isnan(lowest_decile(np.array([np.nan])))


def scored(rewards):
    said = Completion(text="", token_ids=(1, 2), logprobs=(-1.0, -1.0), loss_mask=(True, True), version_spans=(),
                      seed=0, finish_reason="stop")
    prompt = Prompt(uid="p", messages=(), token_ids=(1,))
    return ScoredGroup(group=RolloutGroup(group_id=(0, 0), prompt=prompt, completions=(said,) * len(rewards)),
                       rewards_G=np.array(rewards), terms={"polite": np.array(rewards) / 2})


def test_metrics_carry_the_name_of_their_task():
    """Means of prompts .75 and .25: half-width 12.706 * .25. Of four completions the lowest tenth is part of the worst.
    """
    task = Task(name="kept", recipe=load_recipe("lab_policy"), prompts=None, rewards=None)
    groups = [scored([1.0, 0.5]), scored([0.5, 0.0])]
    found = task_metrics(task, groups, [np.array([0.2, 0.4]), np.array([0.5, 0.7])])
    assert all(name.startswith("kept/") for name in found)
    assert (found["kept/reward"], found["kept/interval"]) == pytest.approx((0.5, 12.706 * 0.25))
    assert found["kept/decile"] == 0.0 and found["kept/kl"] == pytest.approx(0.45)
    assert found["kept/kl_interval"] == pytest.approx(12.706 * 0.15) and found["kept/polite/mean"] == 0.25
    assert "kept/kl" not in task_metrics(task, groups, None)


@pytest.mark.parametrize("at, total, steps", [
    (None, 16, [0, 2, 4, 6, 8, 10, 12, 14, 16]), (None, 20, [0, 3, 6, 9, 12, 15, 18, 20]), (None, 3, [0, 1, 2, 3]),
    (None, 0, [0]), ([], 20, [0, 20])])
def test_without_a_choice_it_looks_at_equal_distances(at, total, steps):
    pushed = []
    engines = SimpleNamespace(pushed=None, push=pushed.append)
    probe = TaskProbe(at=at, tasks=[], exact=None, engines=engines, learner=None, timer=PhaseTimer())
    for step in range(total + 1):
        probe(RunState(step=step, policy_version=step, data_cursor=0, recipe_digest="", file_offsets={}), total)
    assert pushed == steps


def test_it_looks_at_the_first_the_last_and_those_that_were_asked_for():
    pushed = []
    engines = SimpleNamespace(pushed=None, push=pushed.append)
    probe = TaskProbe(at=[3, 5, 50], tasks=[], exact=None, engines=engines, learner=None, timer=PhaseTimer())
    for step in range(9):
        state = RunState(step=step, policy_version=10 + step, data_cursor=0, recipe_digest="", file_offsets={})
        assert probe(state, 8) == {}
    assert pushed == [10, 13, 15, 18]
    engines.pushed = 18  # as in reinforcement learning, where engines follow every update
    probe(state, 8)
    assert pushed == [10, 13, 15, 18]
