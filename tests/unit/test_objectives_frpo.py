"""FRPO advantages against numbers and limits derived by hand. Gradients are judged in tests/numerics."""
from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from frpo.objectives.frpo import FRPO, TiltedGroup, tilt
from frpo.objectives.group import RLOO, DrGRPO

REWARDS = np.array([1.0, 0.7, 0.35, 0.0])
BOTH = pytest.mark.parametrize("estimator", ["plugin", "jackknife"])


def advantages(rewards, **keys):
    return FRPO(**keys).advantages(np.asarray(rewards, dtype=np.float64)).advantages_G


def stats(rewards, **keys):
    return FRPO(**keys).advantages(np.asarray(rewards, dtype=np.float64)).stats


@pytest.fixture(autouse=True)
def no_numpy_warnings():
    """A NaN or overflow that happens to be hidden later still fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("estimator, value, expected", [
    ("plugin", 0.3779057, [0.355913, 0.237456, -0.028699, -0.564669]),
    ("jackknife", 0.3284919, [0.426018, 0.350729, 0.116836, -0.893583]),
])
def test_anchor_values(estimator, value, expected):
    keys = dict(lam=0.5, estimator=estimator, scale="exact")
    assert advantages(REWARDS, **keys) == pytest.approx(expected, abs=6e-7)
    name = "certainty_equivalent" if estimator == "plugin" else "certainty_equivalent_jackknife"
    assert stats(REWARDS, **keys)[name] == pytest.approx(value, abs=6e-8)


def test_one_bad_of_eight():
    result = advantages([1] * 7 + [0], lam=0.2, estimator="jackknife", scale="exact")
    assert result == pytest.approx([0.372038] * 7 + [-2.604269], abs=6e-7)


def test_two_samples_by_hand():
    """lam 1, r = (log 3, 0): weights 1/3 and 1, p = (1/4, 3/4), A = 1 - 2p; the jackknife of two is twice it."""
    rewards = [math.log(3), 0.0]
    assert advantages(rewards, estimator="plugin") == pytest.approx([0.5, -0.5])
    assert advantages(rewards, estimator="jackknife") == pytest.approx([1.0, -1.0])
    told = stats(rewards, estimator="jackknife")
    assert told["certainty_equivalent"] == pytest.approx(math.log(3 / 2))  # -log((1/3 + 1)/2)
    # 2 r* - (1/2)(r_1 + r_2)
    assert told["certainty_equivalent_jackknife"] == pytest.approx(2 * math.log(1.5) - math.log(3) / 2)
    assert told["gap"] == pytest.approx(math.log(3) / 2 - math.log(1.5))
    assert told["ess"] == pytest.approx(1.6)  # 1 / (1/16 + 9/16)
    assert told["max_weight"] == pytest.approx(0.75)
    assert told["tilt_kl"] == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert told["worst_reward"] == 0.0 and told["lam"] == 1.0 and told["negative_share"] == 0.0


def test_jackknife_of_three_by_hand():
    """lam 1, weights (1, 2, 4)/7: P(-0) = (., 1/3, 2/3), P(-1) = (1/5, ., 4/5), P(-2) = (1/3, 2/3, .)."""
    rewards = -np.log([1.0, 2.0, 4.0])
    expected = [3 / 7 - 2 / 3 * (1 / 5 + 1 / 3), 6 / 7 - 2 / 3 * (1 / 3 + 2 / 3), 12 / 7 - 2 / 3 * (2 / 3 + 4 / 5)]
    assert TiltedGroup.of(rewards, 1.0, leave_one_out=True).coefficients() == pytest.approx(expected)


@pytest.mark.parametrize("lam, exact, unit, max1", [(0.5, 0.5, 1, 1), (2.0, 2.0, 1, 2)])
def test_scales(lam, exact, unit, max1):
    base = 1 - 4 * tilt(REWARDS, lam)[0]
    for scale, factor in (("exact", exact), ("unit", unit), ("max1", max1)):
        assert advantages(REWARDS, lam=lam, estimator="plugin", scale=scale) == pytest.approx(factor * base)


@BOTH
@pytest.mark.parametrize("lam", [0.05, 0.5, 5.0])
def test_sum_shift_and_scale(estimator, lam):
    keys = dict(estimator=estimator, scale="exact")
    base = advantages(REWARDS, lam=lam, **keys)
    assert base.sum() == pytest.approx(0, abs=1e-13)
    assert advantages(REWARDS + 17.0, lam=lam, **keys) == pytest.approx(base, abs=1e-11)
    assert advantages(3.0 * REWARDS, lam=3.0 * lam, **keys) == pytest.approx(3.0 * base, rel=1e-11)
    assert advantages(REWARDS[::-1], lam=lam, **keys) == pytest.approx(base[::-1], rel=1e-12)


@BOTH
def test_low_rewards_have_the_low_advantages(estimator):
    result = advantages(REWARDS, lam=0.5, estimator=estimator)
    assert (np.diff(result) < 0).all() and result[-1] < 0 < result[0]


@pytest.mark.parametrize("estimator, baseline", [("plugin", DrGRPO()), ("jackknife", RLOO())])
def test_large_and_infinite_lam_is_a_centred_reward(estimator, baseline):
    limit = baseline.advantages(REWARDS).advantages_G
    assert advantages(REWARDS, lam=1e5, estimator=estimator, scale="exact") == pytest.approx(limit, abs=2e-5)
    for scale in ("exact", "max1"):
        assert advantages(REWARDS, lam=math.inf, estimator=estimator, scale=scale) == pytest.approx(limit, rel=1e-14)
    told = stats(REWARDS, lam=math.inf, estimator=estimator)
    assert told["certainty_equivalent"] == pytest.approx(0.5125) and told["gap"] == 0.0
    assert told["ess"] == pytest.approx(4) and told["tilt_kl"] == 0.0


def test_first_order_in_one_over_lam():
    """Plug-in: A = d - (d^2 - mean d^2)/(2 lam) + O(1/lam^2)."""
    d = REWARDS - REWARDS.mean()
    second = d - (d**2 - np.mean(d**2)) / (2 * 100.0)
    result = advantages(REWARDS, lam=100.0, estimator="plugin", scale="exact")
    assert np.abs(result - second).max() < 1e-4 * np.abs(second - d).max() * 100


def test_small_lam_sees_only_the_tied_worst():
    """A/lam -> 1 for all but the m tied worst, 1 - k/m for those."""
    result = advantages([1, 0.2, 0, 0, 0.9, 0.5], lam=1e-3, estimator="plugin", scale="unit")
    assert result == pytest.approx([1, 1, -2, -2, 1, 1], abs=1e-12)


def test_dominated_jackknife_rewards_the_second_worst_and_shrink_stops_it():
    """lam -> 0: worst -2(k - 1), second worst +k, the others +1 (unit scale); the guard falls back to p here."""
    rewards = [1.0, 0.0, 0.9, 0.4, 0.8]
    keys = dict(lam=1e-3, estimator="jackknife", scale="unit")
    assert advantages(rewards, **keys) == pytest.approx([1, -8, 1, 5, 1], abs=1e-9)
    # Only the worst is positive: the three best are negative too, by less than the tolerance above.
    assert stats(rewards, **keys)["negative_share"] == pytest.approx(0.8)
    assert advantages(rewards, guard="shrink", **keys) == pytest.approx([1, -4, 1, 1, 1], abs=1e-9)
    assert stats(rewards, guard="shrink", **keys)["negative_share"] == 0.0


def test_shrink_keeps_as_much_jackknife_as_stays_positive():
    rewards = np.array([1.0, 0.0, 0.9, 0.25, 0.8])
    tilted = TiltedGroup.of(rewards, 0.2, leave_one_out=True)
    p, c = tilted.p_K, tilted.coefficients()
    taus = [p_i / (p_i - c_i) for p_i, c_i in zip(p, c, strict=True) if c_i < 0]
    tau = min(taus)
    assert 0.05 < tau < 0.95
    shrunk = (1 - advantages(rewards, lam=0.2, scale="unit", guard="shrink")) / 5
    assert shrunk == pytest.approx((1 - tau) * p + tau * c, abs=1e-14)
    assert shrunk.sum() == pytest.approx(1) and shrunk.min() == pytest.approx(0, abs=1e-15)


def test_shrink_leaves_positive_coefficients_alone():
    keys = dict(lam=0.5, estimator="jackknife")
    assert (advantages(REWARDS, guard="shrink", **keys) == advantages(REWARDS, **keys)).all()


@BOTH
@pytest.mark.parametrize("gap", [40.0, 1e4, 1e12])
def test_gaps_far_beyond_lam_stay_exact(estimator, gap):
    """Three samples, one far below: p = (0, 0, 1) up to e^-gap; the others tie, so their LOO groups do not."""
    result = advantages([gap, gap, 0.0], lam=1.0, estimator=estimator)
    worst = -2.0 if estimator == "plugin" else 1 - 3 * (3 - 2 / 3 * 2)
    assert result == pytest.approx([-worst / 2, -worst / 2, worst], abs=1e-12)


@pytest.mark.parametrize("passed", range(1, 8))
@pytest.mark.parametrize("lam", [0.2, 2.0])
def test_binary_rewards_are_centred_with_a_pass_rate_gain(passed, lam):
    """A_i = g(s)(r_i - s), g(s) = lam (1 - e)/(1 - s + s e), e = exp(-1/lam)."""
    rewards = np.array([1.0] * passed + [0.0] * (8 - passed))
    s, e = passed / 8, math.exp(-1 / lam)
    gain = lam * (1 - e) / (1 - s + s * e)
    result = advantages(rewards, lam=lam, estimator="plugin", scale="exact")
    assert result == pytest.approx(gain * (rewards - s), abs=1e-13)


@pytest.mark.parametrize("lam, ratio", [(2.0, 1.5), (0.2, 7.6)])
def test_gain_ratio_of_the_methods_sheet(lam, ratio):
    """g(7/8)/g(0): the gain at 7/8 from the code over lam (1 - e), its value as s -> 0."""
    gain = advantages([1] * 7 + [0], lam=lam, estimator="plugin", scale="exact")[0] / (1 / 8)
    assert gain / (lam * (1 - math.exp(-1 / lam))) == pytest.approx(ratio, abs=0.05)


@BOTH
@pytest.mark.parametrize("rewards", [[], [0.3], [math.nan], [math.inf, 2.0], [math.nan, math.nan], [0.1] * 7])
@pytest.mark.parametrize("lam", [0.01, 3.0, math.inf])
def test_nothing_to_compare_is_exactly_zero(estimator, rewards, lam):
    result = FRPO(lam=lam, estimator=estimator).advantages(np.array(rewards))
    assert result.advantages_G.tolist() == [0.0] * len(rewards)
    assert result.stats["zero_advantage"] == 1.0
    assert all(math.isfinite(value) or name == "lam" for name, value in result.stats.items())


@BOTH
def test_missing_rewards_shrink_the_group(estimator):
    keys = dict(lam=0.5, estimator=estimator)
    result = FRPO(**keys).advantages(np.array([math.nan, 1.0, 0.7, math.inf, 0.35, 0.0, -math.inf]))
    whole = advantages(REWARDS, **keys)
    assert result.advantages_G.tolist() == [0.0, whole[0], whole[1], 0.0, whole[2], whole[3], 0.0]
    assert (result.stats["abstained"], result.stats["invalid"], result.stats["zero_advantage"]) == (1.0, 2.0, 0.0)
    assert result.stats["worst_reward"] == 0.0


@pytest.mark.parametrize("rho", [1e-4, 0.05, 0.3, 1.0, 1.38])
@pytest.mark.parametrize("scale", ["exact", "unit", "max1"])
def test_radius_mode_reaches_its_radius(rho, scale):
    """log 4 = 1.386 is the largest radius that four distinct rewards allow."""
    told = stats(REWARDS, rho=rho, estimator="plugin", scale=scale)
    assert told["tilt_kl"] == pytest.approx(rho, rel=1e-9)
    assert advantages(REWARDS, rho=rho, estimator="plugin", scale=scale) == pytest.approx(
        advantages(REWARDS, lam=told["lam"], estimator="plugin", scale=scale), rel=1e-12)


def test_radius_mode_does_not_depend_on_the_reward_scale():
    """Small radius: lam = std / sqrt(2 rho), so that the tilt is the same at every reward scale."""
    one, small = (stats(factor * REWARDS, rho=1e-6, estimator="plugin")["lam"] for factor in (1.0, 1e-3))
    assert one == pytest.approx(REWARDS.std() / math.sqrt(2e-6), rel=2e-3)
    assert small == pytest.approx(1e-3 * one, rel=1e-6)


@pytest.mark.parametrize("scale, expected", [
    ("exact", [0, 0, 0, 0]), ("unit", [1, -1, -1, 1]), ("max1", [1, -1, -1, 1])])
@pytest.mark.parametrize("rho", [math.log(2), 5.0])
def test_radius_beyond_the_group_is_the_limit_of_lam_zero(rho, scale, expected):
    keys = dict(rho=rho, estimator="plugin", scale=scale)
    assert advantages([1.0, 0.0, 0.0, 0.6], **keys).tolist() == expected
    told = stats([1.0, 0.0, 0.0, 0.6], **keys)
    assert told["lam"] == 0.0 and told["certainty_equivalent"] == 0.0 and told["ess"] == pytest.approx(2)
    assert told["zero_advantage"] == float(scale == "exact")


@pytest.mark.parametrize("keys, message", [
    (dict(lam=0.0), r"lam must be > 0, given 0\.0"),
    (dict(lam=math.nan), "lam must be > 0, given nan"),
    (dict(lam=math.inf, scale="unit"), "lam = inf with scale 'unit'"),
    (dict(rho=0.3), "set estimator to 'plugin'"),
    (dict(rho=-1.0, estimator="plugin"), r"rho must be > 0 and finite, given -1\.0"),
    (dict(estimator="jacknife"), "unknown estimator 'jacknife'.*did you mean 'jackknife'.*plugin"),
    (dict(scale="max"), "unknown scale 'max'.*exact, unit, max1"),
    (dict(guard="clip"), "unknown guard 'clip'.*none, shrink"),
])
def test_bad_values_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        FRPO(**keys)


# --- reweighted -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("estimator, ratios, expected", [
    # lam 1, exp(-r) = 1, 1/2. Ratios 1, 2: both samples weigh 1, so c = (1/2, 1/2) and A = u - 2 c, either way.
    ("plugin", [1, 2], [0, 1]), ("jackknife", [1, 2], [0, 1]),
    # Ratios 1, 4: weights 1, 2, p = (1/3, 2/3); the jackknife of two has c = 2 p - 1/2 = (1/6, 5/6).
    ("plugin", [1, 4], [1 / 3, 8 / 3]), ("jackknife", [1, 4], [2 / 3, 7 / 3]),
])
def test_reweighted_by_hand(estimator, ratios, expected):
    found = FRPO(lam=1.0, estimator=estimator).reweighted([0.0, math.log(2)], np.log(ratios))
    assert found.advantages_G == pytest.approx(expected, abs=1e-15)
    assert found.stats["ratio"] == pytest.approx(np.mean(ratios)) and found.stats["ratio_max"] == max(ratios)
    assert found.stats["reweighted_ess"] == pytest.approx(2 if max(ratios) == 2 else 1.8)
    assert found.stats["ess"] == pytest.approx(1.8)  # of the rewards alone: p = (2/3, 1/3)


@BOTH
def test_a_missing_reward_leaves_the_reweighted_group(estimator):
    robust = FRPO(lam=0.5, estimator=estimator)
    whole = robust.reweighted([1.0, 0.2, 0.6], [0.3, -1.0, 0.5])
    found = robust.reweighted([1.0, math.nan, 0.2, math.inf, 0.6], [0.3, math.nan, -1.0, 9.0, 0.5])
    assert found.advantages_G.tolist() == np.insert(whole.advantages_G, [1, 2], 0.0).tolist()
    assert (found.stats["abstained"], found.stats["invalid"], found.stats["ratio"]) == (1, 1, whole.stats["ratio"])


@pytest.mark.parametrize("rewards", [[0.7, 0.7, 0.7], [0.7], [math.nan, 0.7], [math.nan], []])
def test_nothing_is_compared_in_a_flat_group_whatever_the_ratios(rewards):
    found = FRPO(lam=0.5).reweighted(rewards, np.linspace(-1, 1, len(rewards)))
    assert found.advantages_G.tolist() == [0.0] * len(rewards) and found.stats["zero_advantage"] == 1


def test_extreme_ratios_stay_finite():
    """The likelier of two equal bad samples takes all the weight: c = (0, 1, 0) and A = s (u - k c)."""
    found = FRPO(lam=1e-3, estimator="plugin", scale="unit").reweighted([1.0, 0.0, 0.0], [0.0, 40.0, -40.0])
    u = math.exp(40)
    assert found.advantages_G == pytest.approx([1.0, u - 3, math.exp(-40)], rel=1e-12)


@pytest.mark.parametrize("keys, log_ratio, message", [
    (dict(lam=math.inf), [0, 0], "need a finite lam and no rho, given lam = inf"),
    (dict(rho=0.2, estimator="plugin"), [0, 0], r"need a finite lam and no rho, given rho = 0\.2"),
    (dict(), [0, 0, 0], r"2 rewards need as many log-ratios, given shape \(3,\)"),
    (dict(), [0, math.nan], "log-ratios must be finite, given"),
])
def test_reweighting_that_cannot_be_is_named(keys, log_ratio, message):
    with pytest.raises(ValueError, match=message):
        FRPO(**keys).reweighted([0.0, 1.0], log_ratio)
