"""Off-policy advantages against the loss form with the ratios inside its log, and GSPO's gradient against its formula.

The judge differentiates lam * (Phi(log u - r / lam) - mean u) by autograd, in float64, and shares no code with frpo.

Shape suffixes: K samples of a group, N tokens, S states, V actions of a token.
"""
from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from frpo.objectives.base import LossInputs
from frpo.objectives.frpo import FRPO
from frpo.objectives.gspo import GSPO
from frpo.objectives.reduction import token_weights
from frpo.objectives.reinforce import Reinforce
from frpo.objectives.stage import compute_advantages, reweighted, sequence_log_ratios
from frpo.objectives.surrogate import PolicyLoss
from frpo.types import Completion, Prompt, RolloutGroup, ScoredGroup

BOTH = pytest.mark.parametrize("estimator", ["plugin", "jackknife"])
WIDE = GSPO(clip_low=0.999, clip_high=1e9)
"""GSPO whose clip never acts here: the sequence ratio itself."""


def judge(log_u_K, rewards_K, lam, estimator):
    """What a group is to minimise, over the scale: log-mean-exp (or its jackknife) of log u - r/lam, less mean u."""
    def phi(keep):
        return torch.log(torch.mean(torch.exp(log_u_K[keep] - torch.as_tensor(rewards_K)[keep] / lam)))

    k = len(rewards_K)
    everyone = list(range(k))
    value = phi(everyone)
    if estimator == "jackknife":
        value = k * value - (k - 1) / k * sum(phi([i for i in everyone if i != j]) for j in everyone)
    return value - log_u_K.exp().mean()


# --- advantages of a group --------------------------------------------------------------------------------------------

@BOTH
@pytest.mark.parametrize("scale", ["exact", "unit", "max1"])
def test_reweighted_advantages_are_the_gradient_of_the_loss_form(estimator, scale):
    rng = np.random.default_rng(0)
    for _ in range(200):
        k, lam = int(rng.integers(2, 17)), float(np.exp(rng.uniform(-2, 2)))
        rewards_K, log_u_K = rng.uniform(-1, 1, k), torch.tensor(rng.uniform(-2, 2, k), requires_grad=True)
        judge(log_u_K, rewards_K, lam, estimator).backward()
        factor = {"exact": lam, "unit": 1.0, "max1": max(lam, 1.0)}[scale]
        judged_K = -factor * k * log_u_K.grad.numpy()
        robust = FRPO(lam=lam, estimator=estimator, scale=scale)
        found_K = robust.reweighted(rewards_K, log_u_K.detach().numpy()).advantages_G
        assert np.abs(found_K - judged_K).max() <= 1e-12 * factor * k**2
        assert np.abs(found_K - robust.advantages(rewards_K).advantages_G).max() > 1e-3 * factor


@BOTH
@pytest.mark.parametrize("guard", ["none", "shrink"])
def test_at_ratio_one_they_are_the_advantages_to_the_bit(estimator, guard):
    rng = np.random.default_rng(1)
    for scale in ("exact", "unit", "max1"):
        for _ in range(50):
            rewards_G = rng.uniform(-1, 1, int(rng.integers(1, 17)))
            rewards_G[rng.uniform(size=rewards_G.size) < 0.1] = np.nan
            robust = FRPO(lam=float(np.exp(rng.uniform(-4, 3))), estimator=estimator, scale=scale, guard=guard)
            plain, again = robust.advantages(rewards_G), robust.reweighted(rewards_G, np.zeros(rewards_G.size))
            assert again.advantages_G.tolist() == plain.advantages_G.tolist()
            assert plain.stats.items() <= again.stats.items()


def test_the_guard_keeps_reweighted_coefficients_positive():
    """A_i = s (u_i - k c_i), so c is read off; without the guard some are negative."""
    rng = np.random.default_rng(2)
    negative = 0
    for _ in range(100):
        rewards_K, log_u_K = rng.uniform(size=8), rng.uniform(-2, 2, 8)

        def coefficients(guard):
            robust = FRPO(lam=0.1, scale="unit", guard=guard)
            return (np.exp(log_u_K) - robust.reweighted(rewards_K, log_u_K).advantages_G) / 8

        negative += (coefficients("none") < -1e-9).any()
        assert coefficients("shrink").min() > -1e-12 and coefficients("shrink").sum() == pytest.approx(1, abs=1e-12)
    assert negative > 30


def test_they_follow_the_true_gradient_where_frozen_advantages_with_ratios_do_not():
    """Groups of 7 enumerated under an old policy of four outcomes; the gradient sought is that of the current one."""
    rewards_Y, lam, k = np.array([1.0, 0.7, 0.35, 0.0]), 0.5, 7
    old_Y, new_Y = np.array([0.4, 0.25, 0.2, 0.15]), np.array([0.25, 0.2, 0.2, 0.35])
    weights_Y = np.exp(-rewards_Y / lam)
    gradient = -lam * (new_Y * weights_Y / (new_Y @ weights_Y) - new_Y)
    log_u_Y = np.log(new_Y / old_Y)
    robust = FRPO(lam=lam, scale="exact")
    mean = {"current": np.zeros(4), "frozen": np.zeros(4)}
    for outcomes in itertools.combinations_with_replacement(range(4), k):
        counts = np.bincount(outcomes, minlength=4)
        ways = math.factorial(k) / math.prod(math.factorial(count) for count in counts)
        probability, drawn = ways * np.prod(old_Y**counts), list(outcomes)
        scores = np.eye(4)[drawn] - new_Y
        current = robust.reweighted(rewards_Y[drawn], log_u_Y[drawn]).advantages_G
        frozen = np.exp(log_u_Y[drawn]) * robust.advantages(rewards_Y[drawn]).advantages_G
        mean["current"] += probability * current @ scores / k
        mean["frozen"] += probability * frozen @ scores / k
    error = {name: np.linalg.norm(found - gradient) / np.linalg.norm(gradient) for name, found in mean.items()}
    assert error["current"] < 0.1 and error["frozen"] > 0.4, error


# --- updates on one batch ---------------------------------------------------------------------------------------------

class Batch:
    """Two groups of sequences of 1 to 5 tokens under a softmax policy theta_SV, with the rewards of the groups."""

    def __init__(self, seed, sizes=(4, 3)):
        rng = np.random.default_rng(seed)
        self.theta_SV = torch.tensor(rng.normal(size=(7, 6)))
        self.sizes, self.lengths = sizes, rng.integers(1, 6, size=sum(sizes))
        self.states = [torch.tensor(rng.integers(0, 7, size=t)) for t in self.lengths]
        self.actions = [torch.tensor(rng.integers(0, 6, size=t)) for t in self.lengths]
        self.old = [values.detach() for values in self.logprobs(self.theta_SV)]
        self.scored = [self._scored(draw, rng.uniform(size=size)) for draw, size in enumerate(sizes)]

    def logprobs(self, theta_SV):
        """Per sequence, its tokens' log-probs."""
        return [torch.log_softmax(theta_SV, 1)[s, a] for s, a in zip(self.states, self.actions, strict=True)]

    def by_group(self, values):
        values = iter(values)
        return [tuple(itertools.islice(values, size)) for size in self.sizes]

    def log_ratios(self, current, mean):
        """Per group, log u of its sequences: the mean over tokens, or the sum."""
        reduced = [(now - then).mean() if mean else (now - then).sum()
                   for now, then in zip(current, self.old, strict=True)]
        return [torch.stack(group) for group in self.by_group(reduced)]

    def inputs(self, current, advantages_G, reduction):
        sequences = np.arange(sum(self.sizes))
        tokens = {"advantage_N": np.concatenate(advantages_G), "kl_weight_N": 0.0 * sequences,
                  "policy_weight_N": token_weights(reduction, self.lengths, 8), "sequence_N": sequences}
        flat = torch.cat(current)
        return LossInputs(
            logprobs_N=flat, old_logprobs_N=torch.cat(self.old), ref_logprobs_N=None, rollout_logprobs_N=None,
            mask_N=torch.ones_like(flat, dtype=torch.bool),
            **{name: torch.tensor(np.repeat(values, self.lengths)) for name, values in tokens.items()})

    def _scored(self, draw, rewards_G):
        first = sum(self.sizes[:draw])
        completions = tuple(
            Completion(text="", token_ids=(0,) * len(old), logprobs=tuple(old.tolist()), loss_mask=(True,) * len(old),
                       version_spans=(), seed=0, finish_reason="stop")
            for old in self.old[first:first + len(rewards_G)])
        group = RolloutGroup(group_id=(0, draw), completions=completions,
                             prompt=Prompt(uid="p", messages=(), token_ids=(1,)))
        return ScoredGroup(group=group, rewards_G=rewards_G, terms={})


@BOTH
@pytest.mark.parametrize("reduction, mean", [("seq-mean-token-mean", True), ("seq-sum", False)])
@pytest.mark.parametrize("lam", [0.2, 1.0, 5.0])
def test_updates_with_reweighted_advantages_are_gradient_steps_on_the_loss_form(estimator, lam, reduction, mean):
    batch = Batch(seed=3)
    robust, loss, rate = FRPO(lam=lam, estimator=estimator, scale="exact"), PolicyLoss(surrogate=Reinforce()), 1.5
    groups = frozen = compute_advantages(batch.scored, robust, [None, None])
    ours, judged = batch.theta_SV.clone(), batch.theta_SV.clone()
    for update in range(3):
        ours.requires_grad_()
        current = batch.logprobs(ours)
        detached = [values.detach().numpy() for values in current]
        log_ratios = sequence_log_ratios(
            groups, batch.by_group(detached), batch.by_group(values.numpy() for values in batch.old),
            reduction=reduction, max_length=8)
        groups = reweighted(groups, robust, log_ratios)
        given = batch.inputs(current, [group.advantages_G for group in groups], reduction)
        step, = torch.autograd.grad(loss(given).loss_sum, ours, retain_graph=True)

        judged.requires_grad_()
        parts = zip(batch.log_ratios(batch.logprobs(judged), mean), batch.scored, strict=True)
        total = sum(len(s.rewards_G) / 7 * lam * judge(log_u_K, s.rewards_G, lam, estimator) for log_u_K, s in parts)
        expected, = torch.autograd.grad(total, judged)
        assert torch.allclose(step, expected, rtol=0, atol=1e-11)

        given = batch.inputs(current, [group.advantages_G for group in frozen], reduction)
        plain, = torch.autograd.grad(PolicyLoss(surrogate=WIDE)(given).loss_sum, ours)
        difference = (plain - expected).norm() / expected.norm()
        assert difference < 1e-10 if update == 0 else difference > 1e-3, (update, difference)
        ours, judged = (ours - rate * step).detach(), (judged - rate * expected).detach()
    assert (ours - batch.theta_SV).norm() > 0.1
    assert torch.allclose(ours, judged, rtol=0, atol=1e-10)


@pytest.mark.parametrize("lam", [0.2, 1.0, 5.0])
def test_frozen_advantages_stay_a_lower_bound_along_the_updates(lam):
    """-lam log mean(u e) + lam (mean u - 1) >= J + mean u A: plug-in, equal before the first update only."""
    batch = Batch(seed=4, sizes=(7,))
    robust = FRPO(lam=lam, estimator="plugin", scale="exact")
    scored, = batch.scored
    group, = compute_advantages([scored], robust, [None])
    theta, gaps = batch.theta_SV.clone(), []
    for _ in range(4):
        theta.requires_grad_()
        current = batch.logprobs(theta)
        log_u_K, = batch.log_ratios(current, mean=True)
        given = batch.inputs(current, [group.advantages_G], "seq-mean-token-mean")
        value = -lam * judge(log_u_K, scored.rewards_G, lam, "plugin").item() - lam
        losses = {surrogate: PolicyLoss(surrogate=surrogate)(given).loss_sum for surrogate in (WIDE, GSPO())}
        gaps.append(value - (group.stats["certainty_equivalent"] - losses[WIDE].item()))
        assert losses[GSPO()].item() >= losses[WIDE].item() - 1e-14, "clipping only lowers the bound"
        step, = torch.autograd.grad(losses[WIDE], theta)
        theta = (theta - 5 * step).detach()
    assert abs(gaps[0]) < 1e-13 and min(gaps[1:]) > 1e-6, gaps


# --- GSPO -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("clip", [0.1, 10.0])
def test_gspo_has_the_gradient_of_its_formula_and_of_the_sequence_ratio(clip):
    """(1/N) sum A_i s_i (1/T_i) sum grad log pi where not clipped, and autograd of the mean of min(s A, clip(s) A)."""
    batch = Batch(seed=5)
    rng = np.random.default_rng(6)
    advantages = rng.normal(size=7)
    theta = (batch.theta_SV + 0.5 * torch.tensor(rng.normal(size=(7, 6)))).requires_grad_()
    current = batch.logprobs(theta)
    given = batch.inputs(current, [advantages], "seq-mean-token-mean")
    surrogate = GSPO(clip_low=min(clip, 0.99), clip_high=clip)
    output = PolicyLoss(surrogate=surrogate)(given)
    ours, = torch.autograd.grad(output.loss_sum, theta, retain_graph=True)

    s = torch.cat(batch.log_ratios(current, mean=True)).exp()
    a = torch.tensor(advantages)
    direct = -torch.minimum(s * a, s.clamp(1 - surrogate.clip_low, 1 + surrogate.clip_high) * a).mean()
    by_autograd, = torch.autograd.grad(direct, theta, retain_graph=True)
    clipped = ((a < 0) & (s < 1 - surrogate.clip_low)) | ((a > 0) & (s > 1 + surrogate.clip_high))
    factors = torch.where(clipped, 0.0, a * s).detach()
    written = -sum(factor * lp.mean() for factor, lp in zip(factors, current, strict=True)) / 7
    by_formula, = torch.autograd.grad(written, theta)
    assert output.loss_sum.item() == pytest.approx(direct.item(), rel=1e-13)
    for theirs in (by_formula, by_autograd):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)
    assert clipped.any() == (clip < 1) and not clipped.all() and ours.abs().max() > 1e-2
