"""Sampling ahead: how far it may run, what a checkpoint keeps of it, and how it ends. Batches are collected by rule."""
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from frpo.data.selection import read_selection
from frpo.errors import EngineError
from frpo.loops import ahead
from frpo.loops.ahead import AsyncBatches
from frpo.run.build import SamplingParts
from frpo.types import Completion, Prompt, RolloutGroup, RunState, ScoredBatch, ScoredGroup, VersionSpan

STEPS = 6


def state_at(step, cursor=None):
    return RunState(step=step, policy_version=10 + step, data_cursor=2 * step if cursor is None else cursor,
                    recipe_digest="", file_offsets={})


def group_of(step, draw, version):
    completion = Completion(text="a", token_ids=(5, 6), logprobs=(-0.1, -1 / 3), loss_mask=(True, False), seed=4,
                            version_spans=(VersionSpan(policy_version=version, start=0, end=1),), finish_reason="stop")
    prompt = Prompt(uid=str(draw), messages=({"role": "user", "content": "?"},), token_ids=(1,), columns={"answer": 2})
    return ScoredGroup(group=RolloutGroup(group_id=(step, draw), prompt=prompt, completions=(completion,) * 2),
                       rewards_G=np.array([1 / 3, np.nan]), terms={"r": np.array([1 / 3, np.nan])})


class Collector:
    """In the place of `collect`: two groups a step, a third replaced in step 1; waits where `gate` is not set."""

    def __init__(self, fails_at=None):
        self.began, self.recorded, self.gate, self.fails_at = [], [], threading.Event(), fails_at
        self.gate.set()

    def __call__(self, parts, state, bar):
        self.began.append((state.step, state.policy_version, state.data_cursor))
        self.gate.wait(5)
        if state.step == self.fails_at:
            raise EngineError("engine 0 is gone")
        with parts.timer.phase("generate"):
            pass
        groups = [group_of(state.step, draw, state.policy_version) for draw in range(3 if state.step == 1 else 2)]
        return ScoredBatch(chosen=tuple(groups[:2]), replaced=tuple(groups[2:]), counts={"rollout/drawn": len(groups)},
                           positions=len(groups), selection={"p": [0.5, state.step]})


class Engines:
    def __init__(self):
        self.learner_lock = threading.RLock()

    def give_up(self):
        pass


@pytest.fixture
def source(monkeypatch):
    made = []

    def make(max_staleness, collector=None, state=None, checkpoint=None):
        collector = collector or Collector()
        monkeypatch.setattr(ahead, "collect", collector)
        recipe = SimpleNamespace(rollout=SimpleNamespace(max_staleness=max_staleness),
                                 run=SimpleNamespace(num_steps=STEPS))
        stream = SimpleNamespace(state={}, record=lambda groups: collector.recorded.append(len(groups)))
        sampling = SamplingParts(recipe=recipe, stream=stream, prompts=None, rewards=None, pool=None, sampler=None)
        batches = AsyncBatches(sampling, Engines())
        batches.start(state or state_at(0), checkpoint)
        made.append(batches)
        return batches, collector

    yield make
    for batches in made:
        batches.close()


def begun(collector, expected):
    """Whether exactly these steps' batches are begun, given time for them and a little for more."""
    deadline = time.monotonic() + 10
    while len(collector.began) < len(expected) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    return [step for step, *_ in collector.began] == expected


@pytest.mark.parametrize("k", [1, 2])
def test_a_batch_is_begun_once_its_policy_would_be_at_most_k_steps_older(source, k):
    batches, collector = source(k)
    cursor = 0
    for step in range(STEPS):
        batch = batches.next(state_at(step, cursor), bar=None)
        assert [group.group.group_id[0] for group in batch.chosen] == [step, step]
        assert begun(collector, list(range(min(step + k, STEPS - 1) + 1)))
        cursor += batch.positions
    # prompts go on where the batch before ended, also where dynamic sampling drew one more
    assert [cursor for *_, cursor in collector.began] == [0, 2, 5, 7, 9, 11]
    # the oldest version that may serve is the newest that was known when the batch was begun
    assert [version for _, version, _ in collector.began] == [10] * (k + 1) + list(range(11, 10 + STEPS - k))


def test_what_waits_is_kept_to_the_bit_and_what_was_only_begun_is_begun_again(source, tmp_path):
    batches, collector = source(2)
    batches.next(state_at(0), bar=None)
    assert begun(collector, [0, 1, 2])
    collector.gate.clear()
    second = batches.next(state_at(1, 2), bar=None)  # batch 2 waits, batch 3 is under way
    while len(collector.began) < 4:
        time.sleep(0.01)
    assert len(second.replaced) == 1
    batches.save(tmp_path)
    collector.gate.set()
    assert read_selection(tmp_path) == {"p": [0.5, 1]}  # as it was after the batch that was learned from last

    resumed, again = source(2, Collector(), state_at(2, 5), tmp_path)
    batch = resumed.next(state_at(2, 5), bar=None)
    kept = batch.chosen[1]
    assert (kept.group, batch.counts) == (group_of(2, 1, 10).group, {"rollout/drawn": 2})
    np.testing.assert_array_equal(kept.rewards_G, [1 / 3, np.nan])
    np.testing.assert_array_equal(kept.terms["r"], [1 / 3, np.nan])
    assert again.recorded == [2]  # selection hears of the batch that waited
    assert begun(again, [3, 4]) and [cursor for *_, cursor in again.began] == [7, 9]


def test_an_error_of_collecting_is_raised_where_the_batch_is_asked_for(source):
    batches, _ = source(1, Collector(fails_at=1))
    batches.next(state_at(0), bar=None)
    with pytest.raises(EngineError, match="engine 0 is gone"):
        batches.next(state_at(1, 2), bar=None)


def test_while_it_waits_for_a_batch_another_thread_may_command_the_learner_and_not_otherwise(source):
    batches, collector = source(1)
    turn, taken = batches.engines.learner_lock, []
    collector.gate.clear()

    def heal():
        with turn:
            taken.append(len(collector.began))
        collector.gate.set()

    healer = threading.Thread(target=heal)
    healer.start()
    time.sleep(0.05)
    assert taken == []  # the main thread is at work
    batches.next(state_at(0), bar=None)
    healer.join(5)
    assert taken == [1]


def test_seconds_of_collecting_and_of_waiting_are_told_apart(source):
    batches, _ = source(1)
    batches.next(state_at(0), bar=None)
    assert set(batches.sampling.timer.seconds) == {"generate", "wait"}


def test_a_run_that_ends_early_heals_no_engine_for_what_is_under_way(source, monkeypatch):
    monkeypatch.setattr(ahead, "JOIN_S", 0.05)
    batches, collector = source(1)
    batches.next(state_at(0), bar=None)
    assert begun(collector, [0, 1])
    collector.gate.clear()
    batches.next(state_at(1, 2), bar=None)
    while len(collector.began) < 3:
        time.sleep(0.01)
    batches.engines.give_up = collector.gate.set  # real engines leave their streams then
    batches.close()
    assert not batches.thread.is_alive()
    batches.engines.learner_lock.acquire()  # for the fixture
