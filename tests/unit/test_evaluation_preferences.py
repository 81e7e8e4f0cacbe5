"""What is measured of a reward model's scores on held-out pairs, by hand; the picture of its calibration."""
from __future__ import annotations

import math

import numpy as np
import pytest

from frpo.evaluation.preferences import BINS, by_kind, calibration, measure
from frpo.report.calibration import draw_calibration
from frpo.telemetry.intervals import mean_interval
from frpo.types import Pair

LOG3 = math.log(3)


def pairs(*facts):
    return [Pair(uid="", origin="", first=(1,), second=(2,), **each) for each in facts]


PLAIN = pairs(*[{}] * 4)


def test_accuracy_counts_only_a_strictly_higher_score():
    """Right, wrong, equal, right: an equal pair is not ordered rightly."""
    found = measure(np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 1.0], [5.0, 0.0]]), PLAIN)
    assert (found["accuracy"], found["tied"], found["margin"]) == (0.5, 0.25, (1 - 3 + 0 + 5) / 4)
    assert found["interval"] == pytest.approx(3.182 * math.sqrt(1 / 3) / 2)  # sd of 1 0 0 1, t of 3 degrees
    assert found["score_mean"] == 13 / 8 and found["score_sd"] == pytest.approx(
        math.sqrt((4 + 1 + 0 + 9 + 1 + 1 + 25 + 0) / 8 - (13 / 8) ** 2))
    assert found["order_nll"] == pytest.approx(
        np.mean([-math.log(1 / (1 + math.exp(-gap))) for gap in (1, -3, 0, 5)]))
    assert "sign_accuracy" not in found


def test_pairs_without_a_preference_count_in_no_order():
    scores = np.array([[2.0, 1.0], [0.0, 9.0], [3.0, 1.0]])
    found = measure(scores, pairs({}, {"target": 0.5}, {}))
    assert (found["accuracy"], found["margin"], found["tied"]) == (1.0, 1.5, 0.0)
    assert found["score_mean"] == pytest.approx(16 / 6)
    assert measure(scores, pairs(*[{"target": 0.5}] * 3)).keys() == {"score_mean", "score_sd"}
    assert calibration(scores, pairs(*[{"target": 0.5}] * 3)) == []


def test_the_interval_is_students():
    right = [1.0] * 30 + [0.0] * 10
    scores = np.array([[each, 0.5] for each in right])
    found = measure(scores, pairs(*[{}] * 40))
    assert (found["accuracy"], found["interval"]) == mean_interval(right)
    assert math.isnan(measure(scores[:1], pairs({}))["interval"])


def test_the_side_of_zero_counts_where_a_flag_is_known():
    """Flags: harmful above, harmless below (right, right), unknown, harmful at 0 (wrong), harmless above (wrong)."""
    scores = np.array([[1.0, -2.0], [-3.0, 0.0], [4.0, 2.0]])
    found = measure(scores, pairs({"signs": (1, -1)}, {"signs": (0, 1)}, {"signs": (0, -1)}))
    assert found["sign_accuracy"] == 0.5


def test_calibration_by_hand():
    """Confidence 0.75 is sigmoid(log 3), whichever answer is higher; two of three right there. 0.5 for equal scores.

    Far differences are in the last bin.
    """
    scores = np.array([[LOG3, 0.0], [0.0, LOG3], [LOG3 + 1, 1.0], [7.0, 7.0], [40.0, 0.0], [900.0, -900.0]])
    given = pairs(*[{}] * 6)
    bins = calibration(scores, given)
    assert [count for *_, count in bins] == [1, 3, 2]
    assert [(confidence, right) for confidence, right, _ in bins] == [
        (0.5, 0.0), (pytest.approx(0.75), pytest.approx(2 / 3)), (pytest.approx(1.0), 1.0)]
    assert measure(scores, given)["calibration_error"] == pytest.approx((0.5 + 3 * (0.75 - 2 / 3) + 0.0) / 6)


def test_bins_have_equal_width_from_one_half_to_one():
    confidence = np.array([0.51, 0.549, 0.551, 0.649, 0.951, 0.999])
    gaps = np.log(confidence / (1 - confidence))
    bins = calibration(np.stack([gaps, 0 * gaps], 1), pairs(*[{}] * 6))
    assert [count for *_, count in bins] == [2, 1, 1, 2] and BINS == 10
    assert bins[0][0] == pytest.approx(0.5295) and bins[-1][0] == pytest.approx(0.975)


def test_true_probabilities_are_calibrated_and_doubled_ones_are_not():
    random = np.random.Generator(np.random.PCG64(0))
    gaps = random.normal(scale=2, size=20_000)
    right = random.random(20_000) < 1 / (1 + np.exp(-gaps))
    scores = np.where(right, gaps, -gaps)[:, None] * [0.5, -0.5]  # column 0: the answer that was preferred
    given = pairs(*[{}] * 20_000)
    assert measure(scores, given)["calibration_error"] < 0.015
    assert measure(2 * scores, given)["calibration_error"] > 0.05
    assert measure(2 * scores, given)["accuracy"] == measure(scores, given)["accuracy"]


def test_scores_by_kind():
    scores = np.array([[1.0, -2.0], [3.0, 4.0]])
    flagged = by_kind(scores, pairs({"signs": (1, -1)}, {"signs": (0, 1)}))
    assert {name: values.tolist() for name, values in flagged.items()} == {
        "harmful answers": [1.0, 4.0], "harmless answers": [-2.0]}
    plain = by_kind(scores, pairs({}, {}))
    assert {name: values.tolist() for name, values in plain.items()} == {
        "preferred answers": [1.0, 3.0], "other answers": [-2.0, 4.0]}


@pytest.mark.parametrize("given", [pairs({}, {}), pairs({"target": 0.5}, {"target": 0.5}),
                                   pairs({"signs": (1, 1)}, {"signs": (0, 1)})])
def test_the_picture_is_drawn(tmp_path, given):
    scores = np.array([[1.0, -2.0], [3.0, 4.0]])
    picture = draw_calibration(calibration(scores, given), by_kind(scores, given), tmp_path / "calibration.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
