"""One number of several rewards: GDPO and RVPO by hand, missing rewards, and how they compose with estimators."""
import math

import numpy as np
import pytest

from frpo.config.loader import load_recipe
from frpo.errors import ConfigError
from frpo.loops.collect import teaches
from frpo.objectives.constraint import NU, Constraint
from frpo.objectives.frpo import FRPO
from frpo.objectives.group import RLOO
from frpo.objectives.scalarise import EPS, GDPO, RVPO, Given, Scalarised
from frpo.objectives.stage import compute_advantages, reweighted
from frpo.types import Completion, Prompt, RolloutGroup, ScoredGroup

NAN = math.nan
ROOT = math.sqrt(0.5)
"""Standard deviation over k - 1 of two numbers that are 1 apart."""


def scored(draw=0, **terms):
    count = len(next(iter(terms.values())))
    completion = Completion(text="", token_ids=(1,), logprobs=(-1.0,), loss_mask=(True,), version_spans=(), seed=0,
                            finish_reason="stop")
    group = RolloutGroup(group_id=(0, draw), prompt=Prompt(uid="p", messages=(), token_ids=(1,)),
                         completions=(completion,) * count)
    arrays = {name: np.array(values, dtype=np.float64) for name, values in terms.items()}
    return ScoredGroup(group=group, rewards_G=sum(arrays.values()), terms=arrays)


def gdpo(**weights):
    return Scalarised(scalariser=GDPO(), weights=weights)


def test_gdpo_by_hand():
    """a = (1, 0), b = (0, 10): Z_a = (z, -z) with z = .5 / (sqrt .5 + eps), Z_b = -(.) with 5 / (10 sqrt .5 + eps)."""
    a, b = 0.5 / (ROOT + EPS), 5 / (10 * ROOT + EPS)
    p = np.array([2 * a - b, b - 2 * a])
    found, = gdpo(a=2.0, b=1.0).of_batch([scored(a=[1, 0], b=[0, 10])])
    np.testing.assert_allclose(found, p / (np.std(p, ddof=1) + EPS))


def test_gdpo_standardises_over_all_completions_of_the_batch():
    groups = [scored(a=[1, 0], b=[1, 0]), scored(a=[1, 0], b=[0, 1], draw=1)]
    z = 0.5 / (ROOT + EPS)
    p = np.array([2 * z, -2 * z, 0, 0])
    found = np.concatenate(gdpo(a=1.0, b=1.0).of_batch(groups))
    np.testing.assert_allclose(found, p / (np.std(p, ddof=1) + EPS), atol=1e-15)


def test_equal_sums_of_different_rewards_are_told_apart():
    """(1, 0) and (0, 1) sum to the same; the rarer reward counts for more."""
    group = scored(a=[1, 0, 0, 0], b=[0, 1, 1, 0])
    assert group.rewards_G[0] == group.rewards_G[1]
    found, = gdpo(a=1.0, b=1.0).of_batch([group])
    assert found[0] > found[1] == found[2] > found[3]


def test_a_reward_that_abstains_adds_nothing_and_one_of_weight_0_takes_no_part():
    group = scored(a=[1, 0, NAN], b=[NAN, NAN, NAN], c=[5, 9, 7])
    found = gdpo(a=1.0, b=1.0).of_group(group)
    z = 0.5 / (ROOT + EPS)
    np.testing.assert_allclose(found, [z, -z, NAN])
    batch, = gdpo(a=1.0, b=1.0).of_batch([group])
    assert np.isnan(batch[2]) and batch[0] == -batch[1]
    alone = gdpo(a=1.0, b=1.0).of_group(scored(a=[3, NAN], b=[1, 2]))
    np.testing.assert_allclose(alone, [-z, z])  # one value of a compares nothing


def test_rvpo_by_hand():
    """Z = (+-z, -+y): -(1/2) ln((e^{-2z} + e^{2y}) / 2) for the first, signs changed for the second."""
    z, y = 0.5 / (ROOT + EPS), 5 / (10 * ROOT + EPS)
    rvpo = Scalarised(scalariser=RVPO(k=2.0), weights={"a": 1.0, "b": 1.0})
    found, = rvpo.of_batch([scored(a=[1, 0], b=[0, 10])])
    expected = [-0.5 * math.log((math.exp(-2 * s * z) + math.exp(2 * s * y)) / 2) for s in (1, -1)]
    np.testing.assert_allclose(found, expected)


def test_rvpo_goes_from_the_mean_to_the_worst_and_weights_are_shares():
    group = scored(a=[1, 0, 0.4], b=[0, 1, 0.2])
    z = np.array([GDPO().of_group({"r": group.terms[name]}, {"r": 1.0}) for name in "ab"])
    for k, expected in ((1e-7, z.mean(axis=0)), (1e4, z.min(axis=0))):
        found, = Scalarised(scalariser=RVPO(k=k), weights={"a": 0.5, "b": 0.5}).of_batch([group])
        np.testing.assert_allclose(found, expected, atol=1e-3)
    found, = Scalarised(scalariser=RVPO(k=1e-7), weights={"a": 3.0, "b": 1.0}).of_batch([group])
    np.testing.assert_allclose(found, (3 * z[0] + z[1]) / 4, atol=1e-5)


def test_rvpo_without_a_reward_for_one_completion():
    rvpo = Scalarised(scalariser=RVPO(k=500.0), weights={"a": 1.0, "b": 1.0})
    found = rvpo.of_group(scored(a=[1, 0, NAN], b=[0, NAN, NAN]))
    z = 0.5 / (ROOT + EPS)
    np.testing.assert_allclose(found, [z, -z, NAN])  # b has one value, which compares nothing


def test_given_takes_them_as_advantages_and_any_other_estimator_as_rewards():
    groups = [scored(a=[1, 0], b=[1, 0]), scored(a=[1, 0, NAN], b=[0, 1, NAN], draw=1)]
    scalarised = gdpo(a=1.0, b=2.0)
    values = scalarised.of_batch(groups)
    published = compute_advantages(groups, Given(), [None, None], scalarised=scalarised)
    robust = compute_advantages(groups, FRPO(lam=0.5), [None, None], scalarised=scalarised)
    for each, worst, values_G in zip(published, robust, values, strict=True):
        np.testing.assert_array_equal(each.advantages_G, np.nan_to_num(values_G))
        np.testing.assert_array_equal(worst.advantages_G, FRPO(lam=0.5).advantages(values_G).advantages_G)
        np.testing.assert_array_equal(each.scalars_G, values_G)
    np.testing.assert_array_equal(published[0].scored.rewards_G, [2, 0])  # what is logged stays the sum


def test_reweighted_advantages_are_of_the_same_numbers():
    groups = [scored(a=[1, 0], b=[0, 4]), scored(a=[1, 0], b=[1, 3], draw=1)]
    before = compute_advantages(groups, FRPO(), [None, None], scalarised=gdpo(a=1.0, b=1.0))
    ratios = [np.array([0.1, -0.2]), np.array([0.0, 0.3])]
    for old, new, ratio_G in zip(before, reweighted(before, FRPO(), ratios), ratios, strict=True):
        np.testing.assert_array_equal(new.advantages_G, FRPO().reweighted(old.scalars_G, ratio_G).advantages_G)


def test_they_are_the_reward_stream_of_a_constraint():
    rule, group = Constraint(cost="c", normalise="none"), scored(a=[1, 0], b=[0, 4], c=[3, 1])
    scalarised = gdpo(a=1.0, b=1.0)
    found, = compute_advantages([group], RLOO(), [None], mixture=rule.mixture({NU: 1.0}), scalarised=scalarised)
    values, = scalarised.of_batch([group])
    expected = (RLOO().advantages(values).advantages_G + RLOO().advantages([-3, -1]).advantages_G) / 2
    np.testing.assert_allclose(found.advantages_G, expected)


def test_a_group_whose_rewards_differ_teaches_even_if_their_sums_are_equal():
    group = scored(a=[1, 0, 0], b=[0, 1, 1])
    assert not teaches(group, RLOO(), 1e-6)
    assert teaches(group, RLOO(), 1e-6, scalarised=gdpo(a=1.0, b=2.0))


ONE = "{name: %s, function: 'frpo.rewards.verifiers:boxed_format', weight: %s}"


@pytest.mark.parametrize("weights, keys, message", [
    ((1.0, 0.0), ["objective.scalarise=gdpo"], "needs at least two rewards whose weight is not 0, given a;"),
    ((1.0, -1.0), ["objective.scalarise=rvpo"], "rvpo needs weights above 0, given -1 for reward 'b'"),
    ((1.0, 1.0), ["objective.scalarise={name: rvpo, k: 0.0}"], "k must be above 0 and finite, given 0"),
    ((1.0, 1.0), ["objective.scalarise=gdpp"], "unknown scalariser 'gdpp' .did you mean 'gdpo'"),
    ((1.0, 1.0), ["objective.scalarise=gdpo", "objective.kl_coef=0.1", "objective.kl_estimator=k1"],
     "k1 subtracts the KL from rewards, but scalarise removes their unit"),
])
def test_what_cannot_work_is_refused(weights, keys, message):
    rewards = ", ".join(ONE % pair for pair in zip("ab", weights))
    with pytest.raises(ConfigError, match=message):
        load_recipe("smoke", [f"rewards=[{rewards}]", *keys])


def test_a_recipe_names_a_scalariser_and_its_keys():
    rewards = ", ".join(ONE % pair for pair in (("a", 2.0), ("b", -1.0), ("logged", 0.0)))
    recipe = load_recipe("smoke", [f"rewards=[{rewards}]", "objective.scalarise=gdpo"])
    assert recipe.scalarised == Scalarised(scalariser=GDPO(), weights={"a": 2.0, "b": -1.0})
    assert load_recipe("smoke").scalarised is None
