"""The clipped loss, its KL term and the log-prob helpers against numbers derived by hand."""
from __future__ import annotations

import math

import pytest
import torch

from frpo.objectives.base import LossInputs
from frpo.objectives.ops import k1, k2, k3, selective_logprobs
from frpo.objectives.surrogate import PolicyLoss


def column(value, like):
    values = value if isinstance(value, list) else [value] * like
    return torch.tensor(values, dtype=torch.float64)


def inputs(logprobs, old=0.0, ref=None, advantage=1.0, policy_weight=1.0, kl_weight=1.0, mask=True):
    n = len(logprobs)
    return LossInputs(
        logprobs_N=column(logprobs, n).requires_grad_(), old_logprobs_N=column(old, n),
        ref_logprobs_N=None if ref is None else column(ref, n), advantage_N=column(advantage, n),
        policy_weight_N=column(policy_weight, n), kl_weight_N=column(kl_weight, n), mask_N=column(mask, n).bool())


def loss_and_gradient(loss, given):
    output = loss(given)
    output.loss_sum.backward()
    parts = [part for metric in output.metrics.values() for part in metric if isinstance(part, torch.Tensor)]
    assert parts and not any(part.requires_grad for part in parts)
    return output.loss_sum.item(), given.logprobs_N.grad.tolist(), output.metrics


@pytest.mark.parametrize("ratio, advantage, loss, gradient, low, high", [
    # clip 0.2 below, 0.3 above; loss = -min(ratio A, clip(ratio) A); gradient with respect to log pi = -ratio A or 0
    (1.0, 2.0, -2.0, -2.0, 0, 0),
    (1.2, 2.0, -2.4, -2.4, 0, 0),
    (1.5, 2.0, -2.6, 0.0, 0, 1),
    (0.5, 2.0, -1.0, -1.0, 0, 0),   # A > 0 and already less likely: the min is the unclipped one
    (1.0, -2.0, 2.0, 2.0, 0, 0),
    (0.9, -2.0, 1.8, 1.8, 0, 0),
    (0.5, -2.0, 1.6, 0.0, 1, 0),
    (1.5, -2.0, 3.0, 3.0, 0, 0),    # A < 0 and more likely: must still be corrected
    (5.0, 0.0, 0.0, 0.0, 0, 0),
])
def test_clip_cases_by_hand(ratio, advantage, loss, gradient, low, high):
    given = inputs([math.log(ratio) - 1.0], old=-1.0, advantage=advantage)
    value, grad, metrics = loss_and_gradient(PolicyLoss(clip_low=0.2, clip_high=0.3), given)
    assert value == pytest.approx(loss, abs=1e-14)
    assert grad == pytest.approx([gradient], abs=1e-14)
    assert (float(metrics["policy/clip_low"][0]), float(metrics["policy/clip_high"][0])) == (low, high)


def test_tokens_sum_with_their_weights():
    given = inputs([0.0, 0.0, 0.0], advantage=[1.0, -2.0, 3.0], policy_weight=[0.5, 0.25, 0.125],
                   mask=[True, True, False])
    value, grad, _ = loss_and_gradient(PolicyLoss(), given)
    assert value == pytest.approx(-0.5 + 0.5)
    assert grad == pytest.approx([-0.5, 0.5, 0.0])


@pytest.mark.parametrize("kind, value, gradient", [
    # d = log pi_ref - log pi = log 2: k2 = d^2/2 with gradient -d; k3 = 2 - log 2 - 1 with gradient 1 - 2
    ("k2", math.log(2) ** 2 / 2, -math.log(2)),
    ("k3", 1 - math.log(2), -1.0),
    ("k1", 0.0, 0.0),
])
def test_kl_term(kind, value, gradient):
    given = inputs([-1.0], old=-1.0, ref=[math.log(2) - 1.0], advantage=0.0, kl_weight=0.25)
    loss, grad, _ = loss_and_gradient(PolicyLoss(kl_coef=0.1, kl_estimator=kind), given)
    assert loss == pytest.approx(0.025 * value) and grad == pytest.approx([0.025 * gradient])


def test_zero_advantage_still_pays_its_kl():
    given = inputs([0.5], ref=0.0, advantage=0.0, policy_weight=0.0, kl_weight=0.5)
    _, grad, _ = loss_and_gradient(PolicyLoss(kl_coef=2.0, kl_estimator="k2"), given)
    assert grad == pytest.approx([0.5])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e4])
@pytest.mark.parametrize("where", ["logprobs", "old", "ref", "advantage"])
@pytest.mark.parametrize("off", ["mask", "weights"])
def test_tokens_without_a_loss_never_spread_bad_numbers(bad, where, off):
    """Token 1 is off and holds a bad number; token 0 must give what it gives alone."""
    keys = dict(logprobs=[0.1, 0.1], old=[0.0, 0.0], ref=[0.2, 0.2], advantage=[1.0, 1.0])
    keys[where] = [keys[where][0], bad]
    live = [True, False]
    keys |= dict(mask=live) if off == "mask" else dict(policy_weight=[1.0, 0.0], kl_weight=[1.0, 0.0])
    loss = PolicyLoss(kl_coef=0.5)
    value, grad, metrics = loss_and_gradient(loss, inputs(**keys))
    alone = inputs([0.1], old=0.0, ref=0.2)
    expected, expected_grad, expected_metrics = loss_and_gradient(loss, alone)
    assert value == pytest.approx(expected, rel=1e-14) and grad == pytest.approx([*expected_grad, 0.0], rel=1e-14)
    assert grad[1] == 0.0
    for name, (total, count, reduction) in metrics.items():
        assert float(total) == pytest.approx(float(expected_metrics[name][0]), rel=1e-14), name
        assert float(count) == 1 and reduction == ("max" if name.endswith("max") else "mean"), name


def test_weights_are_separate():
    """NaN in the reference hurts nobody whose KL weight is zero; zero policy weight leaves the KL alone."""
    given = inputs([0.0, 0.3], ref=[math.nan, 0.0], policy_weight=[1.0, 0.0], kl_weight=[0.0, 1.0])
    _, grad, _ = loss_and_gradient(PolicyLoss(kl_coef=1.0, kl_estimator="k2"), given)
    assert grad == pytest.approx([-1.0, 0.3])


@pytest.mark.parametrize("logprob, advantage", [(2000.0, 1.0), (-2000.0, -1.0), (2000.0, 0.0), (-2000.0, 1.0)])
def test_an_overflowing_ratio_that_is_clipped_has_no_gradient(logprob, advantage):
    _, grad, _ = loss_and_gradient(PolicyLoss(), inputs([logprob], advantage=advantage))
    assert grad == [0.0]


def test_a_bad_number_in_a_live_token_stays_visible():
    value, _, _ = loss_and_gradient(PolicyLoss(), inputs([math.nan]))
    assert math.isnan(value)


def test_metrics_by_hand():
    """Ratios 4 (A > 0, clipped), 1/2 (A < 0, clipped), 1 (not), 8 (masked out)."""
    log2 = math.log(2)
    given = inputs([2 * log2, -log2, 0.0, 3 * log2], ref=[0.0, 0.0, log2, 9.0], advantage=[1.0, -1.0, 1.0, 1.0],
                   mask=[True, True, True, False])
    _, _, metrics = loss_and_gradient(PolicyLoss(), given)
    found = {name: (pytest.approx(float(total)), float(count), kind) for name, (total, count, kind) in metrics.items()}
    assert found == {
        "policy/ratio": (5.5, 3, "mean"),
        "policy/ratio_max": (4.0, 3, "max"),
        "policy/clip_low": (1.0, 3, "mean"),
        "policy/clip_high": (1.0, 3, "mean"),
        "policy/kl_old": ((4 - 1 - 2 * log2) + (0.5 - 1 + log2), 3, "mean"),
        "policy/kl_ref": ((0.25 - 1 + 2 * log2) + (2 - 1 - log2) + (2 - 1 - log2), 3, "mean"),
    }
    assert "policy/kl_ref" not in PolicyLoss()(inputs([0.0])).metrics


def test_no_token_at_all():
    value, grad, metrics = loss_and_gradient(PolicyLoss(), inputs([]))
    assert value == 0.0 and grad == [] and float(metrics["policy/ratio_max"][1]) == 0


@pytest.mark.parametrize("keys, message", [
    (dict(clip_low=1.0), r"clip_low must be in \(0, 1\), given 1\.0"),
    (dict(clip_high=0.0), r"clip_high must be > 0, given 0\.0"),
    (dict(kl_coef=-0.1), r"kl_coef must be >= 0, given -0\.1"),
    (dict(kl_estimator="k4"), "unknown kl_estimator 'k4'.*k1, k2, k3"),
])
def test_bad_values_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        PolicyLoss(**keys)


def test_missing_reference_is_named():
    with pytest.raises(ValueError, match=r"kl_coef = 0\.1 with kl_estimator 'k3' needs ref_logprobs_N"):
        PolicyLoss(kl_coef=0.1)(inputs([0.0]))


@pytest.mark.parametrize("d", [1e-9, 0.5, -2.0])
def test_kl_estimators(d):
    logprobs, ref = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([d - 1.0], dtype=torch.float64)
    d = (ref - logprobs).item()
    assert k1(logprobs, ref).item() == -d
    assert k2(logprobs, ref).item() == pytest.approx(d * d / 2, rel=1e-12, abs=0)
    if abs(d) > 1e-3:
        assert k3(logprobs, ref).item() == pytest.approx(math.exp(d) - d - 1, rel=1e-12)


@pytest.mark.parametrize("kind, gradient_too", [(k1, False), (k2, True), (k3, False)])
def test_expectations_of_the_estimators_under_the_policy(kind, gradient_too):
    """E k1 = E k3 = KL exactly; the expected gradient of k2 (not of k1, k3) through log pi is that of the KL."""
    logits = torch.tensor([0.4, -0.3, 0.1], dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.tensor([-0.2, 0.5, 0.3], dtype=torch.float64), 0)
    logprobs = torch.log_softmax(logits, 0)
    p = logprobs.detach().exp()
    kl = (logprobs.exp() * (logprobs - ref)).sum()
    if kind is not k2:
        assert (p * kind(logprobs, ref)).sum().item() == pytest.approx(kl.item(), rel=1e-12)
    exact, = torch.autograd.grad(kl, logits, retain_graph=True)
    through, = torch.autograd.grad((p * kind(logprobs, ref)).sum(), logits)
    assert torch.allclose(exact, through, rtol=1e-10) == gradient_too


def test_selective_logprobs_by_hand():
    """Weights exp(logit / 2) are 1, 3, 4: log-prob of token 1 is log 3/8, entropy log 8 - (3 log 3 + 4 log 4)/8."""
    logits = 2 * torch.tensor([[1.0, 3.0, 4.0], [1.0, 3.0, 4.0]], dtype=torch.float64).log()
    logprobs, entropy = selective_logprobs(logits, torch.tensor([1, 0]), 2.0)
    assert logprobs.tolist() == pytest.approx([math.log(3 / 8), math.log(1 / 8)], rel=1e-14)
    assert entropy.tolist() == pytest.approx([math.log(8) - (3 * math.log(3) + 4 * math.log(4)) / 8] * 2)


def test_selective_logprobs_precision_and_forbidden_tokens():
    logits = torch.tensor([[0.0, 8.0, -math.inf]], requires_grad=True)
    logprobs, entropy = selective_logprobs(logits.bfloat16(), torch.tensor([1]), 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    # bfloat16 keeps 8 bits: log-softmax computed in it would round -3.354e-4 to something 0.1 % or more away, or to 0
    assert logprobs.item() == pytest.approx(-math.log1p(math.exp(-8.0)), rel=1e-4)
    assert math.isfinite(entropy.item()) and not entropy.requires_grad
    logprobs.sum().backward()
    assert logits.grad[0, 2] == 0 and torch.isfinite(logits.grad).all()
    with pytest.raises(ValueError, match="temperature must be > 0, given 0"):
        selective_logprobs(logits, torch.tensor([1]), 0)
