"""What a person sees: the line of a step, its legend, phases, lines that break a silence, bars within bars."""
from __future__ import annotations

import math
import re
import time

import pytest

from frpo.telemetry import progress
from frpo.telemetry.progress import WIDTH, ProgressBar, activity, counted, duration, phase, say, step_line
from frpo.telemetry.timer import PhaseTimer

METRICS = {
    "reward/mean": 0.5, "reward/min": -1.0, "reward/max": 1.0, "reward/exact/mean": 0.25, "reward/exact/abstained": 0,
    "reward/format/mean": 1.0, "policy/kl_ref": 0.0123456, "policy/entropy": math.nan, "policy/version": 12.0,
    "time/generate": 1.234, "time/learn": 0.5, "time/tokens_per_second": 1234.5}


@pytest.fixture(autouse=True)
def nobody_speaks(monkeypatch):
    monkeypatch.setattr(progress, "_silence", progress._Silence())


def test_the_line_of_a_step():
    assert step_line(7, METRICS, 30, 125.0) == (
        "step  7/30 | reward 0.5  kl 0.0123  entropy nan | exact 0.25 format 1 | 1.7 s (generate 1.2) | 2 min left")


def test_a_single_reward_is_told_once_and_its_mean_is_no_component():
    one = {"reward/mean": 0.5, "reward/exact/mean": 0.5}
    assert step_line(1, one, 3) == "step 1/3 | reward 0.5"
    assert step_line(1, one | {"reward/mean/mean": 0.75}, 3) == "step 1/3 | reward 0.5 | exact 0.5 mean 0.75"


def test_parts_without_figures_leave_no_bars():
    assert step_line(0, {"eval/reward": 0.5, "time/evaluate": 20.0}, 5) == "step 0/5 | eval 0.5 | 20 s (evaluate 20)"
    assert step_line(0, {}, 100) == "step   0/100"


def test_a_long_line_loses_figures_from_the_end_and_keeps_what_matters():
    everything = {key: 0.12345 for _, key, _ in progress.FIGURES} | METRICS
    line = step_line(7, everything, 30, 600.0)
    assert line == ("step  7/30 | reward 0.5  eval 0.123  nll 0.123 | exact 0.25 format 1 | "
                    "1.7 s (generate 1.2) | 10 min left")
    assert len(line) <= WIDTH < len(line) + len("  eval nll 0.123")


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3000, "50 min"),
                                           (9000, "2.5 h")])
def test_a_duration_in_words(seconds, text):
    assert duration(seconds) == text


def test_every_name_of_a_line_is_explained_once(capsys):
    with ProgressBar(3, 0, "run") as bar:
        bar.step(0, {"eval/reward": 0.5})
        bar.step(1, {"reward/mean": 0.25, "policy/kl_ref": 0.5})
        bar.step(2, {"reward/mean": 0.5, "eval/reward": 0.75})
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["# eval: mean reward on held-out prompts", "step 0/3 | eval 0.5"]
    assert lines[2] == "# reward: mean of the step's completions; kl: KL to the reference, nats a token"
    assert [line.partition(" | ")[0] for line in lines[3:]] == ["step 1/3", "step 2/3"]
    assert re.fullmatch(r"step 1/3 \| reward 0.25  kl 0.5 \| \d s left", lines[3])


def test_time_is_left_at_the_pace_since_the_run_went_on(monkeypatch):
    with ProgressBar(10, 4, "run") as bar:
        assert bar.seconds_left(4) is None
        monkeypatch.setattr(progress.time, "monotonic", lambda: bar.started + 6.0)
        assert bar.seconds_left(6) == pytest.approx(3.0 * 4)


def test_a_phase_is_told_when_it_begins_with_the_seconds_since_the_command(monkeypatch, capsys):
    with phase("starting Ray"):
        assert re.fullmatch(r" *\d+\.\d s  starting Ray\n", capsys.readouterr().out)
    with ProgressBar(2, 0, "matrix") as bar, phase("starting Ray"):
        assert bar.progress.tasks[0].fields["note"] == "starting Ray"
        assert capsys.readouterr().out.endswith(" s  starting Ray\n"), "in a log file, where no bar is seen"
        monkeypatch.setattr(bar, "live", True)
        with phase("loading"):
            assert bar.progress.tasks[0].fields["note"] == "loading"
        assert "loading" not in capsys.readouterr().out, "on a terminal the bar says it"


def test_a_silence_is_broken_by_what_goes_on_less_and_less_often(monkeypatch, capsys):
    """Measured in units of a fifth of a second; a line of one's own starts it anew."""
    monkeypatch.setattr(progress, "SILENCE_S", 0.2)
    monkeypatch.setattr(progress, "LONGEST_SILENCE_S", 0.4)
    monkeypatch.setattr(progress, "POLL_S", 0.01)
    monkeypatch.setattr(progress, "_silence", progress._Silence())
    with phase("loading the learner"):
        counted("warm start", 50, 200)
        _until(capsys, lambda text: text.count("so far") == 2)
        say("heard")
        text = _until(capsys, lambda text: "so far" in text)
        assert re.search(r"s  loading the learner, \d s so far", text), "what was counted was before that line"
    with ProgressBar(7, 2, "lab") as outer, ProgressBar(30, 4, "frpo"), activity("learn"):
        assert outer.place == "lab 2/7"
        assert re.search(r"s  lab 2/7: frpo 4/30: learn, \d s so far", _until(capsys, lambda text: "so far" in text))


def _until(capsys, condition, limit=10.0):
    text, end = "", time.monotonic() + limit
    while not condition(text):
        assert time.monotonic() < end, text
        time.sleep(0.02)
        text += capsys.readouterr().out
    return text


def test_nothing_is_said_of_what_is_over(monkeypatch, capsys):
    with phase("starting Ray"):
        pass
    assert progress._silence.doing == []
    with pytest.raises(ZeroDivisionError), phase("failing"):
        raise ZeroDivisionError
    assert progress._silence.doing == []


def test_the_phase_of_a_timer_is_the_note_of_the_bar():
    timer = PhaseTimer()
    with ProgressBar(1, 0, "run") as bar:
        with timer.phase("learn"):
            assert bar.progress.tasks[0].fields["note"] == "learn"
        assert bar.progress.tasks[0].fields["note"] == ""


def test_a_bar_within_another_prints_nothing_and_is_gone_with_its_end(capsys):
    with ProgressBar(2, 0, "outer") as outer:
        with ProgressBar(3, 1, "inner") as inner:
            inner.log("step    1 | reward 0.5")
            inner.advance()
            shown = {task.description: (task.completed, task.fields["note"]) for task in outer.progress.tasks}
            assert shown == {"outer": (0, ""), "inner": (2, "step    1 | reward 0.5")}
        assert [task.description for task in outer.progress.tasks] == ["outer"]
        outer.log("a stage is done")
        with pytest.raises(ZeroDivisionError), ProgressBar(1, 0, "failing"):
            raise ZeroDivisionError
        assert len(outer.progress.tasks) == 1
    with ProgressBar(1, 0, "next") as bar:
        bar.log("heard again")
    assert capsys.readouterr().out == "a stage is done\nheard again\n"
