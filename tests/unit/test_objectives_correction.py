"""Rollout correction: weights of every level and mode, their limits and metrics, by hand."""
from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from frpo.objectives.correction import RolloutCorrection

DIFFERENCES = [math.log(4), -math.log(2), math.log(3), 0.0]
"""log pi_old - log pi_rollout: sequence 0 has weights 4 and 1/2 (product 2, geometric mean sqrt 2), sequence 3 has 3
and 1 (product 3, geometric mean sqrt 3)."""


def weights(correction, differences=DIFFERENCES, live=True, sequence=(0, 0, 3, 3)):
    n = len(differences)
    rollout = torch.full((n,), -1.5, dtype=torch.float64)
    old = torch.tensor(differences, dtype=torch.float64) - 1.5
    live = torch.tensor(live if isinstance(live, list) else [live] * n)
    weight, metrics = correction.weights(old, rollout, live, torch.tensor(sequence))
    return weight.tolist(), {name: (float(total), float(count), kind) for name, (total, count, kind) in metrics.items()}


@pytest.mark.parametrize("keys, expected", [
    (dict(), [2, 0.5, 2, 1]),
    (dict(high=3.5), [3.5, 0.5, 3, 1]),
    (dict(mode="mask", high=3.5), [0, 0.5, 3, 1]),
    (dict(mode="mask", low=0.6, high=5.0), [4, 0, 3, 1]),
    (dict(level="sequence", high=10.0), [2, 2, 3, 3]),
    (dict(level="sequence", high=2.5), [2, 2, 2.5, 2.5]),
    (dict(level="sequence", mode="mask", high=2.5), [2, 2, 0, 0]),
    (dict(level="sequence", mode="mask", low=2.5, high=10.0), [0, 0, 3, 3]),
    (dict(level="geometric"), [math.sqrt(2)] * 2 + [math.sqrt(3)] * 2),
    (dict(level="geometric", high=1.5), [math.sqrt(2)] * 2 + [1.5] * 2),
    (dict(level="geometric", mode="mask", low=1.5), [0, 0] + [math.sqrt(3)] * 2),
])
def test_weights_by_hand(keys, expected):
    found, _ = weights(RolloutCorrection(**keys))
    assert found == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("keys, expected", [
    (dict(high=9.0), [4, 1, 3, 1]),
    (dict(level="sequence", high=9.0), [4, 1, 3, 3]),     # token 1 is no part of its sequence's product
    (dict(level="geometric", high=9.0), [4, 1] + [math.sqrt(3)] * 2),
])
@pytest.mark.parametrize("bad", [-0.5, math.nan, math.inf])
def test_a_token_that_is_not_live_takes_no_part(keys, expected, bad):
    differences = [DIFFERENCES[0], bad, *DIFFERENCES[2:]]
    found, metrics = weights(RolloutCorrection(**keys), differences, [True, False, True, True])
    assert found == pytest.approx(expected, rel=1e-14)
    assert all(math.isfinite(total) and count == 3 for total, count, _ in metrics.values())


def test_metrics_by_hand():
    """Applied weights 2, 1/2, 2, 1 of raw 4, 1/2, 3, 1: two are cut; k3 of log w is w - log w - 1."""
    _, metrics = weights(RolloutCorrection())
    kl = (4 - math.log(4) - 1) + (0.5 + math.log(2) - 1) + (3 - math.log(3) - 1)
    assert metrics == {
        "correction/weight": (pytest.approx(5.5), 4, "mean"),
        "correction/weight_square": (pytest.approx(9.25), 4, "mean"),
        "correction/weight_max": (pytest.approx(4.0), 4, "max"),
        "correction/clipped": (2.0, 4, "mean"),
        "correction/kl": (pytest.approx(kl), 4, "mean"),
    }


def test_masked_weights_count_as_nothing_in_the_mean():
    _, metrics = weights(RolloutCorrection(mode="mask"))
    assert metrics["correction/weight"][0] == pytest.approx(1.5) and metrics["correction/clipped"][0] == 2


@pytest.mark.parametrize("mode, expected", [("truncate", 2.0), ("mask", 0.0)])
def test_an_overflowing_product_meets_the_limit(mode, expected):
    found, _ = weights(RolloutCorrection(level="sequence", mode=mode), [500.0, 500.0, 0.0, 0.0])
    assert found == [expected, expected, 1, 1]


@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_a_bad_number_in_a_live_token_stays_visible(mode):
    found, metrics = weights(RolloutCorrection(mode=mode), [math.nan, 0.0, 0.0, 0.0])
    assert math.isnan(found[0]) and math.isnan(metrics["correction/weight"][0])


def test_weights_carry_no_gradient():
    old = torch.zeros(1, requires_grad=True)
    weight, _ = RolloutCorrection().weights(old, old, torch.tensor([True]), torch.tensor([0]))
    assert not weight.requires_grad


@pytest.mark.parametrize("keys, message", [
    (dict(level="group"), "level"), (dict(mode="clip"), "mode"), (dict(high=0.0), "high"), (dict(low=-1.0), "low"),
    (dict(high=math.inf), "high"), (dict(cap=2.0), "cap"),
    (dict(low=0.5), "low = 0.5 needs mode mask, because mode truncate has no lower limit; set mode to mask or low to"),
    (dict(mode="mask", low=2.0), r"low = 2\.0 must be below high = 2\.0"),
])
def test_bad_values_are_named(keys, message):
    with pytest.raises(ValidationError, match=message):
        RolloutCorrection(**keys)


def test_only_the_token_level_may_be_cut_anywhere():
    assert [RolloutCorrection(level=level).whole_sequences for level in ("token", "sequence", "geometric")] == [
        False, True, True]
