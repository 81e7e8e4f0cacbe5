"""A push of weights is all or nothing: cut short anywhere, the old weights go on serving, and the next push heals.

Engine, learner and Ray are real; what breaks off is rank 0's client or a rank's process, in the middle of a push.
"""
from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray

from frpo.errors import EngineError
from loop import GREEDY, inside, pid_of, random_prompts
from parity_matrix import LIMIT

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

SHORT = random_prompts(6, 60, seed=1)
"""Below one block of the prefix cache, so that the same request is computed the same way every time, to the bit."""


class CutClient:
    """Passes calls on to a real client until call number `at` of `method`, which runs `action` instead."""

    def __init__(self, client, method, at, action):
        self.client, self.method, self.at, self.action = client, method, at, action

    def __getattr__(self, name):
        def call(*arguments):
            if name == self.method:
                self.at -= 1
                if self.at == 0:
                    return self.action()
            return getattr(self.client, name)(*arguments)

        return call


def cut_push(actor, method, at, action):
    """Make the sender of learner rank 0 cut its next push short; returns its own client."""
    client = actor.learner.sender.client
    actor.learner.sender.client = CutClient(client, method, at, action)
    return client


def mend_push(actor):
    actor.learner.sender.client = actor.learner.sender.client.client


def fail():
    raise RuntimeError("cut on purpose")


def served(loop):
    """Greedy tokens and their log-probs at the version in force: equal to the bit if the weights are."""
    return [(completion.token_ids.tolist(), completion.logprobs.tolist())
            for group in loop.sample(SHORT, GREEDY) for completion in group.completions]


def bucket_files(pid):
    return sorted(Path("/dev/shm").glob(f"frpo-weights-{pid}-*"))


def assert_healed(loop, old):
    """The next push brings the learner's weights, which are others than the old ones."""
    loop.push()
    assert loop.gap(SHORT) <= LIMIT["fp32"]
    assert served(loop) != old


@pytest.mark.timeout(240)
def test_engine_serves_only_the_version_it_was_given(loop):
    loop.become(loop.recipe, loop.model_path)  # a new engine: no push has reached it
    assert loop.pool.policy_versions() == [None]
    with pytest.raises(EngineError, match="engine 0 holds policy version None, but must sample version 0"):
        loop.sample(SHORT)
    with pytest.raises(EngineError, match="holds policy version None"):
        loop.pool.score([(SHORT[0].token_ids, 3)], 0)
    loop.push()
    assert loop.pool.policy_versions() == [1]
    assert {span.policy_version for group in loop.sample(SHORT) for c in group.completions
            for span in c.version_spans} == {1}
    loop.version = 2
    with pytest.raises(EngineError, match="engine 0 holds policy version 1, but must sample version 2"):
        loop.sample(SHORT)
    loop.version = 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("method, at", [("start_weight_update", 1), ("update_weights", 1), ("update_weights", 4),
                                        ("finish_weight_update", 1)])
def test_a_push_that_fails_in_rank_0_changes_nothing(loop, method, at):
    version = loop.push()
    old = served(loop)
    loop.update(SHORT)
    rank_0 = loop.learner.ranks.actors[0]
    inside(rank_0, cut_push, method, at, fail)
    with pytest.raises(EngineError, match="push weights: learner rank 0 .*cut on purpose"):
        loop.learner.push_weights(version + 1)
    inside(rank_0, mend_push)
    assert loop.pool.policy_versions() == [version]
    assert served(loop) == old
    assert bucket_files(pid_of(rank_0)) == []
    assert_healed(loop, old)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_during_a_push_changes_nothing(loop, victim):
    version = loop.push()
    old = served(loop)
    pids = [pid_of(rank) for rank in loop.learner.ranks.actors]
    inside(loop.learner.ranks.actors[0], cut_push, "update_weights", 3, lambda: os.kill(pids[victim], signal.SIGKILL))
    started = time.perf_counter()
    with pytest.raises(EngineError, match=rf"push weights: learner rank {victim} on .*{pids[victim]}\.err\) died"):
        loop.learner.push_weights(version + 1)
    assert time.perf_counter() - started < 20
    assert loop.pool.policy_versions() == [version]
    assert served(loop) == old
    assert bool(bucket_files(pids[0])) == (victim == 0)  # nobody is left to clean up after rank 0
    loop.drop_learner()
    loop.learner.push_weights(version)  # new ranks, at the model on disk
    assert bucket_files(pids[0]) == []
    loop.update(SHORT)
    assert_healed(loop, old)


@pytest.mark.timeout(120)
def test_no_prefix_computed_by_old_weights_outlives_a_push(loop):
    long = random_prompts(4, 370, seed=5)
    loop.push()
    loop.sample(long)
    assert cached_tokens(loop, long) > 128  # the engine does reuse prefixes while the weights stay
    loop.update(SHORT)
    loop.push()
    assert loop.gap(long) <= LIMIT["fp32"]


def cached_tokens(loop, prompts):
    """Tokens of the longest prompt that the engine takes from its prefix cache."""
    def generate(engine, token_ids):
        from vllm import SamplingParams

        output, = engine.llm.generate([engine._prompt(token_ids)], SamplingParams(max_tokens=1), use_tqdm=False)
        return output.num_cached_tokens

    return inside(loop.pool.engines[0], generate, list(prompts[0].token_ids))


@pytest.mark.timeout(240)
def test_fifty_pushes_leave_no_memory_behind(loop):
    def resident(_):
        return psutil.Process().memory_info().rss

    actors = [loop.pool.engines[0], *loop.learner.ranks.actors]
    for _ in range(10):
        loop.push()
    before = [inside(actor, resident) for actor in actors]
    for _ in range(50):
        loop.push()
    grown = [(inside(actor, resident) - first) / 2**20 for actor, first in zip(actors, before)]
    model = Path(loop.model_path, "model.safetensors").stat().st_size / 2**20
    assert max(grown) < 0.2 * 50 * model, f"MiB grown: {grown}, by a model of {model:.2f}"
