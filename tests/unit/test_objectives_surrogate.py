"""The policy loss with every surrogate, its KL term and the log-prob helpers against numbers derived by hand."""
from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from frpo.objectives.base import LossInputs
from frpo.objectives.cispo import CISPO
from frpo.objectives.clip import Clip
from frpo.objectives.correction import RolloutCorrection
from frpo.objectives.gspo import GSPO
from frpo.objectives.ops import k1, k2, k3, sequence_sum
from frpo.objectives.reinforce import Reinforce
from frpo.objectives.surrogate import PolicyLoss

LOSSES = {
    "clip": PolicyLoss(kl_coef=0.5),
    "dual_clip": PolicyLoss(kl_coef=0.5, surrogate=Clip(dual_clip=3.0)),
    "gspo": PolicyLoss(kl_coef=0.5, surrogate=GSPO(clip_low=0.2, clip_high=0.2)),
    "cispo": PolicyLoss(kl_coef=0.5, surrogate=CISPO(clip_low=0.1)),
    "reinforce": PolicyLoss(kl_coef=0.5, surrogate=Reinforce()),
    "token": PolicyLoss(kl_coef=0.5, correction=RolloutCorrection()),
    "sequence": PolicyLoss(kl_coef=0.5, correction=RolloutCorrection(level="sequence", mode="mask", low=0.1)),
    "geometric": PolicyLoss(kl_coef=0.5, correction=RolloutCorrection(level="geometric")),
}
"""One loss of every surrogate and of every level of correction."""


def column(value, like):
    values = value if isinstance(value, list) else [value] * like
    return torch.tensor(values, dtype=torch.float64)


def inputs(logprobs, old=0.0, ref=None, rollout=None, advantage=1.0, policy_weight=1.0, kl_weight=1.0, mask=True,
           sequence=0, kl=None, share=None):
    n = len(logprobs)
    optional = {f"{name}_logprobs_N": None if value is None else column(value, n)
                for name, value in (("old", old), ("ref", ref), ("rollout", rollout))}
    return LossInputs(
        logprobs_N=column(logprobs, n).requires_grad_(), **optional, advantage_N=column(advantage, n),
        policy_weight_N=column(policy_weight, n), kl_weight_N=column(kl_weight, n), mask_N=column(mask, n).bool(),
        sequence_N=column(sequence, n).long(), kl_N=None if kl is None else column(kl, n).requires_grad_(),
        kl_metric_weight_N=None if share is None else column(share, n))


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
    value, grad, metrics = loss_and_gradient(PolicyLoss(surrogate=Clip(clip_low=0.2, clip_high=0.3)), given)
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
@pytest.mark.parametrize("where", ["logprobs", "old", "ref", "rollout", "advantage"])
@pytest.mark.parametrize("off", ["mask", "weights"])
@pytest.mark.parametrize("name", LOSSES)
def test_tokens_without_a_loss_never_spread_bad_numbers(name, bad, where, off):
    """Token 1 is off and holds a bad number; token 0, of the same sequence, must give what it gives alone."""
    keys = dict(logprobs=[0.1, 0.1], old=[0.0, 0.0], ref=[0.2, 0.2], rollout=[-0.3, -0.3], advantage=[1.0, 1.0])
    keys[where] = [keys[where][0], bad]
    live = [True, False]
    keys |= dict(mask=live) if off == "mask" else dict(policy_weight=[1.0, 0.0], kl_weight=[1.0, 0.0])
    loss = LOSSES[name]
    value, grad, metrics = loss_and_gradient(loss, inputs(**keys))
    alone = inputs([0.1], old=0.0, ref=0.2, rollout=-0.3)
    expected, expected_grad, expected_metrics = loss_and_gradient(loss, alone)
    assert value == pytest.approx(expected, rel=1e-14) and grad == pytest.approx([*expected_grad, 0.0], rel=1e-14)
    assert grad[1] == 0.0
    assert metrics.keys() == expected_metrics.keys()
    for name, (total, count, reduction) in metrics.items():
        assert float(total) == pytest.approx(float(expected_metrics[name][0]), rel=1e-14), name
        assert float(count) == 1 and reduction == ("max" if name.endswith("max") else "mean"), name


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_token_without_advantage_gives_the_policy_nothing_even_if_it_is_bad(name, bad):
    given = inputs([bad, 0.1], rollout=0.0, advantage=[0.0, 1.0], kl_weight=0.0, ref=0.0, sequence=[0, 1])
    value, grad, _ = loss_and_gradient(LOSSES[name], given)
    assert math.isfinite(value) and grad[0] == 0.0 and grad[1] != 0.0


def test_weights_are_separate():
    """NaN in the reference hurts nobody whose KL weight is zero; zero policy weight leaves the KL alone."""
    given = inputs([0.0, 0.3], ref=[math.nan, 0.0], policy_weight=[1.0, 0.0], kl_weight=[0.0, 1.0])
    _, grad, _ = loss_and_gradient(PolicyLoss(kl_coef=1.0, kl_estimator="k2"), given)
    assert grad == pytest.approx([-1.0, 0.3])


@pytest.mark.parametrize("logprob, advantage", [(2000.0, 1.0), (-2000.0, -1.0), (2000.0, 0.0), (-2000.0, 1.0)])
@pytest.mark.parametrize("name", ["clip", "dual_clip", "gspo"])
def test_an_overflowing_ratio_that_is_clipped_has_no_gradient(name, logprob, advantage):
    _, grad, _ = loss_and_gradient(LOSSES[name], inputs([logprob], ref=logprob, advantage=advantage))
    assert grad == [0.0]


@pytest.mark.parametrize("name, gradient", [("dual_clip", 0.0), ("cispo", 5.0), ("reinforce", 1.0)])
def test_an_overflowing_ratio_of_a_bad_token_is_bounded(name, gradient):
    """A = -1 at ratio e^2000: dual clip stops, CISPO weighs with its cap 1 + 4, REINFORCE sees no ratio."""
    value, grad, _ = loss_and_gradient(LOSSES[name], inputs([2000.0], ref=2000.0, advantage=-1.0))
    assert math.isfinite(value) and grad == [gradient]


def test_a_correction_that_masks_a_token_keeps_its_overflow_out():
    """Token 0: ratio e^2000 with A < 0, but its weight e^{0 - (-9)} is above the limit."""
    loss = PolicyLoss(correction=RolloutCorrection(mode="mask", high=5.0))
    value, grad, _ = loss_and_gradient(loss, inputs([2000.0, 0.0], rollout=[-9.0, 0.0], advantage=[-1.0, 1.0]))
    assert value == -1.0 and grad == [0.0, -1.0]


@pytest.mark.parametrize("name", LOSSES)
def test_a_bad_number_in_a_live_token_stays_visible(name):
    for keys in (dict(logprobs=[math.nan], ref=0.0, rollout=0.0), dict(logprobs=[0.0], ref=math.nan, rollout=0.0)):
        value, _, _ = loss_and_gradient(LOSSES[name], inputs(**keys))
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


@pytest.mark.parametrize("name", LOSSES)
def test_no_token_at_all(name):
    value, grad, metrics = loss_and_gradient(LOSSES[name], inputs([], ref=[], rollout=[]))
    assert value == 0.0 and grad == [] and float(metrics["policy/ratio_max"][1]) == 0


# --- surrogates -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ratio, advantage, loss, gradient, high", [
    # c = 3: for A < 0 the objective is max(min(ratio A, clip(ratio) A), 3 A)
    (2.9, -2.0, 5.8, 5.8, 0),
    (3.1, -2.0, 6.0, 0.0, 1),
    (1e9, -2.0, 6.0, 0.0, 1),
    (0.5, -2.0, 1.6, 0.0, 0),   # clipped from below as before
    (1.2, 2.0, -2.4, -2.4, 0),
    (9.0, 2.0, -2.6, 0.0, 1),   # A > 0 never meets the bound
])
def test_dual_clip_by_hand(ratio, advantage, loss, gradient, high):
    given = inputs([math.log(ratio) - 1.0], old=-1.0, advantage=advantage)
    value, grad, metrics = loss_and_gradient(PolicyLoss(surrogate=Clip(clip_high=0.3, dual_clip=3.0)), given)
    assert value == pytest.approx(loss, rel=1e-14) and grad == pytest.approx([gradient], rel=1e-14)
    assert float(metrics["policy/clip_high"][0]) == high


@pytest.mark.parametrize("advantage, loss, gradient, low, high", [
    # Sequence 0: ratios 4 and 1/2, s = sqrt 2; weights 1/2 each: loss -s A, gradient -s A / 2 at both tokens, or
    # clipped at 1.3 for A > 0. Sequence 1: ratio 1/2, s = 1/2, clipped at 0.8 for A < 0.
    ([2.0, 1.0], -2.6 - 0.5, [0.0, 0.0, -0.5], 0, 2),
    ([-2.0, -1.0], 2 * math.sqrt(2) + 0.8, [math.sqrt(2), math.sqrt(2), 0.0], 1, 0),
])
def test_gspo_by_hand(advantage, loss, gradient, low, high):
    given = inputs([math.log(4) - 1, -math.log(2) - 1, 9.0, -math.log(2) - 1], old=-1.0, sequence=[0, 0, 0, 1],
                   mask=[True, True, False, True], policy_weight=[0.5, 0.5, 0.5, 1.0],
                   advantage=[advantage[0]] * 3 + [advantage[1]])
    value, grad, metrics = loss_and_gradient(PolicyLoss(surrogate=GSPO(clip_low=0.2, clip_high=0.3)), given)
    assert value == pytest.approx(loss, rel=1e-14)
    assert grad == pytest.approx([*gradient[:2], 0.0, gradient[2]], rel=1e-14)
    assert (float(metrics["policy/clip_low"][0]), float(metrics["policy/clip_high"][0])) == (low, high)


def test_gspo_averages_over_tokens_that_a_correction_masks():
    """Ratios 4 and 1/2: s = sqrt 2 although token 0 has no weight after correction; token 1 alone would be clipped."""
    loss = PolicyLoss(surrogate=GSPO(), correction=RolloutCorrection(mode="mask"))
    given = inputs([math.log(4), -math.log(2)], rollout=[-9.0, 0.0], advantage=-1.0)
    value, grad, _ = loss_and_gradient(loss, given)
    assert value == pytest.approx(math.sqrt(2), rel=1e-14) and grad == pytest.approx([0.0, math.sqrt(2)], rel=1e-14)


@pytest.mark.parametrize("clip_low, ratio, weight, low, high", [
    (None, 1.0, 1.0, 0, 0), (None, 0.01, 0.01, 0, 0), (None, 2.9, 2.9, 0, 0), (None, 3.5, 3.0, 0, 1),
    (0.1, 0.01, 0.9, 1, 0), (0.1, 0.95, 0.95, 0, 0), (0.1, 3.5, 3.0, 0, 1)])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_by_hand(clip_low, ratio, weight, low, high, advantage):
    """Loss -weight A log pi, gradient -weight A: also where the ratio is capped, for either sign of A."""
    logprob = -0.5
    given = inputs([logprob], old=logprob - math.log(ratio), advantage=advantage)
    loss = PolicyLoss(surrogate=CISPO(clip_low=clip_low, clip_high=2.0))
    value, grad, metrics = loss_and_gradient(loss, given)
    assert value == pytest.approx(-weight * advantage * logprob, rel=1e-14)
    assert grad == pytest.approx([-weight * advantage], rel=1e-14)
    assert (float(metrics["policy/clip_low"][0]), float(metrics["policy/clip_high"][0])) == (low, high)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_reinforce_by_hand(advantage):
    """No ratio in loss or gradient, but in the metrics."""
    given = inputs([math.log(4), -math.log(8)], advantage=advantage, policy_weight=[0.5, 0.25])
    value, grad, metrics = loss_and_gradient(PolicyLoss(surrogate=Reinforce()), given)
    assert value == pytest.approx(-0.75 * advantage) and grad == [-0.5 * advantage, -0.25 * advantage]
    assert float(metrics["policy/ratio"][0]) == pytest.approx(4.125)
    assert float(metrics["policy/clip_low"][0]) == float(metrics["policy/clip_high"][0]) == 0


@pytest.mark.parametrize("name", ["clip", "gspo", "cispo", "reinforce"])
def test_without_old_logprobs_every_surrogate_is_the_policy_gradient(name):
    """The ratio is 1: gradient -weight A, whatever the surrogate."""
    given = inputs([-0.3, -2.0, -0.7], old=None, ref=0.0, kl_weight=0.0, advantage=[2.0, 2.0, -1.0],
                   policy_weight=[0.25, 0.25, 0.5], sequence=[0, 0, 1])
    _, grad, metrics = loss_and_gradient(LOSSES[name], given)
    assert grad == pytest.approx([-0.5, -0.5, 0.5], rel=1e-14)
    assert float(metrics["policy/ratio_max"][0]) == 1.0 and float(metrics["policy/kl_old"][0]) == 0.0


# --- correction and pieces --------------------------------------------------------------------------------------------

def test_a_correction_weighs_the_policy_term_only():
    """old - rollout = log 1.5 (kept) and log 8 (cut to 2); KL k2 of d = 0.3 with weight 1 has gradient -d each."""
    loss = PolicyLoss(kl_coef=1.0, kl_estimator="k2", correction=RolloutCorrection())
    given = inputs([0.0, 0.0], old=0.0, rollout=[-math.log(1.5), -math.log(8)], ref=0.3, policy_weight=[1.0, 0.5])
    value, grad, metrics = loss_and_gradient(loss, given)
    assert value == pytest.approx(-1.5 - 1.0 + 2 * 0.045) and grad == pytest.approx([-1.5 - 0.3, -1.0 - 0.3])
    assert float(metrics["correction/weight"][0]) == pytest.approx(3.5)


def test_a_correction_starts_from_the_old_policy_and_from_the_current_one_without_it():
    """exp(old - rollout) is a constant: the current policy enters only as the old one, and then detached."""
    loss = PolicyLoss(correction=RolloutCorrection(high=10.0))
    _, grad, _ = loss_and_gradient(loss, inputs([0.1], old=0.0, rollout=-math.log(4)))
    assert grad == pytest.approx([-4 * math.exp(0.1)])
    _, grad, _ = loss_and_gradient(loss, inputs([0.1], old=None, rollout=0.1 - math.log(4)))
    assert grad == pytest.approx([-4.0])


@pytest.mark.parametrize("name", LOSSES)
def test_pieces_of_whole_sequences_sum_to_the_whole(name):
    """Cut between sequences always; within one only where the loss says so (and then the sum shows it)."""
    generator = torch.Generator().manual_seed(0)
    n, loss = 8, LOSSES[name]
    values = torch.randn(6, n, generator=generator, dtype=torch.float64).tolist()
    given = inputs(values[0], old=values[1], ref=values[2], rollout=values[3], sequence=[0, 0, 0, 0, 2, 2, 2, 5],
                   advantage=[1.0] * 4 + [-1.0] * 4, policy_weight=0.2)

    def in_pieces(*cuts):
        values = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
        pieces = [dataclasses.replace(given, **{k: v[a:b] for k, v in values.items() if v is not None})
                  for a, b in zip((0, *cuts), (*cuts, n), strict=True)]
        return sum(loss(piece).loss_sum.item() for piece in pieces)

    whole = loss(given).loss_sum.item()
    assert in_pieces(4, 7) == pytest.approx(whole, rel=1e-14)
    assert (in_pieces(2, 5) == pytest.approx(whole, rel=1e-14)) is not loss.whole_sequences
    assert loss.whole_sequences is (name in ("gspo", "sequence", "geometric"))


def test_sequence_sum_by_hand():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert sequence_sum(values, torch.tensor([1, 1, 3, 3])).tolist() == [3.0, 3.0, 12.0, 12.0]
    big = torch.tensor([1e8, 1.0, -1e8])  # float32 would lose the 1
    assert sequence_sum(big, torch.tensor([0, 0, 0])).tolist() == [1.0] * 3


@pytest.mark.parametrize("make, message", [
    (lambda: Clip(clip_low=1.0), r"clip_low must be in \(0, 1\), given 1\.0"),
    (lambda: Clip(clip_high=0.0), r"clip_high must be > 0 and finite, given 0\.0"),
    (lambda: Clip(dual_clip=1.0), r"dual_clip must be > 1 and finite, or null, given 1\.0"),
    (lambda: GSPO(clip_low=0.0), r"clip_low must be in \(0, 1\), given 0\.0"),
    (lambda: CISPO(clip_low=1.5), r"clip_low must be in \(0, 1\) or null, given 1\.5"),
    (lambda: CISPO(clip_high=math.inf), "clip_high must be > 0 and finite, given inf"),
    (lambda: PolicyLoss(kl_coef=-0.1), r"kl_coef must be >= 0, given -0\.1"),
    (lambda: PolicyLoss(kl_estimator="k4"), "unknown kl_estimator 'k4'.*k1, k2, k3"),
])
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_missing_rollout_logprobs_are_named():
    with pytest.raises(ValueError, match="a rollout correction needs rollout_logprobs_N, given None"):
        PolicyLoss(correction=RolloutCorrection())(inputs([0.0]))


def test_missing_reference_is_named():
    with pytest.raises(ValueError, match=r"kl_coef = 0\.1 with kl_estimator 'k3' needs ref_logprobs_N"):
        PolicyLoss(kl_coef=0.1)(inputs([0.0]))


def test_the_full_kl_is_taken_as_it_is_given():
    """Weights 0.5, 0.25, none, and a NaN that is masked out; coefficient 2."""
    given = inputs([0.0] * 4, kl=[3.0, 1.0, 5.0, math.nan], kl_weight=[0.5, 0.25, 0.0, 1.0], advantage=0.0,
                   mask=[True, True, True, False])
    output = PolicyLoss(kl_coef=2.0, kl_estimator="full")(given)
    output.loss_sum.backward()
    assert output.loss_sum.item() == 2 * (1.5 + 0.25) and given.kl_N.grad.tolist() == [1.0, 0.5, 0.0, 0.0]
    total, count, _ = output.metrics["policy/kl_ref"]
    assert (total.item(), count.item()) == (9.0, 3)  # a token with a policy weight alone is one of them


@pytest.mark.parametrize("given", [
    {"kl": [3.0, 1.0, 5.0, 7.0]}, {"ref": [math.log(2)] * 4}], ids=["full", "k3"])
def test_kl_of_a_sequence_is_a_mean_over_those_that_are_watched(given):
    """Two tokens of one watched sequence, one of another, and one of a third that is not watched."""
    known = inputs([0.0] * 4, sequence=[0, 0, 1, 2], share=[0.5, 0.5, 1.0, 0.0], **given)
    metrics = PolicyLoss(kl_coef=1.0, kl_estimator="full" if "kl" in given else "k3")(known).metrics
    total, count, reduction = metrics["policy/kl_sequence"]
    wanted = (3 + 1 + 5) / 2 if "kl" in given else 3 * (1 - math.log(2)) / 2
    assert reduction == "mean" and float(total) / float(count) == pytest.approx(wanted, rel=1e-12)


def test_missing_full_kl_is_named():
    with pytest.raises(ValueError, match=r"kl_coef = 0\.1 with kl_estimator 'full' needs kl_N"):
        PolicyLoss(kl_coef=0.1, kl_estimator="full")(inputs([0.0], ref=0.0))


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
