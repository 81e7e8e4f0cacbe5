"""Losses on pairs of answers and their gradients, against numbers derived by hand and formulas in float64."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from frpo.objectives.preference import (
    BradleyTerry,
    Cost,
    PreferenceInputs,
    PreferenceLoss,
    build_preference,
    preference_losses,
)

LOG2, LOG3 = math.log(2), math.log(3)
BARE = {"regularisation": 0.0}


def inputs(scores, target=1.0, margin=0.0, signs=(0, 0), weight=1.0):
    count = len(scores)

    def full(value):
        return torch.tensor(value if isinstance(value, list) else [value] * count, dtype=torch.float64)

    return PreferenceInputs(
        scores_P2=torch.tensor(scores, dtype=torch.float64, requires_grad=True), target_P=full(target),
        margin_P=full(margin), sign_P2=full(signs), weight_P=full(weight))


def found(loss, given):
    """The loss, and its gradient of each score."""
    output = loss.loss(given)
    gradient, = torch.autograd.grad(output.loss_sum, given.scores_P2)
    return float(output.loss_sum.detach()), gradient.tolist()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize("scores, keys, loss, gradient", [
    ([LOG3, 0.0], {}, math.log(4 / 3), [-0.25, 0.25]),
    ([0.0, LOG3], {}, math.log(4), [-0.75, 0.75]),
    ([2.0, 2.0], {}, LOG2, [-0.5, 0.5]),
    ([LOG3, 0.0], {"margin": LOG3}, LOG2, [-0.5, 0.5]),
    ([LOG3, 0.0], {"margin": 2 * LOG3}, math.log(4), [-0.75, 0.75]),
    ([0.0, 0.0], {"target": 0.5}, LOG2, [0.0, 0.0]),
    ([LOG3, 0.0], {"target": 0.5}, 0.5 * (math.log(4) + math.log(4 / 3)), [0.25, -0.25]),
    ([LOG3, 0.0], {"weight": 0.5}, 0.5 * math.log(4 / 3), [-0.125, 0.125]),
    ([LOG3, 0.0], {"weight": 0.0}, 0.0, [0.0, 0.0]),
    ([LOG3, 0.0], {"signs": (1, -1)}, math.log(4 / 3), [-0.25, 0.25])])  # a preference has no use for flags
def test_bradley_terry_by_hand(scores, keys, loss, gradient):
    value, (row,) = found(BradleyTerry(**BARE), inputs([scores], **keys))
    assert value == pytest.approx(loss, abs=1e-14) and row == pytest.approx(gradient, abs=1e-14)


@pytest.mark.parametrize("keys, loss, gradient", [
    ({"regularisation": 0.1}, LOG2 + 0.1 * (9 + 9) / 2, [-0.5 + 0.3, 0.5 + 0.3]),
    ({"regularisation": 0.0, "center": 0.1}, LOG2 + 0.1 * 36, [-0.5 + 1.2, 0.5 + 1.2]),
    ({}, LOG2 + 1e-3 * 9, [-0.5 + 3e-3, 0.5 + 3e-3])])
def test_terms_on_the_scores_themselves(keys, loss, gradient):
    value, (row,) = found(BradleyTerry(**keys), inputs([[3.0, 3.0]]))
    assert value == pytest.approx(loss) and row == pytest.approx(gradient)


def test_a_centred_pair_costs_nothing():
    assert found(BradleyTerry(center=5.0, **BARE), inputs([[1.0, -1.0]])) == found(
        BradleyTerry(**BARE), inputs([[1.0, -1.0]]))


@pytest.mark.parametrize("kind", [BradleyTerry, Cost])
def test_label_noise_moves_the_optimum_to_the_share_of_right_labels(kind):
    """With a quarter of wrong labels, a difference of log 3 is best; more and less are worse."""
    loss = kind(label_noise=0.25, **BARE)
    value, gradient = found(loss, inputs([[LOG3, 0.0]]))
    assert value == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert gradient[0] == pytest.approx([0.0, 0.0], abs=1e-15)
    assert found(loss, inputs([[LOG3 + 1, 0.0]]))[0] > value and found(loss, inputs([[LOG3 - 1, 0.0]]))[0] > value
    assert found(loss, inputs([[1.0, 0.0]], target=0.5)) == found(kind(**BARE), inputs([[1.0, 0.0]], target=0.5))


@pytest.mark.parametrize("scores, signs, loss, gradient", [
    ([LOG3, 0.0], (0, 0), math.log(4 / 3), [-0.25, 0.25]),
    ([LOG3, 0.0], (1, 0), 2 * math.log(4 / 3), [-0.5, 0.25]),
    ([LOG3, 0.0], (-1, 0), math.log(4 / 3) + math.log(4), [-0.25 + 0.75, 0.25]),
    ([LOG3, 0.0], (1, -1), 2 * math.log(4 / 3) + LOG2, [-0.5, 0.25 + 0.5]),
    ([LOG3, 0.0], (1, 1), 2 * math.log(4 / 3) + LOG2, [-0.5, 0.25 - 0.5]),
    ([LOG3, 0.0], (-1, -1), math.log(4 / 3) + math.log(4) + LOG2, [-0.25 + 0.75, 0.25 + 0.5])])
def test_cost_by_hand(scores, signs, loss, gradient):
    value, (row,) = found(Cost(**BARE), inputs([scores], signs=signs))
    assert value == pytest.approx(loss) and row == pytest.approx(gradient)


def test_a_tie_of_costs_still_learns_the_signs():
    value, (row,) = found(Cost(**BARE), inputs([[0.0, 0.0]], target=0.5, signs=(1, -1)))
    assert value == pytest.approx(3 * LOG2) and row == pytest.approx([-0.5, 0.5])
    assert found(Cost(**BARE), inputs([[1.0, -1.0]], signs=(1, -1), weight=0.0)) == (0.0, [[0.0, 0.0]])


@pytest.mark.parametrize("kind", [BradleyTerry, Cost])
def test_many_pairs_against_the_formula(kind):
    random = torch.Generator().manual_seed(3)
    scores = (3 * torch.randn(40, 2, generator=random, dtype=torch.float64)).tolist()
    target, margin = ([1.0] * 30 + [0.5] * 10), torch.rand(40, generator=random).tolist()
    signs = torch.randint(-1, 2, (40, 2), generator=random).tolist()
    weight = torch.rand(40, generator=random, dtype=torch.float64).tolist()
    keys = {"regularisation": 0.02, "label_noise": 0.1} | ({"center": 0.03} if kind is BradleyTerry else {})
    total, slopes = 0.0, []
    for (a, b), t, m, (i, j), w in zip(scores, target, margin, signs, weight, strict=True):
        share, gap = t * 0.9 + (1 - t) * 0.1, a - b - m
        loss = -share * log_sigmoid(gap) - (1 - share) * log_sigmoid(-gap) + 0.02 * (a * a + b * b) / 2
        slope = [sigmoid(gap) - share + 0.02 * a, share - sigmoid(gap) + 0.02 * b]
        if kind is BradleyTerry:
            loss, slope = loss + 0.03 * (a + b) ** 2, [each + 0.06 * (a + b) for each in slope]
        else:
            loss -= sum(log_sigmoid(sign * score) for sign, score in ((i, a), (j, b)) if sign)
            slope = [each - sign * sigmoid(-sign * score)
                     for each, sign, score in zip(slope, (i, j), (a, b), strict=True)]
        total, slopes = total + w * loss, [*slopes, *(w * each for each in slope)]
    value, gradient = found(kind(**keys), inputs(scores, target, margin, signs, weight))
    assert value == pytest.approx(total, rel=1e-12)
    assert [each for row in gradient for each in row] == pytest.approx(slopes, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("kind", [BradleyTerry, Cost])
def test_extreme_scores_give_finite_numbers(kind):
    value, gradient = found(kind(**BARE), inputs([[1e4, -1e4], [-1e4, 1e4]], signs=(1, -1)))
    assert value == pytest.approx(2e4 if kind is BradleyTerry else 4e4) and math.isfinite(sum(map(sum, gradient)))


def test_losses_by_name():
    assert preference_losses() == {"bradley_terry": BradleyTerry, "cost": Cost}
    assert build_preference({"name": "cost", "label_noise": 0.1}) == Cost(label_noise=0.1)
    assert build_preference({"name": "bradley_terry"}) == BradleyTerry(regularisation=1e-3, center=0.0, label_noise=0.0)
    assert isinstance(BradleyTerry(), PreferenceLoss) and BradleyTerry.name == "bradley_terry" and Cost.name == "cost"
    assert (BradleyTerry.compares, Cost.compares) == ("better", "harm")


@dataclass(frozen=True, kw_only=True)
class Hinge:
    """A loss outside the package."""

    compares: ClassVar[str] = "better"
    width: float = 1.0

    def loss(self, inputs):
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Aimless(Hinge):
    compares: ClassVar[str] = "nicer"


@dataclass(frozen=True, kw_only=True)
class Silent:
    def loss(self, inputs):
        raise NotImplementedError


def test_a_loss_outside_the_package_is_named_by_its_place():
    assert build_preference({"name": f"{__name__}:Hinge", "width": 2.0}) == Hinge(width=2.0)


@pytest.mark.parametrize("values, message", [
    ({"name": "bradly_terry"}, r"unknown objective 'bradly_terry' \(did you mean 'bradley_terry'\?\)"),
    ({"name": "cost", "center": 1.0}, "unknown key of objective 'cost': 'center'"),
    ({"name": "bradley_terry", "regularization": 1.0}, r"'regularization' \(did you mean 'regularisation'\?\)"),
    ({"name": "bradley_terry", "center": "1e-3"}, "center of objective 'bradley_terry' must be a valid number"),
    ({"name": "bradley_terry", "regularisation": -0.1}, "regularisation must be >= 0, given -0.1"),
    ({"name": "cost", "regularisation": math.nan}, "regularisation must be >= 0, given nan"),
    ({"name": "bradley_terry", "center": -1.0}, "center must be >= 0, given -1.0"),
    ({"name": "bradley_terry", "center": math.nan}, "center must be >= 0, given nan"),
    ({"name": "bradley_terry", "label_noise": 0.5}, "label_noise must be at least 0 and below 0.5, given 0.5"),
    ({"name": "cost", "label_noise": -0.1}, "label_noise must be at least 0 and below 0.5, given -0.1"),
    ({"name": "cost", "label_noise": math.nan}, "label_noise must be at least 0 and below 0.5, given nan"),
    ({"name": f"{__name__}:Silent"}, r"Silent' must define compares: ClassVar\[str\] = 'better' or 'harm'$"),
    ({"name": f"{__name__}:Aimless"}, r"Aimless' must define compares: .* = 'better' or 'harm'; given 'nicer'"),
])
def test_wrong_parameters_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        build_preference(values)
