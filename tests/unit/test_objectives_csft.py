"""CSFT and PA losses, their schedules and metrics against numbers derived by hand."""
from __future__ import annotations

import math

import pytest
import torch

from frpo.objectives.csft import CSFT, CSFTPA, csft_loss, csft_weights, pa_loss
from frpo.objectives.supervised import KLSFT, SFT, Progress, SupervisedInputs, build_supervised

LOG2, LOG3 = math.log(2), math.log(3)


def column(values):
    return torch.tensor(values, dtype=torch.float64)


ONE = {"beta_first": 1.0, "beta_early": 1.0, "beta_base": 1.0}
"""Beta at every position."""


def with_pa(given, delta, **options):
    """CSFT with beta 1 and this much of PA."""
    loss = CSFTPA(**ONE, delta_start=delta, delta_end=delta, **options)
    return loss.loss(given, Progress(epochs_done=0.5, num_epochs=1))


def inputs(logprobs, ref, weight=1.0, kl=None, margin=None, agree=None):
    n = len(logprobs)

    def full(value):
        return column(value if isinstance(value, list) else [value] * n)

    return SupervisedInputs(
        logprobs_N=column(logprobs).requires_grad_(), ref_logprobs_N=full(ref), weight_N=full(weight),
        position_N=torch.arange(n),
        kl_N=None if kl is None else full(kl).requires_grad_(),
        margin_N=None if margin is None else full(margin).requires_grad_(),
        agree_N=None if margin is None else full(margin) == 0 if agree is None else torch.tensor(agree))


def mean(metric):
    total, count, how = metric
    assert how == "mean" and not total.requires_grad
    return float(total) / float(count)


def test_beta_by_position_in_the_response():
    """Qi et al.: 0.1 x 5 for the first token, 0.1 x 20 for the next four, 0.1 for all others."""
    assert CSFT().betas(torch.tensor([0, 1, 2, 4, 5, 100])).tolist() == pytest.approx([0.5, 2, 2, 2, 0.1, 0.1])
    assert CSFT(early_tokens=0, beta_first=1.0, beta_base=3.0).betas(torch.tensor([0, 1])).tolist() == [1.0, 3.0]


@pytest.mark.parametrize("gap, beta, w", [
    (0.0, 2.0, 1.0),
    (LOG3, 1.0, 0.5),       # sigmoid(-log 3) = 1/4
    (-LOG3, 1.0, 1.5),
    (LOG3 / 2, 2.0, 0.5),
    (20.0, 1.0, 1e-3),      # 2 sigmoid(-20) = 4e-9 is below the floor
    (-800.0, 1.0, 2.0),
])
def test_weights(gap, beta, w):
    assert csft_weights(column([gap - 3]), column([-3.0]), column([beta])).item() == pytest.approx(w, rel=1e-12)


def test_csft_is_a_weighted_cross_entropy_with_a_constant_weight():
    given = inputs([-2.0, -1.0], ref=[-2 - LOG3, -1.0], weight=[0.5, 2.0])
    output = CSFT(**ONE).loss(given, Progress(epochs_done=0, num_epochs=1))
    output.loss_sum.backward()
    assert output.loss_sum.item() == pytest.approx(0.5 * 0.5 * 2 + 2 * 1 * 1)
    assert given.logprobs_N.grad.tolist() == pytest.approx([-0.5 * 0.5, -2.0])
    assert mean(output.metrics["csft/loss"]) == pytest.approx((0.5 * 2 + 1) / 2)
    assert mean(output.metrics["csft/weight"]) == pytest.approx(0.75)


def test_csft_has_the_gradient_of_the_papers_objective():
    """-(2 / beta) log sigmoid(beta (log pi - log pi_ref)), above the floor."""
    given, beta_N = inputs([-2.0, -0.3, -5.0], ref=[-1.0, -0.9, -3.0]), column([0.5, 2.0, 0.1])
    csft_loss(given, beta_N).loss_sum.backward()
    logprobs_N = given.logprobs_N.detach().requires_grad_()
    objective_N = -2 / beta_N * torch.nn.functional.logsigmoid(beta_N * (logprobs_N - given.ref_logprobs_N))
    objective_N.sum().backward()
    torch.testing.assert_close(given.logprobs_N.grad, logprobs_N.grad, rtol=1e-13, atol=0)


@pytest.mark.parametrize("options, mu, kl_gradient", [
    ({}, 1.0, 0.75 * LOG3),                 # -sigmoid(-zeta) margin, sigmoid(log 3) = 3/4
    ({"mu_detach": True}, 1.0, 0.0),
    ({"mu_max": 2.0}, 1.0, 0.75 * LOG3),
    ({"mu_max": 0.5}, 0.5, 0.0),
])
def test_pa_and_its_gradient(options, mu, kl_gradient):
    """Margin -log 3, KL 1, token weight 2, delta 1/4; w = 1."""
    given = inputs([-1.0], ref=-1.0, weight=2.0, kl=1.0, margin=-LOG3)
    output = with_pa(given, 0.25, **options)
    output.loss_sum.backward()
    pa = math.log1p(3**mu)
    assert output.loss_sum.item() == pytest.approx(2 * (1 + 0.25 * pa), rel=1e-14)
    assert given.logprobs_N.grad.item() == -2
    assert given.margin_N.grad.item() == pytest.approx(-2 * 0.25 * mu * 3**mu / (1 + 3**mu), rel=1e-14)
    gradient = given.kl_N.grad
    assert (0.0 if gradient is None else gradient.item()) == pytest.approx(2 * 0.25 * kl_gradient, rel=1e-14)
    assert mean(output.metrics["pa/loss"]) == pytest.approx(pa - LOG2)
    assert mean(output.metrics["pa/mu"]) == mu


def test_pa_of_agreeing_tokens_is_log_2_without_gradient():
    given = inputs([-1.0], ref=-1.0, kl=0.7, margin=0.0)
    output = with_pa(given, 1.0)
    output.loss_sum.backward()
    assert output.loss_sum.item() == pytest.approx(1 + LOG2)
    assert given.kl_N.grad.item() == 0 and mean(output.metrics["pa/disagree"]) == 0
    assert output.metrics["pa/loss"][:2] == (0, 0)


@pytest.mark.parametrize("margin", [-30.0, -800.0])
def test_pa_is_exact_far_out(margin):
    """torch's softplus is a straight line above 20: there 1 - sigmoid(30) = 9e-14 is lost. And nothing overflows."""
    given = inputs([0.0], ref=0.0, kl=1.0, margin=margin)
    with_pa(given, 1.0).loss_sum.backward()
    assert given.margin_N.grad.item() == pytest.approx(-1 / (1 + math.exp(margin)), abs=1e-15)


def test_pa_metrics_count_disagreeing_tokens_with_a_weight():
    given = inputs([-1.0] * 4, ref=-1.0, weight=[1.0, 0.5, 1.0, 0.0], kl=[1.0, 2.0, 3.0, 99.0],
                   margin=[-LOG3, 0.0, -LOG3, -9.0])
    metrics = with_pa(given, 1.0).metrics
    assert mean(metrics["pa/loss"]) == pytest.approx((math.log(4) + math.log(28)) / 2 - LOG2)
    assert mean(metrics["pa/disagree"]) == pytest.approx(2 / 3)
    assert mean(metrics["pa/mu"]) == 2
    assert mean(metrics["csft/loss"]) == 1
    assert set(metrics) == {"csft/loss", "csft/weight", "pa/loss", "pa/mu", "pa/disagree", "pa/delta"}
    assert metrics["pa/delta"] == (1.0, 1.0, "max")


def test_disagreement_is_told_by_the_tokens_not_by_a_soft_margin():
    given = inputs([-1.0] * 2, ref=-1.0, kl=1.0, margin=[-0.1, 0.2], agree=[True, False])
    metrics = with_pa(given, 1.0).metrics
    assert mean(metrics["pa/disagree"]) == 0.5
    assert mean(metrics["pa/loss"]) == pytest.approx(math.log1p(math.exp(-0.2)) - LOG2)


def test_a_token_without_weight_contributes_nothing_even_if_it_is_nan():
    nan = math.nan
    given = inputs([-1.0, nan], ref=[-1.0, nan], weight=[1.0, 0.0], kl=[1.0, nan], margin=[-LOG3, nan])
    output = with_pa(given, 1.0)
    output.loss_sum.backward()
    assert output.loss_sum.item() == pytest.approx(1 + math.log(4))
    assert [t.grad[1].item() for t in (given.logprobs_N, given.kl_N, given.margin_N)] == [0, 0, 0]
    assert all(math.isfinite(mean(metric)) for name, metric in output.metrics.items() if name != "pa/delta")


@pytest.mark.parametrize("index, done, delta", [
    ("fractional", 0, 0.1), ("fractional", 1.5, 0.2), ("fractional", 3, 0.3),
    ("epoch0", 0.9, 0.1), ("epoch0", 1.5, 0.1 + 0.2 / 3), ("epoch0", 3, 0.1 + 0.4 / 3),
    ("epoch1", 0, 0.1 + 0.2 / 3), ("epoch1", 2.9, 0.3), ("epoch1", 3, 0.3),
])
def test_delta_by_epoch(index, done, delta):
    assert CSFTPA(delta_index=index).delta(Progress(epochs_done=done, num_epochs=3)) == pytest.approx(delta, rel=1e-14)


@pytest.mark.parametrize("index, done, delta", [
    ("fractional", 0.75, 0.2), ("fractional", 1.5, 0.3), ("epoch0", 0.9, 0.1), ("epoch0", 1.5, 0.1 + 0.2 / 1.5),
    ("epoch1", 0.9, 0.1 + 0.2 / 1.5), ("epoch1", 1.2, 0.3)])
def test_delta_where_the_last_epoch_is_half_a_one(index, done, delta):
    """Whole epochs count as before; delta never passes its end."""
    found = CSFTPA(delta_index=index).delta(Progress(epochs_done=done, num_epochs=1.5))
    assert found == pytest.approx(delta, rel=1e-14)


@pytest.mark.parametrize("build, message", [
    (lambda: CSFT(beta_early=0.0), "beta_early must be > 0, given 0.0"),
    (lambda: CSFT(early_tokens=-1), "early_tokens must be >= 0, given -1"),
    (lambda: CSFT(floor=2.0), r"floor must be in \[0, 2\), given 2.0"),
    (lambda: CSFTPA(beta_first=-1.0), "beta_first must be > 0, given -1.0"),
    (lambda: CSFTPA(delta_index="epoch2"), "unknown delta_index 'epoch2'"),
    (lambda: CSFTPA(delta_start=-0.1), "delta_start must be >= 0, given -0.1"),
    (lambda: CSFTPA(mu_max=0.0), "mu_max must be > 0 or None, given 0.0"),
    (lambda: CSFTPA(argmax="firm"), "unknown argmax 'firm'"),
    (lambda: CSFTPA(tau=0.0), "tau must be > 0, given 0.0"),
    (lambda: CSFTPA().delta(Progress(epochs_done=3.5, num_epochs=3)), r"epochs_done must be in \[0, 3\], given 3.5"),
    (lambda: KLSFT(kl_coef=-1.0), "kl_coef must be >= 0, given -1.0"),
    (lambda: CSFTPA(delta_end=-1.0), "delta_end must be >= 0, given -1.0"),
    (lambda: pa_loss(inputs([-1.0], ref=-1.0)), "PA needs kl_N, margin_N and agree_N"),
])
def test_values_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_inputs_never_broadcast():
    two_N = column([1, 2])
    with pytest.raises(AssertionError, match="all tensors of SupervisedInputs must have one shape"):
        SupervisedInputs(logprobs_N=two_N, ref_logprobs_N=column([1]), position_N=two_N, weight_N=two_N)


def supervised_inputs(nan=math.nan):
    """Three tokens: the first and the sixth of a response, and one without weight that is NaN throughout."""
    return SupervisedInputs(
        logprobs_N=column([-2.0, -1.0, nan]), ref_logprobs_N=column([-2.0 - LOG3, -1.0, nan]),
        weight_N=column([0.5, 0.25, 0.0]), position_N=torch.tensor([0, 5, 6]), kl_N=column([1.0, 0.7, nan]),
        margin_N=column([-LOG3, 0.0, nan]), agree_N=torch.tensor([False, True, False]))


@pytest.mark.parametrize("values, expected", [
    ({"name": "sft"}, 0.5 * 2 + 0.25),
    ({"name": "kl_sft", "kl_coef": 2.0}, 0.5 * (2 + 2) + 0.25 * (1 + 1.4)),
    # w of the first token at beta 1/2: 2 sigmoid(-log(3) / 2) = 2 / (1 + sqrt(3)); of the other 1.
    ({"name": "csft"}, 0.5 * 2 * 2 / (1 + math.sqrt(3)) + 0.25),
    # delta half way 0.2; PA log 4 and log 2.
    ({"name": "csft_pa"}, 0.5 * (2 * 2 / (1 + math.sqrt(3)) + 0.2 * math.log(4)) + 0.25 * (1 + 0.2 * LOG2)),
])
def test_the_losses_that_recipes_name(values, expected):
    output = build_supervised(values).loss(supervised_inputs(), Progress(epochs_done=1.0, num_epochs=2))
    assert output.loss_sum.item() == pytest.approx(expected, rel=1e-14)
    assert ("pa/delta" in output.metrics) == (values["name"] == "csft_pa")


def test_who_needs_a_reference():
    assert [loss.needs_reference for loss in (SFT(), KLSFT(), CSFT(), CSFTPA())] == [False, True, True, True]
