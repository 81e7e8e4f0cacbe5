"""The probe of a fork: which updates it looks at, and the lowest decile."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from frpo.evaluate.probe import TaskProbe, lowest_decile
from frpo.telemetry import PhaseTimer
from frpo.types import RunState


@pytest.mark.parametrize("rewards, worst", [
    (np.arange(20.0), 0.5),                       # the mean of 0 and 1
    ([1.0] * 14 + [0.0], 1 / 3),                  # one and a half samples: 0, and half of a 1
    ([5.0, np.nan], 5.0), ([0.3], 0.3), ([2.0] * 7, 2.0)])
def test_the_mean_of_the_lowest_tenth(rewards, worst):
    assert lowest_decile(np.array(rewards)) == pytest.approx(worst)


def test_of_nothing_it_is_nan():
    assert np.isnan(lowest_decile(np.array([np.nan])))


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
