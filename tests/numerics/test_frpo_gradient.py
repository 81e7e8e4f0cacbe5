"""FRPO's closed form against an independent judge: the loss form, its autograd and exact enumeration.

The judge (group log-mean-exp, its jackknife, minus the mean ratio) is written only here and shares no code with frpo.
"""
from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from frpo.objectives.base import LossInputs
from frpo.objectives.frpo import FRPO
from frpo.objectives.reduction import token_weights
from frpo.objectives.surrogate import PolicyLoss

BOTH = pytest.mark.parametrize("estimator", ["plugin", "jackknife"])
REWARDS_Y = np.array([1.0, 0.7, 0.35, 0.0])
LOGITS_Y = np.array([0.4, -0.1, 0.2, -0.5])
"""A policy of four outcomes; these logits reproduce the table of exact expectations in the methods sheet (A.3)."""


def log_mean_exp(values):
    return torch.logsumexp(values, 0) - math.log(len(values))


def loss_form(log_u_K, rewards_K, lam, estimator):
    """lam * (Phi(log u - r/lam) - mean u), to be minimised; Phi = log-mean-exp or its jackknife."""
    exponents_K = log_u_K - rewards_K / lam
    k = len(rewards_K)
    phi = log_mean_exp(exponents_K)
    if estimator == "jackknife":
        others = [log_mean_exp(torch.cat([exponents_K[:j], exponents_K[j + 1:]])) for j in range(k)]
        phi = k * phi - (k - 1) / k * sum(others)
    return lam * (phi - log_u_K.exp().mean())


def random_group(rng):
    k = int(rng.integers(2, 17))
    return rng.uniform(-1, 1, k), float(np.exp(rng.uniform(-3, 3)))


@BOTH
def test_advantages_are_the_gradient_of_the_loss_form(estimator):
    rng = np.random.default_rng(0)
    for _ in range(200):
        rewards_K, lam = random_group(rng)
        log_u_K = torch.zeros(rewards_K.size, dtype=torch.float64, requires_grad=True)
        loss_form(log_u_K, torch.tensor(rewards_K), lam, estimator).backward()
        judged_K = -rewards_K.size * log_u_K.grad.numpy()
        advantages_K = FRPO(lam=lam, estimator=estimator, scale="exact").advantages(rewards_K).advantages_G
        assert np.abs(advantages_K - judged_K).max() <= 1e-11 * lam * rewards_K.size


@BOTH
def test_certainty_equivalents_are_the_value_of_the_loss_form(estimator):
    rng = np.random.default_rng(1)
    key = "certainty_equivalent" if estimator == "plugin" else "certainty_equivalent_jackknife"
    for _ in range(50):
        rewards_K, lam = random_group(rng)
        zero_K = torch.zeros(rewards_K.size, dtype=torch.float64)
        judged = -loss_form(zero_K, torch.tensor(rewards_K), lam, estimator).item() - lam
        told = FRPO(lam=lam, estimator=estimator).advantages(rewards_K).stats[key]
        assert told == pytest.approx(judged, abs=1e-12 * max(1, lam) * rewards_K.size**2)


@BOTH
@pytest.mark.parametrize("lam", [0.2, 1.0, 5.0])
def test_policy_loss_has_the_gradient_of_the_whole_loss_form(estimator, lam):
    """Two groups, sequences of 1-5 tokens, softmax policy: both forms, and -(1/N) sum A_i (1/T_i) sum grad log pi."""
    rng = np.random.default_rng(2)
    theta = torch.tensor(rng.normal(size=(7, 6)), requires_grad=True)
    groups = [rng.uniform(size=4), rng.uniform(size=3)]
    lengths = rng.integers(1, 6, size=7)
    states = [torch.tensor(rng.integers(0, 7, size=t)) for t in lengths]
    actions = [torch.tensor(rng.integers(0, 6, size=t)) for t in lengths]
    logprobs = [torch.log_softmax(theta, 1)[s, a] for s, a in zip(states, actions, strict=True)]
    robust = FRPO(lam=lam, estimator=estimator, scale="exact")
    advantages = np.concatenate([robust.advantages(rewards).advantages_G for rewards in groups])

    flat = torch.cat(logprobs)
    weights = np.repeat(token_weights("seq-mean-token-mean", lengths, 8), lengths)
    given = LossInputs(
        logprobs_N=flat, old_logprobs_N=flat.detach(), ref_logprobs_N=None,
        advantage_N=torch.tensor(np.repeat(advantages, lengths)), policy_weight_N=torch.tensor(weights),
        kl_weight_N=torch.zeros_like(flat), mask_N=torch.ones_like(flat, dtype=torch.bool), rollout_logprobs_N=None,
        sequence_N=torch.tensor(np.repeat(np.arange(7), lengths)))
    ours, = torch.autograd.grad(PolicyLoss()(given).loss_sum, theta, retain_graph=True)

    written = sum(-a / 7 * lp.mean() for a, lp in zip(advantages, logprobs, strict=True))
    by_formula, = torch.autograd.grad(written, theta, retain_graph=True)
    u = torch.stack([(lp - lp.detach()).exp().mean() for lp in logprobs])
    parts = zip((u[:4], u[4:]), groups, strict=True)
    judge = sum(len(r) / 7 * loss_form(part.log(), torch.tensor(r), lam, estimator) for part, r in parts)
    by_judge, = torch.autograd.grad(judge, theta)
    assert torch.allclose(ours, by_formula, rtol=0, atol=1e-13)
    assert torch.allclose(ours, by_judge, rtol=0, atol=1e-12)
    assert ours.abs().max() > 1e-2


def test_frozen_advantages_bound_the_loss_form_from_below():
    """-lam log mean(u e) + lam (mean u - 1) >= J + mean(u A), plug-in, equal at u = 1; clipping only lowers it."""
    rng = np.random.default_rng(3)
    for _ in range(500):
        rewards_K, lam = random_group(rng)
        log_u_K = rng.normal(size=rewards_K.size) * rng.choice([1e-3, 0.3, 2.0])
        result = FRPO(lam=lam, estimator="plugin", scale="exact").advantages(rewards_K)

        def robust(log_u):
            return -loss_form(torch.tensor(log_u), torch.tensor(rewards_K), lam, "plugin").item() - lam

        def surrogate(log_u):
            ones = torch.ones(rewards_K.size, dtype=torch.float64)
            given = LossInputs(
                logprobs_N=torch.tensor(log_u), old_logprobs_N=0 * ones, ref_logprobs_N=None,
                advantage_N=torch.tensor(result.advantages_G), policy_weight_N=ones / len(ones), kl_weight_N=0 * ones,
                mask_N=ones.bool(), rollout_logprobs_N=None, sequence_N=torch.arange(len(ones)))
            return result.stats["certainty_equivalent"] - PolicyLoss()(given).loss_sum.item()

        unclipped = result.stats["certainty_equivalent"] + np.mean(np.exp(log_u_K) * result.advantages_G)
        slack = 1e-12 * max(1, lam) * rewards_K.size
        assert robust(log_u_K) >= unclipped - slack >= surrogate(log_u_K) - 2 * slack
        assert robust(0 * log_u_K) == pytest.approx(surrogate(0 * log_u_K), abs=slack)


def enumerate_groups(estimator, lam, k):
    """Relative error, cosine and SNR of the mean gradient over the logits, and the bias of the value: exact."""
    pi = np.exp(LOGITS_Y) / np.exp(LOGITS_Y).sum()
    weights = np.exp(-REWARDS_Y / lam)
    value = -lam * np.log(pi @ weights)
    gradient = -lam * (pi * weights / (pi @ weights) - pi)
    robust = FRPO(lam=lam, estimator=estimator, scale="exact")
    key = "certainty_equivalent" if estimator == "plugin" else "certainty_equivalent_jackknife"
    mean, square, mean_value = np.zeros(4), 0.0, 0.0
    for outcomes in itertools.combinations_with_replacement(range(4), k):
        counts = np.bincount(outcomes, minlength=4)
        probability = math.factorial(k) * np.prod([p**c / math.factorial(c) for p, c in zip(pi, counts, strict=True)])
        result = robust.advantages(REWARDS_Y[list(outcomes)])
        sample = result.advantages_G @ (np.eye(4)[list(outcomes)] - pi) / k
        mean, square = mean + probability * sample, square + probability * sample @ sample
        mean_value += probability * result.stats[key]
    size = np.linalg.norm
    return (size(mean - gradient) / size(gradient), mean @ gradient / size(mean) / size(gradient),
            size(mean) / math.sqrt(square - mean @ mean), mean_value - value)


@pytest.mark.parametrize("lam, estimator, bias, cosine, snr, value_bias", [
    (2.0, "plugin", 0.127, 0.9998, 1.72, 4.2e-3),
    (2.0, "jackknife", 0.003, 1.0000, 1.70, 1.0e-5),
    (0.5, "plugin", 0.162, 0.9953, 1.54, 1.8e-2),
    (0.5, "jackknife", 0.019, 0.9998, 1.47, -4.2e-4),
    (0.2, "plugin", 0.306, 0.9678, 1.31, 4.3e-2),
    (0.2, "jackknife", 0.046, 0.9993, 1.13, -5.6e-3),
    (0.1, "plugin", 0.391, 0.9485, 1.16, None),
    (0.1, "jackknife", 0.057, 0.9994, 0.95, None),
])
def test_exact_expectations(lam, estimator, bias, cosine, snr, value_bias):
    found = enumerate_groups(estimator, lam, k=8)
    assert found[0] == pytest.approx(bias, abs=6e-4)
    assert found[1] == pytest.approx(cosine, abs=6e-5)
    assert found[2] == pytest.approx(snr, abs=6e-3)
    if value_bias is not None:
        assert found[3] == pytest.approx(value_bias, rel=0.04)


@pytest.mark.parametrize("lam", [2.0, 0.5])
def test_jackknife_bias_falls_an_order_faster_in_the_group_size(lam):
    """Doubling k halves the plug-in's error and quarters the jackknife's, or better, once k is large enough for lam."""
    plugin = [abs(enumerate_groups("plugin", lam, k)[3]) for k in (12, 24)]
    jackknife = [abs(enumerate_groups("jackknife", lam, k)[3]) for k in (12, 24)]
    assert 1.8 < plugin[0] / plugin[1] < 2.3
    assert jackknife[0] / jackknife[1] > 3.4 and jackknife[0] < 0.1 * plugin[0]
