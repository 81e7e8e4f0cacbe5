"""The overlong punishment by hand."""
import pytest

from frpo.rewards import RewardSpec, RewardSuite
from frpo.rewards.length import soft_overlong
from frpo.types import Completion, Prompt, RolloutGroup


def of_lengths(lengths, **keys):
    return soft_overlong([[7] * length for length in lengths], **keys)


def test_punishment_by_hand():
    """10 tokens at most, the last 4 of them cost a quarter each."""
    assert of_lengths([0, 1, 6, 7, 8, 9, 10, 11, 1000], max_length=10, buffer=4) == [
        0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]


def test_the_buffer_may_be_everything_or_one_token():
    assert of_lengths([0, 1, 2, 4, 5], max_length=4, buffer=4) == [0, -0.25, -0.5, -1, -1]
    assert of_lengths([2, 3, 4], max_length=3, buffer=1) == [0, -1, -1]
    assert of_lengths([], max_length=3, buffer=1) == []


@pytest.mark.parametrize("keys, message", [
    (dict(max_length=4, buffer=5), "buffer must be at most max_length = 4, given 5; lower it"),
    (dict(max_length=4, buffer=0), "buffer must be a whole number of tokens >= 1, given 0"),
    (dict(max_length=0, buffer=1), "max_length must be a whole number of tokens >= 1, given 0"),
    (dict(max_length=4.0, buffer=1), r"max_length must be a whole number of tokens >= 1, given 4\.0"),
    (dict(max_length=4, buffer=True), "buffer must be a whole number of tokens >= 1, given True"),
])
def test_bad_parameters_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        of_lengths([1], **keys)


@pytest.mark.timeout(60)
def test_it_serves_as_a_reward_of_a_recipe():
    completions = tuple(
        Completion(text="any", token_ids=(7,) * length, logprobs=(0.0,) * length, loss_mask=(True,) * length,
                   version_spans=(), seed=0, finish_reason="length") for length in (2, 3, 4))
    prompt = Prompt(uid="p", messages=({"role": "user", "content": "ask"},), token_ids=(1,))
    spec = RewardSpec(name="overlong", function="frpo.rewards.length:soft_overlong", weight=2.0,
                      kwargs={"max_length": 4, "buffer": 2})
    with RewardSuite([spec]) as suite:
        scored, = suite.score([RolloutGroup(group_id=(0, 0), prompt=prompt, completions=completions)]).groups
    assert scored.rewards_G.tolist() == [0.0, -1.0, -2.0]
