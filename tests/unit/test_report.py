"""`frpo report` about folders that hold no matrix: a fine-tuning, only a picture, a run that has just begun."""
from __future__ import annotations

import json
import re

import numpy as np
import pytest
from matplotlib import pyplot as plt
from plotly.offline import get_plotlyjs

from frpo.commands.report import SIDE_BY_SIDE, run_report, section
from frpo.downstream.command import REPORT, show
from frpo.report.curve import draw_loss_curve, draw_reward_curve
from frpo.report.page import TableText
from frpo.report.runs import _draw_panel, answers_over_time, chart_runs, panels


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("draw, key", [(draw_reward_curve, "reward/mean"), (draw_loss_curve, "sft/nll")])
def test_a_curve_is_drawn_through_its_points(tmp_path, draw, key):
    """In the first colour of the cycle: a rising line has ink at the left below and at the right above."""
    write(tmp_path / "run" / "metrics.jsonl", [{"step": step, key: step / 4} for step in range(5)])
    picture = plt.imread(draw({"run": tmp_path / "run" / "metrics.jsonl"}, tmp_path / "curve.png"))
    red, green, blue = (picture[..., channel] for channel in range(3))
    inked = (blue > red + 0.2) & (blue > green)
    height, width = inked.shape
    inked[:, :width // 8] = inked[:height // 8] = False  # labels, legend
    left, right = np.flatnonzero(inked.any(axis=0))[[0, -1]]
    assert right - left > width / 2
    assert np.flatnonzero(inked[:, left]).mean() > 0.6 * height > 0.4 * height > np.flatnonzero(inked[:, right]).mean()


def test_folders_of_other_kinds(tmp_path):
    write(tmp_path / "tuned" / "metrics.jsonl", [{"step": 1, "sft/nll": 2.0, "eval/nll": 1.5},
                                                 {"step": 7, "sft/nll": 1.0, "eval/nll": None}])
    (tmp_path / "tuned" / "manifest.json").write_text('{"seed": 5}', encoding="utf-8")
    found = section(tmp_path / "tuned", tmp_path / "tuned")
    assert (found.title, found.text, found.folded) == ("tuned", ("7 steps.",), {"manifest.json": '{"seed": 5}'})
    assert found.tables[0].rows == (("eval/nll", "1.5", "-"),) and found.pictures["Training"].is_file()
    assert list(found.charts["Training"].panels) == ["cross-entropy, training, nats a token"], "one point is no curve"
    (tmp_path / "drawn").mkdir()
    (tmp_path / "tuned" / "curve.png").rename(tmp_path / "drawn" / "a<b.png")
    assert list(section(tmp_path / "drawn", tmp_path).pictures) == ["a<b"]
    write(tmp_path / "begun" / "metrics.jsonl", [])
    begun = section(tmp_path / "begun", tmp_path)
    assert begun.pictures == {} and begun.text == ()
    assert run_report([str(tmp_path / "drawn")], None) == 0
    page = (tmp_path / "drawn" / REPORT).read_text(encoding="utf-8")
    assert "<h1>drawn</h1>" in page and 'alt="a&lt;b"' in page and 'src="data:image/png;base64,iVBOR' in page
    run_report([str(tmp_path / "drawn"), str(tmp_path / "begun")], None)
    assert "<h1>2 runs</h1>" in (tmp_path / "drawn" / SIDE_BY_SIDE).read_text(encoding="utf-8")
    assert (tmp_path / "drawn" / REPORT).read_text(encoding="utf-8") == page, "its own page stays"


STEPS = [{"step": step, "reward/mean": 0.1 * step, "reward/a/mean": 0.2, "reward/b/mean": 0.3, "policy/kl_ref": 0.01,
          **({"eval/reward": 0.5, "eval/interval": 0.1} if step in (0, 4) else {})} for step in range(5)]


def test_several_trainings_stand_side_by_side(tmp_path):
    """Every measure of which one run has two points; a run that lacks it is not in that panel."""
    for name, rows in (("one", STEPS), ("two", [{key: value for key, value in row.items() if key != "policy/kl_ref"}
                                                for row in STEPS])):
        write(tmp_path / name / "metrics.jsonl", rows)
    write(tmp_path / "one" / "samples.jsonl", [
        {"step": step, "task": task, "prompt": "ask", "completion": f"said <{step}>", "reward": 0.5, "rewards": {}}
        for step in (0, 4) for task in ("eval", "kept")])
    run_report([str(tmp_path / "one"), str(tmp_path / "two")], None)
    page = (tmp_path / "one" / SIDE_BY_SIDE).read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    assert re.findall("<h2>(.*)</h2>", page) == ["Side by side", "one", "two"]
    both, _, two = (json.loads(text) for text in re.findall(
        r'<script type="application/json">(.*?)</script>', page, re.DOTALL))
    assert list(both["panels"]) == ["reward, training", "reward, held-out", "KL to the reference, nats a token",
                                    "reward a, training", "reward b, training"]
    curves = {title: [trace["name"] for trace in panel["data"]] for title, panel in both["panels"].items()}
    assert curves["reward, training"] == ["one", "one", "two", "two"]
    assert curves["KL to the reference, nats a token"] == ["one", "one"]
    styles = {(trace["line"]["color"], trace["line"]["dash"]) for trace in both["panels"]["reward, training"]["data"]
              if trace["mode"] == "lines"}
    assert len(styles) == 2 and len({color for color, _ in styles}) == len({dash for _, dash in styles}) == 2
    heldout = both["panels"]["reward, held-out"]["data"][1]
    assert heldout["x"] == [0, 4] and heldout["error_y"]["array"] == [0.1, 0.1]
    assert [row["completion"] for key in heldout["customdata"] for row in both["samples"][key]] == [
        "said <0>", "said <4>"]
    assert "said &lt;4&gt;\n[0.5]" in page and "<td>ask</td>" in page
    assert pictures(tmp_path) == [f"one/side_by_side_pictures/{name}.png" for name in (
        "1-one/curve", "2-two/curve", "side_by_side")] and two["samples"] == {}


def test_a_panel_of_the_kl_names_the_trainings_that_measured_none(tmp_path):
    """A fine-tuning's KL is one of tokens, so that it has a panel of its own and is missing from none."""
    with_kl = [{"step": step, "reward/mean": 0.1, "policy/kl_ref": 0.01, "eval/reward": 0.5, "eval/kl": 0.1 * step,
                "eval/kl_interval": 0.01} for step in range(3)]
    without = [{"step": step, "reward/mean": 0.1, "eval/reward": 0.5} for step in range(3)]
    tuned = [{"step": step, "sft/nll": 1.0, "eval/nll": 1.0, "eval/kl": 0.001} for step in range(3)]
    runs = {"held": with_kl, "fr-ee": without, "loose": without, "tuned": tuned}
    shown = chart_runs(runs, {}).panels
    for title, drawn, why in (
            ("KL to the reference, held-out, nats a sequence", {"held"},
             "not shown, because objective.kl_coef was 0, or<br>evaluate.temperature not 1: fr-ee, loose"),
            ("KL to the reference, nats a token", {"held"}, "not shown, because objective.kl_coef was 0: fr-ee, loose"),
            ("KL to the reference, held-out, nats a token", {"tuned"}, None),
            ("reward, held-out", {"held", "fr-ee", "loose"}, None)):
        assert {trace["name"] for trace in shown[title]["data"]} == drawn
        assert [note["text"] for note in shown[title]["layout"].get("annotations", [])] == ([why] if why else [])
    figure, axes = plt.subplots(1, 2)
    for axis, name in zip(axes, ("fr-ee", "held")):
        title = "KL to the reference, held-out, nats a sequence"
        _draw_panel(axis, title, panels(runs)[title], {"held": with_kl, name: runs[name]})
    assert [axis.get_xlabel() for axis in axes] == [
        "step\nnot shown, because objective.kl_coef was 0, or\nevaluate.temperature not 1: fr-ee", "step"]
    plt.close(figure)


def pictures(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def test_a_page_elsewhere_leaves_the_runs_as_they_are(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name / "metrics.jsonl", STEPS)
    before = sorted((tmp_path / "one").iterdir())
    run_report([str(tmp_path / "one"), str(tmp_path / "two")], str(tmp_path / "there" / "cmp.html"))
    assert sorted((tmp_path / "one").iterdir()) == before
    assert pictures(tmp_path) == [f"there/cmp_pictures/{name}.png" for name in (
        "1-one/curve", "2-two/curve", "side_by_side")]


def test_a_file_of_a_run_stands_for_its_folder(tmp_path):
    write(tmp_path / "one" / "metrics.jsonl", STEPS)
    run_report([str(tmp_path / "one" / "metrics.jsonl")], None)
    assert "<h1>one</h1>" in (tmp_path / "one" / REPORT).read_text(encoding="utf-8")


def test_what_was_said_cannot_break_out_of_the_page(tmp_path):
    write(tmp_path / "run" / "metrics.jsonl", STEPS)
    write(tmp_path / "run" / "samples.jsonl", [{"step": 0, "task": "eval", "prompt": "</script><b>", "completion": "x",
                                                "reward": 0.5, "rewards": {}}])
    run_report([str(tmp_path / "run")], None)
    page = (tmp_path / "run" / REPORT).read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    assert "</script><b>" not in page and "\\u003c/script>\\u003cb>" in page


def test_an_answer_that_no_reward_judged_is_told(tmp_path):
    write(tmp_path / "samples.jsonl", [{"step": 0, "task": "eval", "prompt": "ask", "completion": "said",
                                        "reward": None, "rewards": {"a": None}}])
    assert answers_over_time(tmp_path).rows == (("ask", "said\n[nan]"),)


def test_a_terminal_shows_what_looks_like_markup(capsys):
    show([TableText(title="[red]t", note="[/]", columns=("[b]a", "b"), rows=(("[i]x", "1"),))])
    out = capsys.readouterr().out
    assert all(text in out for text in ("[red]t", "[/]", "[b]a", "[i]x"))
