"""Scored groups to advantaged groups, and k1 in the reward, by hand."""
import numpy as np
import pytest

from frpo.objectives.frpo import FRPO
from frpo.objectives.group import DrGRPO
from frpo.objectives.stage import (
    compute_advantages,
    require_reweightable,
    reweighted,
    sequence_kl,
    sequence_log_ratios,
)
from frpo.types import Completion, Prompt, RolloutGroup, ScoredGroup

PROMPT = Prompt(uid="p", messages=(), token_ids=(1,))


def scored(rewards, logprobs, masks=None, draw=0, cut=()):
    masks = masks or [[True] * len(row) for row in logprobs]
    completions = tuple(
        Completion(text="", token_ids=tuple(range(len(row))), logprobs=tuple(row), loss_mask=tuple(mask),
                   version_spans=(), seed=0, finish_reason="length" if index in cut else "stop")
        for index, (row, mask) in enumerate(zip(logprobs, masks)))
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
    plain, = compute_advantages([group], DrGRPO(), [reference])
    taxed, = compute_advantages([group], DrGRPO(), [reference], kl_in_reward=0.4)
    np.testing.assert_allclose(plain.advantages_G, [0.5, -0.5])
    np.testing.assert_allclose(taxed.advantages_G, [-0.1, 0.1])
    np.testing.assert_array_equal(taxed.scored.rewards_G, [1, 0])  # logged rewards stay what was scored
    assert taxed.ref_logprobs is reference


def test_an_abstained_sample_stays_out():
    group = scored([1, np.nan, 0], [[-1.0], [-1.0], [-1.0]])
    result, = compute_advantages([group], DrGRPO(), [(np.array([-1.0]),) * 3], kl_in_reward=1.0)
    np.testing.assert_allclose(result.advantages_G, [0.5, 0, -0.5])
    assert result.stats["abstained"] == 1


def test_groups_keep_their_order_and_never_mix():
    groups = [scored([0, 4], [[0.0], [0.0]], draw=0), scored([10, 12], [[0.0], [0.0]], draw=1)]
    results = compute_advantages(groups, DrGRPO(), [None, None])
    assert [result.scored.group.group_id for result in results] == [(0, 0), (0, 1)]
    np.testing.assert_allclose([result.advantages_G for result in results], [[-2, 2], [-1, 1]])


def test_a_missing_reference_is_an_error():
    with pytest.raises(ValueError, match="zip\\(\\) argument 3 is shorter"):
        compute_advantages([scored([0, 1], [[0.0], [0.0]])], DrGRPO(), [])


# --- reweighting ------------------------------------------------------------------------------------------------------

def two_groups(**keys):
    """Lengths 2, 1 (of 2, one is a hole) and 0, 3; log-probs rose by 0.5 a token everywhere, by 9 in the hole."""
    groups = [scored([0, 1], [[0.0, 0.0], [0.0, 0.0]], [[True, True], [True, False]], draw=0, **keys),
              scored([1, 0], [[], [0.0, 0.0, 0.0]], draw=1)]
    old = [(np.zeros(2), np.zeros(2)), (np.zeros(0), np.zeros(3))]
    now = [(np.full(2, 0.5), np.array([0.5, 9.0])), (np.zeros(0), np.full(3, 0.5))]
    return compute_advantages(groups, FRPO(), [None, None]), now, old


@pytest.mark.parametrize("reduction, expected", [
    ("seq-sum", [[1.0, 0.5], [0.0, 1.5]]),                   # the sequence's own log-ratio
    ("seq-mean-token-mean", [[0.5, 0.5], [0.0, 0.5]]),       # its mean over tokens
    ("token-mean", [[4 / 6, 2 / 6], [0.0, 1.0]]),            # times N / sum T = 4 / 6
    ("fixed-length", [[0.2, 0.1], [0.0, 0.3]]),              # over L_max = 5
])
def test_log_ratios_have_the_weights_of_the_loss(reduction, expected):
    found = sequence_log_ratios(*two_groups(), reduction=reduction, max_length=5)
    assert [row.tolist() for row in found] == [pytest.approx(row) for row in expected]


def test_a_completion_without_a_loss_has_ratio_one():
    found = sequence_log_ratios(*two_groups(cut=[0]), reduction="seq-sum", max_length=5, train_truncated=False)
    assert [row.tolist() for row in found] == [[0.0, 0.5], [0.0, 1.5]]
    found = sequence_log_ratios(*two_groups(cut=[0]), reduction="seq-sum", max_length=5)
    assert found[0].tolist() == [1.0, 0.5]


def test_reweighting_keeps_everything_but_advantages_and_stats():
    groups, _, _ = two_groups()
    ratios = [np.array([0.1, -0.2]), np.array([0.0, 0.4])]
    found = reweighted(groups, FRPO(), ratios)
    for before, after, log_ratio_G in zip(groups, found, ratios):
        expected = FRPO().reweighted(before.scored.rewards_G, log_ratio_G)
        assert after.scored is before.scored and after.ref_logprobs is before.ref_logprobs
        assert after.advantages_G.tolist() == expected.advantages_G.tolist() != before.advantages_G.tolist()
        assert after.stats == expected.stats


def test_reweighting_taxes_the_rewards_as_before():
    """Rewards 1, 0 less 0.4 x (2.5, -0.5) are 0, 0.2: at ratio 1 the advantages of before."""
    group = scored([1, 0], [[-1.0, -2.0], [-1.0]])
    before = compute_advantages([group], FRPO(), [(np.array([-3.0, -2.5]), np.array([-0.5]))], kl_in_reward=0.4)
    after, = reweighted(before, FRPO(), [np.zeros(2)], kl_in_reward=0.4)
    assert after.advantages_G.tolist() == before[0].advantages_G.tolist() and after.advantages_G[0] < 0


@pytest.mark.parametrize("estimator, message", [
    (DrGRPO(), "the estimator dr_grpo has no method `reweighted`; use frpo"), (FRPO(lam=float("inf")), "a finite lam")])
def test_estimators_that_cannot_reweigh_are_named(estimator, message):
    require_reweightable(FRPO())
    with pytest.raises(ValueError, match=message):
        require_reweightable(estimator)
