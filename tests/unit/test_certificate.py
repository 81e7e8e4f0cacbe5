"""The certificate: estimates by hand and by brute force, and that no policy that can be enumerated falls below it."""
from __future__ import annotations

import math

import numpy as np
import pytest

from frpo.downstream.certificate import certify, robust_rewards


def naive(rewards_N: np.ndarray, lam: float) -> float:
    """The jackknife, one sample left out after the other."""
    rest = [plug_in(np.delete(rewards_N, i), lam) for i in range(len(rewards_N))]
    return len(rewards_N) * plug_in(rewards_N, lam) - (len(rewards_N) - 1) * np.mean(rest)


def plug_in(rewards_N: np.ndarray, lam: float) -> float:
    lowest = rewards_N.min()
    return float(lowest - lam * np.log(np.mean(np.exp(-(rewards_N - lowest) / lam))))


def test_a_known_group():
    found = robust_rewards(np.array([[1.0, 0.7, 0.35, 0.0], [0.4, 0.4, 0.4, 0.4]]), 0.5)
    assert found == pytest.approx([0.3284919, 0.4], abs=1e-7)
    assert plug_in(np.array([1.0, 0.7, 0.35, 0.0]), 0.5) == pytest.approx(0.3779057, abs=1e-7)


@pytest.mark.parametrize("lam", [1e-4, 0.03, 0.2, 1.0, 50.0])
def test_it_is_the_jackknife(lam):
    rewards_PN = np.random.default_rng(0).choice([0.0, 0.35, 0.7, 1.0], size=(20, 9)) + 3.0
    rewards_PN[0] = [*[5.0] * 8, -5.0]  # one sample is everything
    assert robust_rewards(rewards_PN, lam) == pytest.approx([naive(row, lam) for row in rewards_PN], abs=1e-9)


def test_adding_to_rewards_adds_to_it():
    rewards_PN = np.random.default_rng(1).random((3, 8))
    assert robust_rewards(rewards_PN + 7, 0.3) == pytest.approx(robust_rewards(rewards_PN, 0.3) + 7, abs=1e-12)


OUTCOMES, WORTH = np.array([[0.90, 0.06, 0.04], [0.80, 0.05, 0.15]]), np.array([1.0, 0.7, 0.0])
"""Probabilities of three outcomes of two prompts, and what they are worth."""


def test_every_tilted_policy_stays_above_the_bound():
    """q ~ p exp(-r / eta) is the worst policy at its KL: the bound must not be above its reward, nor far below."""
    random = np.random.default_rng(2)
    prompts = np.repeat(OUTCOMES, 100, axis=0)
    samples_PN = np.stack([random.choice(WORTH, size=512, p=row) for row in prompts])
    found = certify(samples_PN, [10, 5, 2, 1, 0.7, 0.5, 0.35, 0.25, 0.2], 0.95)
    for eta in np.geomspace(0.3, 20.0, 25):
        q_PO = OUTCOMES * np.exp(-WORTH / eta)
        q_PO /= q_PO.sum(1, keepdims=True)
        kl, reward = float((q_PO * np.log(q_PO / OUTCOMES)).sum(1).mean()), float((q_PO @ WORTH).mean())
        assert reward - 0.1 < found.bound([kl])[0] < reward


def test_lambda_is_chosen_on_one_half_and_judged_on_the_other():
    """Even samples are all good, so the smallest lambda costs nothing there; odd ones show what it hides."""
    rewards_PN = np.ones((3, 8))
    rewards_PN[:, 1::2] = [1.0, 1.0, 1.0, 0.0]
    found = certify(rewards_PN, [2.0, 0.25], 0.95)
    assert found.chosen_L == pytest.approx([1, 1]) and found.error_L == pytest.approx([0, 0])
    judged = naive(np.array([1.0, 1.0, 1.0, 0.0]), 0.25)
    assert found.bound([0.1, 1.0]) == pytest.approx([judged - 0.025, judged - 0.25])
    other = naive(np.array([1.0, 1.0, 1.0, 0.0]), 2.0)
    assert judged - 0.025 < other - 0.2, "the other lambda would have been better at .1, had they been judged first"


def test_the_limit_lies_below_the_estimate_by_the_error_over_prompts():
    rewards_PN = np.repeat([[0.2], [0.4], [0.6]], 8, axis=1)
    found = certify(rewards_PN, [1.0], 0.95)
    assert found.bound([0.5])[0] == pytest.approx(0.4 - 1.644854 * 0.2 / math.sqrt(3) - 0.5)


@pytest.mark.parametrize("rewards, message", [
    (np.ones((1, 8)), r"at least 2 prompts with 4 samples each, given shape \(1, 8\)"),
    (np.ones((2, 3)), r"given shape \(2, 3\)"), (np.ones(8), r"given shape \(8,\)"),
    (np.array([[1.0, np.nan, 1.0, 1.0]] * 2), "2 of 8 rewards are missing or not finite"),
    (np.array([[1.0, np.inf, 1.0, 1.0]] + [[0.0] * 4]), "1 of 8 rewards are missing or not finite")])
def test_what_cannot_be_certified_is_named(rewards, message):
    with pytest.raises(ValueError, match=message):
        certify(rewards, [1.0], 0.95)
