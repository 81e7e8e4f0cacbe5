"""The shuffled control: the same rewards, dealt to other completions."""
import numpy as np

from frpo.rewards.control import shuffled
from frpo.types import Prompt, RolloutGroup, ScoredGroup


def scored(index, rewards):
    prompt = Prompt(uid=f"p{index}", messages=(), token_ids=(1,))
    rewards = np.array(rewards, dtype=float)
    group = RolloutGroup(group_id=(0, index), prompt=prompt, completions=())
    return ScoredGroup(group=group, rewards_G=rewards, terms={"a": rewards * 10, "b": rewards - 1})


def batch():
    return [scored(0, [0, 1, 2]), scored(1, [3, 4]), scored(2, [5, 6, 7, np.nan])]


def flat(groups):
    return np.concatenate([group.rewards_G for group in groups])


def test_keeps_the_values_and_the_shape_but_not_the_pairing():
    before, after = batch(), shuffled(batch(), seed=1)
    np.testing.assert_array_equal(np.sort(flat(after)), np.sort(flat(before)))
    assert [len(group.rewards_G) for group in after] == [3, 2, 4]
    assert [group.group for group in after] == [group.group for group in before]
    assert (flat(after) != flat(before)).sum() >= 5
    # Across groups too: permuting within a group would leave these sets as they were.
    assert set(after[1].rewards_G) != {3.0, 4.0}


def test_terms_move_with_their_sum():
    for group in shuffled(batch(), seed=1):
        np.testing.assert_array_equal(group.terms["a"], group.rewards_G * 10)
        np.testing.assert_array_equal(group.terms["b"], group.rewards_G - 1)


def test_seed_decides():
    np.testing.assert_array_equal(flat(shuffled(batch(), seed=3)), flat(shuffled(batch(), seed=3)))
    assert not np.array_equal(flat(shuffled(batch(), seed=3)), flat(shuffled(batch(), seed=4)), equal_nan=True)


def test_input_is_untouched_and_empty_is_fine():
    groups = batch()
    shuffled(groups, seed=1)
    np.testing.assert_array_equal(flat(groups), [0, 1, 2, 3, 4, 5, 6, 7, np.nan])
    assert shuffled([], seed=1) == []
