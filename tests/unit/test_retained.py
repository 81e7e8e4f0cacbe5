"""What a fork has kept, along updates and along KL, from paths that can be followed by hand."""
from __future__ import annotations

import math

import numpy as np
import pytest

from frpo.downstream.kl_spacing import Gap
from frpo.downstream.retained import paired, read_path, summary

ROWS = [{"step": 0, "kl": 0.0, "r": 1.0, "d": 0.6, "eval/nll": 3.0}, {"step": 1, "nll": 2.0},
        {"step": 2, "kl": 0.5, "r": 0.8, "d": 0.2}, {"step": 4, "kl": 0.3, "r": 0.6, "d": 0.1},
        {"step": 8, "kl": 1.0, "r": 0.5, "d": 0.0}]
PATH = read_path(ROWS, "kl")


def test_probes_are_the_rows_with_the_kl():
    assert PATH.step_S.tolist() == [0, 2, 4, 8] and PATH.kl_S.tolist() == [0, 0.5, 0.3, 1.0]
    assert set(PATH.metrics) == {"step", "kl", "r", "d"}  # eval/nll is not in every probe
    assert read_path([{"step": 1}], "kl").step_S.size == 0


def test_probes_count_in_the_order_of_their_updates_and_once():
    """Of an update that is there twice the last counts, as in a file that two runs have written."""
    again = [ROWS[0], ROWS[4], {**ROWS[2], "r": 0.0, "kl": 9.0}, ROWS[3], ROWS[2]]
    found = read_path(again, "kl")
    assert found.step_S.tolist() == [0, 2, 4, 8] and found.kl_S.tolist() == PATH.kl_S.tolist()
    assert summary(found, "r", "d", 1.0) == summary(PATH, "r", "d", 1.0)


def test_a_kl_that_fell_again_is_left_out():
    """The line goes through 0, .5 and 1: the probe at .3 is of a fork that has come back, another policy."""
    assert PATH.along_kl("r", np.array([0.0, 0.25, 0.3, 0.5, 0.75, 1.0])) == pytest.approx(
        [1.0, 0.9, 0.88, 0.8, 0.65, 0.5])
    assert np.isnan(PATH.along_kl("r", np.array([-0.01, 1.01]))).all()
    assert [each.tolist() for each in PATH.first_to_reach("r")] == [[0, 2, 8], [0.0, 0.5, 1.0], [1.0, 0.8, 0.5]]


FAR = read_path([{"step": step, "kl": kl, "r": reward, "d": reward / 2} for step, kl, reward in (
    (0, 0.0, 0.94), (8, 68.0, 0.002), (16, 26.0, 0.5), (24, 75.0, 0.001))], "kl")


def test_nothing_is_told_between_probes_that_lie_far_apart():
    """0, 68, 26, 75 nats: from 0 to 68 nothing is known, and at 26 the fork had come back from 68."""
    told = FAR.along_kl("r", np.array([0.0, 0.5, 1.0, 26.0, 67.9, 68.0, 71.5, 75.0, 75.1]))
    assert told == pytest.approx([0.94, *[math.nan] * 4, 0.002, 0.0015, 0.001, math.nan], nan_ok=True)
    assert FAR.gaps("r", 2.0) == [Gap(updates=(0, 8), kl=(0.0, 68.0))] and FAR.largest_kl("r") == 75.0
    found = summary(FAR, "r", "d", max_kl=2.0)
    blank = {name for name, value in found.items() if math.isnan(value)}
    assert blank == {"over KL", "decile over KL", "at KL 0.5", "at KL 1", "at KL 2"}
    assert found["over updates"] == pytest.approx((0.471 + 0.251 + 0.2505) / 3) and found["end"] == 0.001


def test_a_mean_over_kl_needs_all_of_its_range_and_a_value_its_neighbours_only():
    """0 and .5 lie close, .5 and 1.8 do not, 1.8 and 4 do."""
    path = read_path([{"step": step, "kl": kl, "r": 1.0 - kl / 10, "d": 0.0}
                      for step, kl in enumerate((0.0, 0.5, 1.8, 4.0))], "kl")
    found = summary(path, "r", "d", max_kl=2.0)
    assert (found["at KL 0.5"], found["at KL 2"]) == pytest.approx((0.95, 0.8)) and math.isnan(found["at KL 1"])
    assert math.isnan(found["over KL"]) and summary(path, "r", "d", max_kl=0.5)["over KL"] == pytest.approx(0.975)
    assert [gap.kl for gap in path.gaps("r", 2.0)] == [(0.5, 1.8)] and path.gaps("r", 0.5) == []


def test_a_probe_without_the_metric_or_without_a_kl_is_not_on_the_line():
    rows = [{"step": step, "kl": kl, "r": reward} for step, kl, reward in (
        (0, 0.02, 1.0), (1, 0.3, math.nan), (2, math.nan, 0.1), (3, 0.6, 0.7))]
    path = read_path(rows, "kl")
    assert path.along_kl("r", np.array([0.0, 0.3, 0.6])) == pytest.approx([1.0, 0.85, 0.7]), "and update 0 is at 0 nats"
    alone = read_path(rows[:1], "kl").along_kl("r", np.array([0.0, 0.1]))
    assert alone == pytest.approx([1.0, math.nan], nan_ok=True)
    assert np.isnan(read_path(rows[1:2], "kl").along_kl("r", np.array([0.0, 0.3]))).all()


def test_summary_by_hand():
    found = summary(PATH, "r", "d", max_kl=1.0)
    assert found["start"] == 1.0 and found["end"] == 0.5 and found["end KL"] == 1.0 and found["end decile"] == 0.0
    assert found["over updates"] == pytest.approx((0.9 * 2 + 0.7 * 2 + 0.55 * 4) / 8)
    assert found["over KL"] == pytest.approx((0.9 + 0.65) / 2, abs=2e-3)  # trapezia over two halves
    assert found["at KL 0.5"] == pytest.approx(0.8) and found["at KL 1"] == pytest.approx(0.5)
    assert "at KL 2" not in found


def test_the_lowest_decile_is_summed_up_the_same_way():
    found = summary(PATH, "r", "d", max_kl=1.0)
    assert found["start decile"] == 0.6
    assert found["decile over updates"] == pytest.approx((0.4 * 2 + 0.15 * 2 + 0.05 * 4) / 8)
    assert found["decile over KL"] == pytest.approx((0.4 + 0.1) / 2, abs=2e-3)


def test_an_estimate_of_the_kl_below_zero_counts_as_zero():
    path = read_path([{"step": 0, "kl": -0.1, "r": 1.0}, {"step": 1, "kl": 0.1, "r": 0.5}], "kl")
    assert path.along_kl("r", np.array([0.0, 0.05])) == pytest.approx([1.0, 0.75])


def test_updates_are_counted_from_the_first_probe_and_a_path_has_one_between_its_ends():
    later = read_path([{**row, "step": row["step"] + 10} for row in ROWS], "kl")
    assert summary(later, "r", "d", 1.0)["over updates"] == pytest.approx(summary(PATH, "r", "d", 1.0)["over updates"])
    assert summary(read_path(ROWS[::len(ROWS) - 1], "kl"), "r", "d", 1.0).keys() == {
        "start", "start decile", "end", "end decile", "end - start", "end KL"}, "start and end alone are no path"


def test_what_was_not_reached_has_no_number():
    found = summary(PATH, "r", "d", max_kl=2.0)
    assert math.isnan(found["over KL"]) and math.isnan(found["at KL 2"]) and found["at KL 1"] == pytest.approx(0.5)


def test_seeds_are_compared_in_pairs():
    """Differences .1 and .3: mean .2, half-width 12.706 * .1 by Student's t with one degree of freedom."""
    found = paired({0: 0.6, 1: 0.9, 2: math.nan, 3: 1.0}, {0: 0.5, 1: 0.6, 2: 0.1})
    assert (found.mean, found.half_width) == pytest.approx((0.2, 1.2706))
    assert (found.positive, found.count, found.differs) == (2, 2, False)
    clear = paired({seed: 1.0 + seed / 1000 for seed in range(5)}, dict.fromkeys(range(5), 0.5))
    assert clear.differs and clear.positive == 5
    assert not paired({}, {}).differs and not paired({0: 1.0}, {0: 0.0}).differs
    assert paired({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6}).positive == 0
