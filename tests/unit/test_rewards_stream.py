"""Groups scored while others arrive, on real workers."""
import time

import numpy as np
import pytest

from frpo.rewards import RewardCallError, RewardSpec, RewardSuite, ScoreStream
from frpo.types import Completion, Prompt, RolloutGroup

pytestmark = pytest.mark.timeout(30)

SOURCE = '''
import os, time

def length(completions, log, **kwargs):
    with open(log, "a") as file:
        file.write(f"{len(completions)}\\n")
    return [float(len(text)) if text else None for text in completions]

def held(completions, log, gate, **kwargs):
    length(completions, log)
    while not os.path.exists(gate): time.sleep(0.01)
    return [1.0] * len(completions)

def picky(completions, **kwargs):
    if "bad" in completions: raise ValueError("cannot judge this")
    return [1.0] * len(completions)
'''


def group(draw, *texts):
    completions = tuple(
        Completion(text=text, token_ids=tuple(range(len(text))), logprobs=(0.0,) * len(text), version_spans=(), seed=0,
                   loss_mask=(True,) * len(text), finish_reason="stop") for text in texts)
    prompt = Prompt(uid=str(draw), messages=({"role": "user", "content": "ask"},), token_ids=(1,))
    return RolloutGroup(group_id=(2, draw), prompt=prompt, completions=completions)


@pytest.fixture
def suite(tmp_path):
    """(function, kwargs) -> a started suite of that one reward."""
    (tmp_path / "user.py").write_text(SOURCE)
    suites = []

    def make(function, **fields):
        spec = RewardSpec(name="r", function=f"{tmp_path / 'user.py'}:{function}", **fields)
        suites.append(RewardSuite([spec], chat=False))
        suites[-1].start()
        return suites[-1]

    yield make
    for started in suites:
        started.close()


def wait_until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("did not happen")


def test_groups_come_back_sorted_with_the_values_of_one_call(suite, tmp_path):
    rewards = suite("length", kwargs={"log": str(tmp_path / "log")})
    groups = [group(draw, "a" * (draw + 1), "") for draw in (3, 0, 2, 1)]
    with ScoreStream(rewards) as stream:
        for each in groups:
            stream.add(each)
        streamed = stream.result()
    whole = rewards.score(sorted(groups, key=lambda g: g.group_id))
    assert [scored.group.group_id for scored in streamed.groups] == [(2, i) for i in range(4)]
    for one, other in zip(streamed.groups, whole.groups, strict=True):
        np.testing.assert_array_equal(one.rewards_G, other.rewards_G)
    assert streamed.counts == whole.counts and whole.counts["reward/r/abstained"] == 4


def test_the_first_group_is_scored_before_the_last_arrives_and_the_others_share_a_call(suite, tmp_path):
    log, gate = tmp_path / "log", tmp_path / "gate"
    rewards = suite("held", kwargs={"log": str(log), "gate": str(gate)})
    with ScoreStream(rewards) as stream:
        stream.add(group(0, "a", "b"))
        wait_until(log.exists)  # the call runs while we go on
        for draw in (1, 2, 3):
            stream.add(group(draw, "a", "b"))
        gate.touch()
        assert len(stream.result().groups) == 4
    assert log.read_text().split() == ["2", "6"]


def test_an_error_comes_out_at_the_next_group(suite):
    with ScoreStream(suite("picky")) as stream:
        stream.add(group(0, "bad"))
        wait_until(lambda: stream._call.done())
        with pytest.raises(RewardCallError, match="cannot judge this"):
            stream.add(group(1, "good"))


def test_an_error_in_the_last_call_comes_out_of_the_result(suite):
    with ScoreStream(suite("picky")) as stream:
        stream.add(group(0, "good"))
        stream.add(group(1, "bad"))
        with pytest.raises(RewardCallError, match="cannot judge this"):
            stream.result()


def test_abstained_calls_are_counted_over_all_calls(suite):
    with ScoreStream(suite("picky", on_error="abstain")) as stream:
        for draw in range(2):
            stream.add(group(draw, "bad", "good"))
            wait_until(lambda: stream._call.done())
        report = stream.result()
    assert report.counts["reward/r/failed"] == 2 and report.counts["reward/r/abstained"] == 4
    assert all(np.isnan(scored.rewards_G).all() for scored in report.groups)


def test_nothing_added_is_nothing_scored(suite):
    with ScoreStream(suite("picky")) as stream:
        assert stream.result().groups == []
