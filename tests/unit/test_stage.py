"""Scored groups to advantaged groups, and k1 in the reward, by hand."""
import numpy as np
import pytest

from frpo.objectives.group import DrGRPO
from frpo.objectives.stage import advantaged, sequence_kl
from frpo.types import Completion, Prompt, RolloutGroup, ScoredGroup

PROMPT = Prompt(uid="p", messages=(), token_ids=(1,))


def scored(rewards, logprobs, masks=None, draw=0):
    masks = masks or [[True] * len(row) for row in logprobs]
    completions = tuple(
        Completion(text="", token_ids=tuple(range(len(row))), logprobs=tuple(row), loss_mask=tuple(mask),
                   version_spans=(), seed=0, finish_reason="stop") for row, mask in zip(logprobs, masks))
    group = RolloutGroup(group_id=(0, draw), prompt=PROMPT, completions=completions)
    return ScoredGroup(group=group, rewards_G=np.array(rewards, dtype=np.float64), terms={})


def test_k1_sums_over_tokens_with_a_loss():
    """(-1 + 3) + (-2 + 2.5) = 2.5; the second completion has a hole: only -1 + 0.5 = -0.5 counts."""
    group = scored([0, 0], [[-1.0, -2.0], [-1.0, -9.0]], [[True, True], [True, False]])
    reference = (np.array([-3.0, -2.5]), np.array([-0.5, 7.0]))
    np.testing.assert_allclose(sequence_kl(group, reference), [2.5, -0.5])


def test_k1_is_subtracted_before_the_estimator_sees_the_rewards():
    """Rewards 1, 0 less 0.4 x (2.5, -0.5) are 0, 0.2; centred -0.1, 0.1."""
    group = scored([1, 0], [[-1.0, -2.0], [-1.0]])
    reference = (np.array([-3.0, -2.5]), np.array([-0.5]))
    plain, = advantaged([group], DrGRPO(), [reference])
    taxed, = advantaged([group], DrGRPO(), [reference], kl_in_reward=0.4)
    np.testing.assert_allclose(plain.advantages_G, [0.5, -0.5])
    np.testing.assert_allclose(taxed.advantages_G, [-0.1, 0.1])
    np.testing.assert_array_equal(taxed.scored.rewards_G, [1, 0])  # logged rewards stay what was scored
    assert taxed.ref_logprobs is reference


def test_an_abstained_sample_stays_out():
    group = scored([1, np.nan, 0], [[-1.0], [-1.0], [-1.0]])
    result, = advantaged([group], DrGRPO(), [(np.array([-1.0]),) * 3], kl_in_reward=1.0)
    np.testing.assert_allclose(result.advantages_G, [0.5, 0, -0.5])
    assert result.stats["abstained"] == 1


def test_groups_keep_their_order_and_never_mix():
    groups = [scored([0, 4], [[0.0], [0.0]], draw=0), scored([10, 12], [[0.0], [0.0]], draw=1)]
    results = advantaged(groups, DrGRPO(), [None, None])
    assert [result.scored.group.group_id for result in results] == [(0, 0), (0, 1)]
    np.testing.assert_allclose([result.advantages_G for result in results], [[-2, 2], [-1, 1]])


def test_a_missing_reference_is_an_error():
    with pytest.raises(ValueError):
        advantaged([scored([0, 1], [[0.0], [0.0]])], DrGRPO(), [])
