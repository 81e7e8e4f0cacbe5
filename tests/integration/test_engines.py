"""Several engines, engines of several workers, and weights over gloo: the same function as the learner, every time.

A push over gloo is a row of broadcasts for which learner rank 0 and all workers need each other. What breaks it off
here is rank 0 or an engine, in the middle of one.
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

from frpo.cluster.recovery import RecoveringEngines
from frpo.errors import EngineError
from loop import (
    GREEDY,
    UNSCALED,
    RunningLoop,
    inside,
    pid_of,
    random_model,
    random_prompts,
    small_recipe,
    splitting_strategy,
)
from parity_matrix import LIMIT
from runs import LONG

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

PROMPTS = random_prompts(6, 50, seed=1)
AT_ONCE_S = 20
"""How long a broken push may take to be over; the time limit of a broadcast is that of a push, 60 s here."""


@pytest.fixture(scope="module")
def recipe_of(tmp_path_factory):
    """Keys of `small_recipe` -> (recipe, path) on one tied Qwen2 under ZeRO-3."""
    folder = tmp_path_factory.mktemp("engines")
    path = random_model(folder / "model", "qwen2", tied=True)
    strategy = splitting_strategy(folder, 3)
    return lambda **keys: (small_recipe(path, strategy, block_size=32, **keys), path)


@pytest.fixture(scope="module")
def two(ray_cluster, recipe_of):
    """Two engines of one process and two learner ranks; weights over gloo."""
    running = RunningLoop(*recipe_of(num_engines=2, backend="gloo"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def parallel(two, recipe_of):
    """One engine of two workers, and the learner ranks of `two`."""
    running = RunningLoop(*recipe_of(tensor_parallel_size=2, backend="gloo"))
    running._learner = two.learner
    assert running.pool
    yield running
    running.drop_pool()


class Cut:
    """Passes a client's calls on; `action` runs with number `at` of `method`, before it or, once begun, after it."""

    def __init__(self, client, method, at, action):
        self.client, self.method, self.at, self.action = client, method, at, action

    def __getattr__(self, name):
        own = getattr(self.client, name)
        if name != self.method:
            return own

        def call(*arguments):
            self.at -= 1
            if self.at == 0 and not name.startswith("begin_"):
                self.action()
            result = own(*arguments)
            if self.at == 0 and name.startswith("begin_"):
                time.sleep(0.5)  # the engines wait for rank 0 now
                self.action()
            return result

        return call


def cut_push(actor, method, at, action):
    """Make the sender of learner rank 0 cut its next push short."""
    actor.learner.sender.client = Cut(actor.learner.sender.client, method, at, action)


def mend_push(actor):
    actor.learner.sender.client = actor.learner.sender.client.client


def fail():
    raise RuntimeError("cut on purpose")


def greedy(loop):
    """Tokens and log-probs at the version in force, from all engines: equal to the bit if the weights are."""
    return [(c.token_ids.tolist(), c.logprobs.tolist())
            for group in loop.sample(PROMPTS, GREEDY) for c in group.completions]


def trained(loop, steps=3):
    """What is sampled, step by step, and the largest difference from the learner after any push."""
    loop.drawn, samples, gaps = 0, [], []
    for step in range(steps):
        loop.push()
        samples.append(loop.sample(random_prompts(5, 40, seed=step), UNSCALED))
        gaps.append(loop.gap(PROMPTS))
        loop.update(random_prompts(6, 40, seed=step))
        assert loop.gap(PROMPTS) > 1e4 * LIMIT["fp32"]  # so that a push that one engine missed would show
    return samples, max(gaps)


def assert_push_fails_and_heals(loop, match):
    """The push cut short in rank 0 leaves what is served as it was, and the next one brings the learner's weights."""
    versions, old = loop.pool.policy_versions(), greedy(loop)
    loop.update(PROMPTS)
    began = time.perf_counter()
    with pytest.raises(EngineError, match=match):
        loop.learner.push_weights(loop.version + 1)
    assert loop.pool.policy_versions() == versions == [loop.version] * len(versions)
    assert time.perf_counter() - began < AT_ONCE_S
    assert greedy(loop) == old
    inside(loop.learner.ranks.actors[0], mend_push)
    loop.push()
    assert loop.gap(PROMPTS) <= LIMIT["fp32"]
    assert greedy(loop) != old


@pytest.mark.timeout(240)
def test_two_engines_agree_with_the_learner_and_repeat_to_the_bit(two, recipe_of):
    two.become(*recipe_of(num_engines=2))
    samples, gap = trained(two)
    assert gap <= LIMIT["fp32"]
    two.become(*recipe_of(num_engines=2, backend="gloo"))
    again, gap = trained(two)
    assert gap <= LIMIT["fp32"]
    assert again == samples


@pytest.mark.timeout(60)
def test_samples_of_a_prompt_share_its_whole_blocks(two):
    def cached_tokens(engine, token_ids):
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": token_ids}] * 4
        outputs = engine.llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
        return [output.num_cached_tokens for output in outputs]

    prompt, = random_prompts(1, 50, seed=2)
    assert inside(two.pool.engines[0], cached_tokens, list(prompt.token_ids)) == [0, 32, 32, 32]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("method, at", [("begin_init_weight_transfer_engine", 1), ("begin_update_weights", 1),
                                        ("begin_update_weights", 3), ("finish_weight_update", 1)])
def test_a_push_over_gloo_that_fails_in_rank_0_changes_nothing(two, method, at):
    two.push()
    rank_0 = two.learner.ranks.actors[0]
    if method.startswith("begin_init"):
        two.learner.connect_engines(two.pool.client(), two.recipe.weight_sync)  # the first push over it forms the group
    inside(rank_0, cut_push, method, at, fail)
    assert_push_fails_and_heals(two, "push weights: learner rank 0 .*cut on purpose")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("method, at", [("begin_init_weight_transfer_engine", 1), ("begin_update_weights", 3)])
def test_an_engine_killed_during_a_push_over_gloo_is_replaced(two, method, at):
    two.push()
    survivor, victim = (pid_of(engine) for engine in two.pool.engines)
    two.learner.connect_engines(two.pool.client(), two.recipe.weight_sync)
    inside(two.learner.ranks.actors[0], cut_push, method, at, lambda: os.kill(victim, signal.SIGKILL))
    two.update(PROMPTS)
    engines = RecoveringEngines(two.pool, two.learner, max_restarts=1)
    engines.push(two.version + 1)
    two.version += 1
    assert engines.restarts_left == 0
    assert two.pool.policy_versions() == [two.version] * 2
    assert [pid_of(engine) == pid for engine, pid in zip(two.pool.engines, (survivor, victim))] == [True, False]
    assert two.gap(PROMPTS) <= LIMIT["fp32"]


@pytest.mark.timeout(120)
def test_rank_0_killed_during_a_push_over_gloo_changes_nothing(two):
    two.push()
    old, rank_0 = greedy(two), pid_of(two.learner.ranks.actors[0])
    inside(two.learner.ranks.actors[0], cut_push, "begin_update_weights", 3, lambda: os.kill(rank_0, signal.SIGKILL))
    began = time.perf_counter()
    with pytest.raises(EngineError, match="push weights: learner rank 0 .* died"):
        two.learner.push_weights(two.version + 1)
    assert two.pool.policy_versions() == [two.version] * 2
    assert time.perf_counter() - began < AT_ONCE_S
    assert greedy(two) == old
    two.drop_learner()
    two.push()  # new ranks, at the model on disk
    assert two.gap(PROMPTS) <= LIMIT["fp32"]


@pytest.mark.timeout(240)
def test_weights_that_land_in_place_are_those_of_a_staged_push(two, recipe_of):
    """What GPUs do by default; only the transport differs there."""
    two.become(*recipe_of(num_engines=2, backend="gloo"))
    staged, _ = trained(two)
    two.become(*recipe_of(num_engines=2, backend="gloo", staged=False))
    in_place, gap = trained(two)
    assert gap <= LIMIT["fp32"]
    assert in_place == staged


@pytest.mark.timeout(120)
@pytest.mark.parametrize("method, at, action", [
    ("begin_init_weight_transfer_engine", 1, "fail"), ("start_weight_update", 1, "fail"),
    pytest.param("begin_update_weights", 1, "fail", marks=LONG), ("begin_update_weights", 3, "fail"),
    pytest.param("finish_weight_update", 1, "fail", marks=LONG), ("begin_update_weights", 3, "kill an engine")])
def test_a_push_in_place_that_breaks_off_is_healed_by_new_engines(two, recipe_of, method, at, action):
    """What is a mixture never serves. Where the push broke off before any weight moved, the engines stay."""
    if two.recipe.weight_sync.staged is not False:
        two.become(*recipe_of(num_engines=2, backend="gloo", staged=False))
    two.push()
    before = [pid_of(engine) for engine in two.pool.engines]
    two.learner.connect_engines(two.pool.client(), two.recipe.weight_sync)
    kill = action != "fail"
    inside(two.learner.ranks.actors[0], cut_push, method, at,
           (lambda: os.kill(before[1], signal.SIGKILL)) if kill else fail)
    two.update(PROMPTS)
    engines = RecoveringEngines(two.pool, two.learner, max_restarts=1)
    began = time.perf_counter()
    if method.startswith(("begin_init", "start")) and not kill:
        with pytest.raises(EngineError, match="cut on purpose"):
            engines.push(two.version + 1)
        assert two.pool.lost() == [] and time.perf_counter() - began < AT_ONCE_S
        inside(two.learner.ranks.actors[0], mend_push)
        two.push()
    else:
        engines.push(two.version + 1)  # the first try breaks off; the second reaches the new engines
        two.version += 1
        assert engines.restarts_left == 0
        assert not set(before) & {pid_of(engine) for engine in two.pool.engines}
    assert two.pool.policy_versions() == [two.version] * 2
    assert two.gap(PROMPTS) <= LIMIT["fp32"]


@pytest.mark.timeout(60)
def test_a_mixture_refuses_to_serve(two, recipe_of):
    two.push()
    inside(two.learner.ranks.actors[0], cut_push, "begin_update_weights", 3, fail)
    with pytest.raises(EngineError, match="cut on purpose"):
        two.learner.push_weights(two.version + 1)
    assert two.pool.lost() == [0, 1] and two.pool.dead() == []
    with pytest.raises(EngineError, match="a push broke off while it changed weights in place; rebuild and sync it"):
        two.sample(PROMPTS)
    two.drop_pool()
    two.push()
    assert two.gap(PROMPTS) <= LIMIT["fp32"]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("backend", [pytest.param("gloo", marks=LONG), "cpu_shm"])
def test_an_engine_of_two_workers_agrees_with_the_learner(parallel, recipe_of, backend):
    if parallel.recipe.weight_sync.backend != backend:
        parallel.become(*recipe_of(tensor_parallel_size=2, backend=backend))
    _, gap = trained(parallel)
    assert gap <= LIMIT["fp32"]
    assert_shared_memory_has_no_name(parallel)
    method = {"cpu_shm": "update_weights", "gloo": "begin_update_weights"}[backend]
    inside(parallel.learner.ranks.actors[0], cut_push, method, 3, fail)
    assert_push_fails_and_heals(parallel, "push weights: learner rank 0 .*cut on purpose")


def assert_shared_memory_has_no_name(loop):
    """So that none is left of workers that are killed, and nobody has to find out whose it was."""
    mapped = [line for worker in workers_of(loop)
              for line in Path(f"/proc/{worker.pid}/maps").read_text(encoding="utf-8").splitlines()
              if "/dev/shm/vllm_dist_" in line]
    assert len(mapped) == 4 and all(line.endswith("(deleted)") for line in mapped), mapped  # two by each of two


def workers_of(loop):
    engine = psutil.Process(pid_of(loop.pool.engines[0]))
    return [child for child in engine.children(recursive=True) if "Worker" in child.name()]


@pytest.mark.timeout(60)
def test_a_worker_that_dies_takes_its_engine_and_the_other_worker_along(parallel):
    engine = psutil.Process(pid_of(parallel.pool.engines[0]))
    workers = workers_of(parallel)
    assert len(workers) == 2
    workers[1].kill()
    _, alive = psutil.wait_procs([engine, *workers], timeout=AT_ONCE_S)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert parallel.pool.dead() == [0]
    parallel.drop_pool()
