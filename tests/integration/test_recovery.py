"""Engines killed with -9: started again, given the policy, and sampled from again with not one bit of difference."""
from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest

from frpo.cluster.recovery import RecoveringEngines
from frpo.errors import EngineError
from frpo.rollout.engine import Sampling
from frpo.rollout.sampler import Sampler
from frpo.types import RolloutGroup
from loop import RunningLoop, pid_of, random_prompts
from parity_matrix import LIMIT

PROMPTS = random_prompts(32, 60, seed=7)
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=300)
MOMENTS = np.random.default_rng(0).uniform(0.1, 0.7, size=2)
"""When the engine is killed, as shares of the time that sampling took without."""


def kill_engine(loop: RunningLoop) -> None:
    os.kill(pid_of(loop.pool.engines[0]), signal.SIGKILL)


def sampled(loop: RunningLoop, engines: RecoveringEngines, kill_after_s: float | None = None) -> list[RolloutGroup]:
    """All groups, sorted; the engine is killed in the middle, unless it is done before."""
    timer = threading.Timer(kill_after_s or 0, os.kill, (pid_of(loop.pool.engines[0]), signal.SIGKILL))
    if kill_after_s is not None:
        timer.start()
    try:
        return Sampler(engines, 1, 0).sample(
            PROMPTS, step=0, first_sample=0, group_size=4, sampling=SAMPLING, version=loop.version)
    finally:
        timer.cancel()


@pytest.mark.timeout(300)
def test_a_killed_engine_changes_nothing(loop):
    loop.push()
    loop.update(PROMPTS[:4])  # the policy is no longer what an engine loads from disk
    loop.push()
    engines = RecoveringEngines(loop.pool, loop.learner, max_restarts=len(MOMENTS))
    began = time.perf_counter()
    undisturbed = sampled(loop, engines)
    seconds = time.perf_counter() - began
    for moment in MOMENTS:
        first, after_s = loop.pool.engines[0], moment * seconds
        while loop.pool.engines[0] == first:  # a machine that is quicker now was done before: earlier, then
            # tokens, log-probs, versions, seeds
            assert sampled(loop, engines, kill_after_s=after_s) == undisturbed
            after_s /= 2
    assert engines.restarts_left == 0 and loop.gap(PROMPTS[:4]) <= LIMIT["fp32"]


@pytest.mark.timeout(200)
def test_an_engine_that_died_between_steps_is_replaced_by_the_push(loop):
    loop.push()
    kill_engine(loop)
    RecoveringEngines(loop.pool, loop.learner, max_restarts=1).push(loop.version + 1)
    loop.version += 1
    assert loop.pool.policy_versions() == [loop.version]
    assert loop.gap(PROMPTS[:4]) <= LIMIT["fp32"]


@pytest.mark.timeout(120)
def test_without_restarts_left_the_death_is_the_error(loop):
    loop.push()
    pid = pid_of(loop.pool.engines[0])
    with pytest.raises(EngineError, match=rf"generate: rollout engine 0 on .* \(log: \S*{pid}\.err\) died"):
        sampled(loop, RecoveringEngines(loop.pool, loop.learner, max_restarts=0), kill_after_s=0.2)
    with pytest.raises(EngineError, match="rollout engine 0"):
        RecoveringEngines(loop.pool, loop.learner, max_restarts=0).push(loop.version + 1)
    loop.drop_pool()
