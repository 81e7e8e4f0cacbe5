"""The probe of a fork: its metrics, what it pushes, and the lowest decile."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from frpo.config.loader import load_recipe
from frpo.downstream.kl_spacing import ProbeSchedule
from frpo.downstream.probe import Task, TaskProbe, lowest_decile, task_metrics
from frpo.telemetry.timer import PhaseTimer
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


def test_it_asks_when_the_schedule_says_so_and_pushes_what_engines_lack():
    pushed = []
    engines = SimpleNamespace(pushed=None, push=pushed.append)
    schedule = SimpleNamespace(due=lambda step, total: (step, total) in ((0, 8), (3, 8), (8, 8)))
    probe = TaskProbe(schedule=schedule, tasks=[], exact=None, engines=engines, learner=None,
                      journal=SimpleNamespace(), timer=PhaseTimer())
    for step in range(9):
        state = RunState(step=step, policy_version=10 + step, data_cursor=0, recipe_digest="", file_offsets={})
        assert probe(state, 8) == {}
    assert pushed == [10, 13, 18]
    engines.pushed = 18  # as in reinforcement learning, where engines follow every update
    probe(state, 8)
    assert pushed == [10, 13, 18]


def test_the_schedule_learns_the_kl_that_was_measured(monkeypatch):
    groups = [scored([1.0, 0.5]), scored([0.5, 0.0])]
    monkeypatch.setattr("frpo.downstream.probe.sampled", lambda *args, **options: groups)
    monkeypatch.setattr("frpo.downstream.probe.check_agreement", lambda *args: checked.append(args[-1]))
    learner = SimpleNamespace(kl_groups=lambda groups, to: [np.array([0.2, 0.4]), np.array([0.5, 0.7])])
    schedule, checked, kept = ProbeSchedule([1], 4.0, dict), [], []
    journal = SimpleNamespace(keep_samples=lambda *given: kept.append(given))
    probe = TaskProbe(schedule=schedule, tasks=[Task(name="kept", recipe=load_recipe("lab_policy"), prompts=None,
                                                     rewards=None)],
                      exact=None, engines=SimpleNamespace(pushed=1), learner=learner, journal=journal,
                      timer=PhaseTimer())
    found = probe(RunState(step=1, policy_version=1, data_cursor=0, recipe_digest="", file_offsets={}), 8)
    assert schedule.probed == {1: pytest.approx(0.45)} == {1: found["kept/kl"]}
    for _ in range(2):
        probe(RunState(step=1, policy_version=1, data_cursor=0, recipe_digest="", file_offsets={}), 8)
    assert checked == [1, 1]  # the pushes of the first two probes
    assert kept == [(1, groups, "kept")] * 3
