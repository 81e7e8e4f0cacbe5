"""Metric arithmetic, timers, files and the log line."""
import json
import math
import time

import numpy as np
import pytest

from frpo.errors import CheckpointError
from frpo.report.curve import draw_reward_curve, read_metrics
from frpo.telemetry.intervals import mean_interval, t_quantile
from frpo.telemetry.jsonl import JsonlFile, read_rows
from frpo.telemetry.sums import MetricSums
from frpo.telemetry.timer import PhaseTimer

PARTS = [("a", 1.0, 2.0, "mean"), ("b", 3.0, 1.0, "max"), ("c", 5.0, 1.0, "sum"), ("a", 8.0, 1.0, "mean"),
         ("b", -2.0, 1.0, "max"), ("c", 0.25, 4.0, "sum")]
BY_HAND = {"a": 3.0, "b": 3.0, "c": 5.25}


def sums(parts):
    metrics = MetricSums()
    for part in parts:
        metrics.add(*part)
    return metrics


@pytest.mark.parametrize("cut", range(len(PARTS) + 1))
def test_parts_merged_in_any_way_equal_one_pass(cut):
    merged = sums(PARTS[cut:])
    merged.update(sums(PARTS[:cut]))
    assert merged.result() == BY_HAND


def test_a_mapping_of_tensors_and_numpy_numbers_counts_as_numbers():
    metrics = MetricSums()
    metrics.update({"a": (np.float32(1), np.int64(4), "mean")})
    assert metrics.result() == {"a": 0.25} and type(metrics.result()["a"]) is float


def test_a_mean_over_nothing_is_left_out():
    assert sums([("a", 0.0, 0.0, "mean"), ("b", 0.0, 0.0, "sum")]).result() == {"b": 0.0}


@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.nan)])
def test_a_nan_is_never_hidden_by_a_maximum(values):
    assert math.isnan(sums([("b", value, 1.0, "max") for value in values]).result()["b"])


@pytest.mark.parametrize("second", ["max", "median"])
def test_one_metric_has_one_known_reduction(second):
    with pytest.raises(ValueError, match=f"metric a: reduction '{second}', was"):
        sums([("a", 1.0, 1.0, "mean"), ("a", 1.0, 1.0, second)])
    with pytest.raises(ValueError, match="allowed"):
        sums([("a", 1.0, 1.0, "median")])


def test_a_timer_adds_up_and_knows_the_running_phase():
    timer = PhaseTimer()
    for _ in range(2):
        with timer.phase("learn"):
            assert timer.current == "learn"
            with timer.phase("inner"):
                assert timer.current == "inner"
            assert timer.current == "learn"
            time.sleep(0.02)
    assert timer.current is None
    found = timer.collect()
    assert set(found) == {"time/learn", "time/inner"} and 0.04 <= found["time/learn"] < 2
    assert timer.collect() == {}


def test_a_phase_that_fails_is_measured_too():
    timer = PhaseTimer()
    with pytest.raises(KeyError), timer.phase("learn"):
        raise KeyError
    assert set(timer.collect()) == {"time/learn"} and timer.current is None


# --- files ------------------------------------------------------------------------------------------------------------

def test_a_file_is_cut_back_to_an_offset_and_goes_on_there(tmp_path):
    file = JsonlFile(tmp_path / "new" / "a.jsonl")
    file.append({"step": 1, "text": "größer"})
    offset = file.offset()
    assert offset == (tmp_path / "new" / "a.jsonl").stat().st_size
    file.append({"step": 2})
    file.truncate(offset)
    file.append({"step": 3})
    file.close()
    again = JsonlFile(tmp_path / "new" / "a.jsonl")
    again.append({"step": 4})
    assert [row["step"] for row in read_metrics(again.path)] == [1, 3, 4]
    again.truncate(0)
    assert again.offset() == 0 and read_metrics(again.path) == []


@pytest.mark.parametrize("text, steps", [
    ("", []), ('{"step": 1}\n', [1]), ('{"step": 1}\n{"step": 2}', [1, 2]), ('{"step": 1}\n{"step"', [1])])
def test_a_line_that_is_being_written_is_not_read(tmp_path, text, steps):
    (tmp_path / "a.jsonl").write_text(text)
    assert [row["step"] for row in read_rows(tmp_path / "a.jsonl")] == steps


def test_a_torn_line_within_a_file_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"step"\n{"step": 2}\n')
    with pytest.raises(ValueError, match="Expecting ':' delimiter: line 1 column 8"):
        read_rows(tmp_path / "a.jsonl")


def test_each_line_is_on_disk_at_once(tmp_path):
    file = JsonlFile(tmp_path / "a.jsonl")
    file.append({"a": 1})
    assert (tmp_path / "a.jsonl").read_text() == '{"a": 1}\n'


def test_a_file_shorter_than_the_checkpoint_remembers_is_an_error_and_stays(tmp_path):
    file = JsonlFile(tmp_path / "a.jsonl")
    file.append({"a": 1})
    with pytest.raises(CheckpointError, match=r"a.jsonl has 9 bytes, but had 10 at this checkpoint: .*; resume from"):
        file.truncate(10)
    assert (tmp_path / "a.jsonl").read_text() == '{"a": 1}\n'


def test_lines_are_strict_json_and_what_is_not_finite_reads_as_nan(tmp_path):
    file = JsonlFile(tmp_path / "a.jsonl")
    file.append({"lam": math.inf, "worst": -math.inf, "gap": np.float64("nan"), "x": 1.5, "n": 2,
                 "rows": [{"logprobs": (0.5, math.nan)}]})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    row = json.loads(file.path.read_text(), parse_constant=refuse)
    assert row == {"lam": None, "worst": None, "gap": None, "x": 1.5, "n": 2, "rows": [{"logprobs": [0.5, None]}]}
    metrics, = read_metrics(file.path)
    assert math.isnan(metrics["lam"]) and metrics["x"] == 1.5


def test_a_reward_curve_survives_steps_without_a_number(tmp_path):
    file = JsonlFile(tmp_path / "a.jsonl")
    for step, reward in enumerate([0.1, math.nan, 0.3]):
        file.append({"step": step, "reward/mean": reward, "eval/reward": reward, "eval/interval": math.nan})
    picture = draw_reward_curve({"run": file.path}, tmp_path / "reward.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


# --- the interval -----------------------------------------------------------------------------------------------------

def test_an_interval_by_hand():
    """1, 2, 3: variance 1 over n - 1, so 4.303 (Student's t) / sqrt 3; NaN entries do not count."""
    mean, half = mean_interval([1.0, math.nan, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert mean_interval(iter([4.0, 4.0])) == (4.0, 0.0)


def test_one_value_has_no_interval_and_none_no_mean():
    assert mean_interval([4.0])[0] == 4 and math.isnan(mean_interval([4.0])[1])
    assert all(map(math.isnan, mean_interval([math.nan])))


@pytest.mark.parametrize("degrees, published", [(1, 12.706), (2, 4.303), (10, 2.228), (11, 2.201), (20, 2.086),
                                                (30, 2.042), (60, 2.000), (120, 1.980), (10**6, 1.960)])
def test_students_t(degrees, published):
    assert t_quantile(degrees) == pytest.approx(published, abs=6e-4)
