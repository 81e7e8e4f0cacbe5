"""What the stages of a matrix say together, from files written by hand: numbers, warnings, tables, the page."""
from __future__ import annotations

import json
import re

import numpy as np
import pytest
import yaml
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection, PathCollection
from plotly.offline import get_plotlyjs

from frpo.commands.report import run_report
from frpo.config.loader import load_recipe
from frpo.config.retention import RetentionRecipe
from frpo.downstream.archive import RECIPE
from frpo.downstream.command import show, write_report
from frpo.downstream.curves import differences, kept
from frpo.downstream.plan import make_plan
from frpo.downstream.reading import collect
from frpo.downstream.report import durations, section_of, sentences
from frpo.downstream.tables import all_tables, fork_table, frontier_table, pair_table
from frpo.errors import ConfigError
from frpo.report.page import Section, TableText, write_page

KL = (0.0, 0.5, 1.5)
"""Of every fork but those of `short`, after 0, 10 and 30 updates."""


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def matrix(tmp_path, **changes):
    """Three policies, two seeds. What `good` keeps is that of `plain` and .1, .3 more by seed; `short` stays near."""
    policy = {"recipe": "lab_policy", "overrides": ["model.path=x"]}
    path = tmp_path / "run" / RECIPE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({
        "run": {"name": "<by hand>", "dir": str(tmp_path / "run")}, "seeds": [0, 1],
        "policies": {"plain": policy, "good": policy, "short": policy},
        "downstream": {"sft": {"recipe": "lab_downstream_sft"}}, "measure": {"kept": policy, "max_kl": 1.0},
        "certificate": {"samples": 4, "lambdas": [1.0]}, "compare": [["good", "plain"]],
        "controls": [["short", "plain"]], **changes}), encoding="utf-8")
    plan = make_plan(load_recipe(path, (), RetentionRecipe))
    for seed in plan.seeds:
        for name, stage in seed.policies.items():
            spent = {"plain": 0.8, "good": 0.82, "short": 0.5}[name]
            write(stage.run_dir / "metrics.jsonl", [{"step": 0}, {"step": 3, "eval/kl": spent, "eval/reward": 0.9}])
            stage.finish(steps=3, seconds=60.0)
            rewards_PN = np.full((3, 4), 0.9)
            np.savez(stage.run_dir / "certificate.npz", rewards_PN=rewards_PN)
        for fork in seed.forks:
            more = {"plain": 0.0, "good": (0.1, 0.3)[seed.seed], "short": 0.0}[fork.policy]
            kls = KL if fork.policy != "short" else (0.0, 0.1, 0.2)
            write(fork.run_dir / "metrics.jsonl", [
                {"step": step, "kept/kl": kl, "kept/reward": reward + more * (step > 0), "kept/decile": reward / 2,
                 "kept/interval": 0.05, "utility/reward": step / 30, "time/push": 2.5}
                for step, kl, reward in zip((0, 10, 30), kls, (0.9, 0.6, 0.4))])
            fork.finish(steps=30, seconds=30.0)
        (seed.folder / "heldout.json").write_text(json.dumps(
            {"heldout": 8, "uids": [], "overlap": {"plain": 0, "good": seed.seed}}), encoding="utf-8")
    write(tmp_path / "run" / "starts.jsonl", [{"seconds": 12.5}])
    return plan


def test_numbers_by_hand(tmp_path):
    found = collect(matrix(tmp_path))
    plain = found.summaries["plain", "sft", 0]
    assert plain["over updates"] == pytest.approx((0.75 * 10 + 0.5 * 20) / 30)
    assert (plain["at KL 0.5"], plain["at KL 1"], plain["end KL"]) == pytest.approx((0.6, 0.5, 1.5))
    assert plain["over KL"] == pytest.approx((0.75 + 0.55) / 2, abs=2e-3) and plain["utility"] == 1.0
    difference = found.compared(("good", "plain"), "sft", "end")
    assert (difference.mean, difference.half_width) == pytest.approx((0.2, 1.2706)) and difference.positive == 2
    assert found.value("good", "eval/kl") == 0.82 and found.value("good", "sft/end") == pytest.approx(0.6)
    assert found.reward == "kept/reward" and not found.exact


def test_points_below_a_certificate_are_counted(tmp_path):
    """B(kappa) = .9 - kappa: .4 at 1.5 nats lies above, and so do all; with a bolder policy those at .5 lie below."""
    plan = matrix(tmp_path)
    assert collect(plan).certified["plain", 0].slack == pytest.approx([0.0, 0.2, 1.0])
    bold = np.full((3, 4), 1.05)
    np.savez(plan.seeds[0].policies["plain"].run_dir / "certificate.npz", rewards_PN=bold)
    found = collect(plan).certified["plain", 0]  # .9 < 1.05 by more than the interval of .05; .6 > .55
    assert (found.violations, found.clear_violations) == (1, 1)
    np.savez(plan.seeds[0].policies["plain"].run_dir / "certificate.npz", rewards_PN=np.full((3, 4), 0.94))
    found = collect(plan).certified["plain", 0]
    assert (found.violations, found.clear_violations) == (1, 0)


def test_a_reader_is_warned(tmp_path):
    plan = matrix(tmp_path)
    lost, _, failed = plan.seeds[1].forks
    (lost.run_dir / "done.json").unlink()
    (failed.run_dir / "done.json").unlink()
    failed.fail("out of luck")
    told = "\n".join(collect(plan).warnings)
    for text in ("2 seeds are too few for a reliable interval",
                 "short and plain are not at the same KL to their reference (-0.30 of 0.80 nats)",
                 "sft: forks that stay within 1 nats have no mean over KL: short (1 of 1)",
                 "seed 1: good was trained on 1 of 8",
                 "short, seed 1, sft failed: out of luck", "good/sft: seed(s) 1 missing"):
        assert text in told
    assert "good and plain" not in told and "trained on 0" not in told


@pytest.mark.parametrize("bounds, chosen", [({}, "good"), ({"eval/kl": [None, 0.81]}, "plain"),
                                            ({"eval/kl": [None, 0.6]}, None), ({"nothing/known": [0.0, 1.0]}, None)])
def test_the_best_under_bounds(tmp_path, bounds, chosen):
    found = collect(matrix(tmp_path, choose={"measure": "sft/over KL", "bounds": bounds}))
    assert found.chosen == chosen
    told = next(line for line in sentences(found) if "sft/over KL" in line)
    assert told.startswith("Largest" if chosen else "No policy")


def test_sentences_say_what_was_measured_whichever_way(tmp_path):
    found = collect(matrix(tmp_path))
    told = "\n".join(sentences(found))
    assert "Forks of good against plain through sft: at the same KL no difference beyond noise" in told
    assert "4 of 18 measured points lie below the certificate of their policy, 4 of them by more" in told
    assert "minutes" not in told, "durations stand at the end of the page"
    assert durations(found) == "12 stages took 9.0 minutes; a start of engines 12 s; a push of weights 2.50 s"
    assert section_of(found, tmp_path / "page").shown == {"Durations": durations(found)}


def far_apart(tmp_path, **changes):
    """Forks of all policies at 0, 68, 26 and 75 nats after 0, 8, 16 and 24 updates."""
    plan = matrix(tmp_path, measure={"kept": {"recipe": "lab_policy"}, "at": [8, 16]}, seeds=[0], **changes)
    for fork in plan.seeds[0].forks:
        write(fork.run_dir / "metrics.jsonl", [
            {"step": step, "kept/kl": kl, "kept/reward": reward, "kept/decile": reward / 2, "kept/interval": 0.05}
            for step, kl, reward in ((0, 0.0, 0.94), (8, 68.0, 0.0), (16, 26.0, 0.4), (24, 75.0, 0.02))])
    return plan


def test_between_probes_far_apart_in_kl_nothing_is_told_and_it_is_said(tmp_path, capsys):
    found = collect(far_apart(tmp_path, choose={"measure": "sft/over KL"}))
    along_kl = ("over KL", "decile over KL", "at KL 0.5", "at KL 1", "at KL 2")
    for table, name in ((fork_table(found, "through sft"), "plain"), (pair_table(found, "sft"), "good - plain")):
        row = next(dict(zip(table.columns, row)) for row in table.rows if row[0] == name)
        assert [row[measure] for measure in along_kl] == ["-"] * 5 and row["over updates"] != "-"
    told = sentences(found)
    assert ("Forks of good against plain through sft: at the same KL they cannot be compared: no seed has a mean over "
            "KL for both; per update the reward differs by +0.000 (one seed).") in told
    assert "No policy has a sft/over KL." in told
    warned = "\n".join(found.warnings)
    assert ("plain through sft: neighbouring probes are too far apart in KL; values between them are left blank: 0 to "
            "68 nats (seed 0, updates 0 to 8)") in warned
    assert ("to fill these gaps leave measure.at out, so that probes follow the KL, or set measure.at to [1, 2, 3, 4, "
            f"6, 8, 16]; to measure a finished fork again, move its folder {tmp_path}/run/seedN/forks/") in warned
    assert "stay within" not in warned and "consecutive" not in warned
    write_report(found)
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert {fork["summary"][name] for fork in results["forks"] for name in along_kl} == {None}
    assert [fork["kl_gaps"] for fork in results["forks"]] == [[[0.0, 68.0]]] * 3
    assert all(each["mean"] is None for each in results["compared"] if each["measure"] in along_kl)


def points(axis):
    """Of each scatter its places."""
    return [np.asarray(each.get_offsets()).round(6).tolist() for each in axis.collections
            if isinstance(each, PathCollection)]


def rewritten(plan, seeds, *probes):
    """Other probes of all forks of these seeds: (update, KL, reward), None where it was not finite."""
    for fork in (fork for seed in plan.seeds if seed.seed in seeds for fork in seed.forks):
        write(fork.run_dir / "metrics.jsonl", [
            {"step": step, "kept/kl": kl, "kept/reward": reward, "kept/decile": reward, "kept/interval": 0.05,
             "utility/reward": reward} for step, kl, reward in probes])
    return plan


def test_a_probe_without_a_kl_or_a_reward_is_told_and_ends_no_report(tmp_path):
    plan = rewritten(matrix(tmp_path), [0], (0, None, 0.9), (10, None, 0.6), (30, None, 0.4))
    found = collect(rewritten(plan, [1], (0, 0.0, 0.9), (10, 0.5, None), (30, 1.0, 0.4)))
    assert write_report(found).is_file()
    told = ("plain through sft: some probes have no KL or no reward; they are left out along the KL, and without a "
            "reward there is no mean over updates: seed 0, updates 10, 30, seed 1, updates 10")
    assert told in found.warnings and not any("forks that stay within" in each for each in found.warnings)
    table = fork_table(found, "through sft")
    row, = (dict(zip(table.columns, each)) for each in table.rows if each[0] == "plain")
    assert (row["over updates"], row["at KL 1"], row["end"]) == ("0.583 (1 of 2)", "0.400 (1 of 2)", "0.400 ± 0.000")
    assert len(found.certified["plain", 0].points) == 0 and len(found.certified["plain", 1].points) == 2
    everything = rewritten(plan, [0, 1], *((step, None, None) for step in (0, 10, 30)))
    assert write_report(collect(everything)).is_file()


def test_along_the_kl_policies_are_compared_though_a_mean_over_updates_is_missing(tmp_path):
    plan = rewritten(matrix(tmp_path), [0, 1], (0, 0.0, 0.9), (10, 0.5, None), (20, 0.5, 0.6), (30, 1.0, 0.4))
    found = collect(plan)
    assert sentences(found)[0].startswith("Forks of good against plain through sft: at the same KL no difference")
    assert "per update they cannot be compared: no seed has a mean over updates for both" in sentences(found)[0]


def test_a_finished_fork_whose_metrics_are_lost_is_told(tmp_path):
    plan = matrix(tmp_path)
    lost, = (fork for fork in plan.seeds[1].forks if fork.policy == "plain")
    (lost.run_dir / "metrics.jsonl").unlink()
    found = collect(plan)
    assert any(each.startswith("plain/sft: seed(s) 1 finished, but their metrics.jsonl holds no probe; move their")
               for each in found.warnings)
    assert set(found.forks("plain", "sft")) == {0} and set(found.forks("good", "sft")) == {0, 1}


def test_a_fork_without_a_path_counts_as_a_seed_without_a_value(tmp_path):
    found = collect(rewritten(matrix(tmp_path), [1], (0, 0.0, 0.9), (30, 1.0, 0.4)))
    table = fork_table(found, "through sft")
    row, = (dict(zip(table.columns, each)) for each in table.rows if each[0] == "plain")
    assert row["over updates"] == "0.583 (1 of 2)" and "of" not in row["end"]


def test_pictures_show_probes_as_points_and_no_line_between_those_far_apart(tmp_path):
    found = collect(far_apart(tmp_path))
    updates, kl, _, lower = kept(found, "through sft").axes
    assert points(updates)[0] == [[0, 0.94], [8, 0.0], [16, 0.4], [24, 0.02]]
    assert points(kl)[0] == [[0, 0.94], [68, 0.0], [26, 0.4], [75, 0.02]], "the one that came back too"
    line = kl.lines[0]
    drawn = line.get_xdata()[np.isfinite(line.get_ydata())]
    assert drawn[0] == 0 and (drawn[1:] >= 68).all() and len(drawn) > 10
    intervals, = [each.get_segments() for each in kl.collections if isinstance(each, LineCollection)][:1]
    assert np.ptp(intervals[0][:, 1]) == pytest.approx(2 * 0.05) and len(intervals) == 4, "of one seed's prompts"
    assert lower.get_xlabel() == "KL from the policy, nats a sequence" and kl.get_xlim()[1] > 75
    assert -0.2 < kl.get_ylim()[0] < 0 and 0.94 < kl.get_ylim()[1] < 1.2
    updates, kl = differences(found, "sft").axes
    assert points(updates)[0] == [[0, 0], [8, 0], [16, 0], [24, 0]] and points(kl)[0] == [[0, 0], [68, 0], [75, 0]]
    plt.close("all")


def test_a_picture_ends_at_twice_the_kl_of_the_mean_and_counts_what_lies_beyond(tmp_path):
    """max_kl is 1: of the probes at 0, .5, 1.5 (twice) and 0, .1, 0.2 none lies beyond 2 nats; then one does."""
    plan = matrix(tmp_path, seeds=[0])
    assert kept(collect(plan), "through sft").axes[1].get_xlim()[1] == pytest.approx(1.02 * 1.5)
    metrics = plan.seeds[0].forks[0].run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    write(metrics, [*rows, {**rows[-1], "step": 40, "kept/kl": 2.5, "kept/reward": -7.0}])
    axis = kept(collect(plan), "through sft").axes[3]
    assert axis.get_xlabel() == "KL from the policy, nats a sequence (1 of 10 probes lie beyond)"
    assert axis.get_xlim()[1] == pytest.approx(1.02 * 1.5)
    assert kept(collect(plan), "through sft").axes[1].get_ylim()[0] > 0, "what is not shown takes no room"
    plt.close("all")


def test_without_a_choice_of_updates_those_that_are_missing_are_named(tmp_path):
    """The gap from .5 to 1.8 nats at updates 10 and 30 is filled half-way; between 1 and 2 there is no update."""
    plan = matrix(tmp_path)
    probes = {"plain": {0: 0.0, 10: 0.5, 30: 1.8}, "good": {0: 0.0, 1: 0.3, 2: 2.0},
              "short": {0: 0.0, 15: 0.2, 30: 0.4}}
    for fork in plan.seeds[0].forks:
        write(fork.run_dir / "metrics.jsonl", [
            {"step": step, "kept/kl": kl, "kept/reward": 0.5, "kept/decile": 0.5, "kept/interval": 0.05}
            for step, kl in probes[fork.policy].items()])
    found = collect(plan)
    assert found.common_seeds(("good", "plain"), "sft") == [0, 1]
    warned = "\n".join(found.warnings)
    for policy, where in (("plain", "0.5 to 1.8 nats (seed 0, updates 10 to 30)"),
                          ("good", "0.3 to 2 nats (seed 0, updates 1 to 2)")):
        assert (f"{policy} through sft: neighbouring probes are too far apart in KL; values between them are left "
                f"blank: {where}\n") in warned
    assert "to fill these gaps set measure.at to [0, 1, 2, 10, 15, 17, 30]; to measure" in warned
    assert "no probe fits between two consecutive updates; to fill such a gap, lower learner.lr" in warned
    assert "sft: forks that stay within 1 nats have no mean over KL: short (2 of 2)" in warned
    row = next(dict(zip(table.columns, row)) for table in [fork_table(found, "through sft")]
               for row in table.rows if row[0] == "plain")
    assert (row["over KL"], row["at KL 1"], row["at KL 0.5"]) == ("0.650 (1 of 2)", "0.500 (1 of 2)",
                                                                  "0.550 ± 0.635")
    row = next(row for row in frontier_table(found).rows if row[0] == "plain")
    assert row[-1] == "0.650 (1 of 2)"
    assert "at the same KL the reward differs by +0.225 (one seed; 1 of 2 seeds have no value)" in sentences(found)[0]


def test_what_a_fork_has_kept_stands_before_and_after_with_the_difference(tmp_path):
    """Of two seeds: .4 and .4 at the end of `plain`, .5 and .7 at that of `good`, all begin at .9."""
    table = fork_table(collect(matrix(tmp_path)), "through sft")
    rows = {row[0]: dict(zip(table.columns, row)) for row in table.rows}
    assert list(rows["good"].values())[1:5] == ["30", "0.900 ± 0.000", "0.600 ± 1.271", "-0.300 ± 1.271"]
    assert list(table.columns[:5]) == ["", "updates", "start", "end", "end - start"]
    assert "mean over seeds ± 95 %" in table.note and "(1 of 3)" not in table.note


def test_of_one_seed_the_interval_is_that_of_its_samples_and_a_difference_has_none(tmp_path):
    found = collect(matrix(tmp_path, seeds=[0]))
    table = fork_table(found, "through sft")
    row = next(dict(zip(table.columns, row)) for row in table.rows if row[0] == "good")
    assert (row["start"], row["end"], row["end - start"], row["over updates"]) == (
        "0.900 ± 0.050", "0.500 ± 0.050", "-0.400 ± 0.071", "0.667")
    assert "one seed ± 95 % interval over its held-out prompts" in table.note and "mean over seeds" not in table.note
    pairs = pair_table(found, "sft")
    assert pairs.title == "Differences through sft, one seed"
    assert pairs.note.startswith("one seed: no interval, any difference may be chance; -: no value")
    figure = differences(found, "sft")
    assert figure.get_suptitle() == "one seed: no interval, any difference may be chance"
    assert "one seed: intervals are over its held-out prompts" in found.warnings[0]
    plt.close("all")


def test_error_bars_lie_within_the_picture(tmp_path):
    plan = matrix(tmp_path, seeds=[0])
    for fork in plan.seeds[0].forks:
        write(fork.run_dir / "metrics.jsonl", [
            {"step": step, "kept/kl": step / 10, "kept/reward": 0.5 + step / 100, "kept/decile": 0.1,
             "kept/interval": 0.3} for step in (0, 4, 8)])
    axis = kept(collect(plan), "through sft").axes[0]
    assert axis.get_ylim()[0] < 0.2 and axis.get_ylim()[1] > 0.88
    plt.close("all")


def test_the_table_of_pairs_marks_what_leaves_zero_out(tmp_path):
    table = pair_table(collect(matrix(tmp_path)), "sft")
    rows = {row[0]: dict(zip(table.columns, row)) for row in table.rows}
    assert rows["good - plain"]["end"] == "+0.200 ± 1.271 [2/2]"
    assert rows["short - plain (control)"]["KL to reference"] == "-0.300 ± 0.000* [0/2]"
    assert rows["short - plain (control)"]["end"] == "+0.000 ± 0.000 [0/2]"


def test_the_page_needs_nothing_else(tmp_path, capsys):
    found = collect(matrix(tmp_path))
    page = write_report(found).read_text(encoding="utf-8")
    assert "&lt;by hand&gt;" in page and "<by hand>" not in page
    own = page.replace(get_plotlyjs(), "")
    assert not re.findall(r'(?:src|href)="(?!data:)', own) and own.count("<img") == 5
    tables = all_tables(found)
    assert all(table.title.replace("'", "&#39;") in page for table in tables) and len(tables) == 6
    show(tables)
    assert "good - plain" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    short = next(fork for fork in results["forks"] if fork["policy"] == "short")
    assert short["summary"]["over KL"] is None and short["kl"] == [0.0, 0.1, 0.2]


def test_nothing_measured_is_an_error(tmp_path):
    plan = matrix(tmp_path)
    for path in (tmp_path / "run").rglob("done.json"):
        path.unlink()
    with pytest.raises(ConfigError, match="no finished stage; run"):
        collect(plan)


def test_a_report_about_other_folders(tmp_path, capsys):
    matrix(tmp_path)
    write(tmp_path / "training" / "metrics.jsonl", [{"step": 0, "eval/reward": 0.1, "eval/interval": 0.0},
                                                    {"step": 5, "reward/mean": 0.2, "eval/reward": 0.3,
                                                     "eval/interval": None}])
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "tables.txt").write_text("a < b", encoding="utf-8")
    with pytest.raises(ConfigError, match="bench' is not a run: it holds no retention.yaml, no metrics.jsonl and no p"):
        run_report([str(tmp_path / "bench")], None)
    assert not (tmp_path / "bench" / "report.html").exists(), "a text alone is data"
    (tmp_path / "bench" / "curve.png").write_bytes(b"drawn")
    page = tmp_path / "page.html"
    folders = [str(tmp_path / name) for name in ("run", "training", "bench")]
    assert run_report(folders, str(page)) == 0
    text = page.read_text(encoding="utf-8")
    assert "<pre>a &lt; b</pre>" in text and "<td>eval/reward</td><td>0.1</td><td>0.3</td>" in text
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "holds no retention.yaml, no metrics.jsonl"), ("none", "is not a folder")):
        with pytest.raises(ConfigError, match=message):
            run_report([str(tmp_path / name)], None)


def test_a_page_escapes_what_it_is_told(tmp_path):
    table = TableText(title="<t>", note="&", columns=("<c>",), rows=(("<script>",),))
    path = write_page("<p>", [Section(title="s", text=("<b>",), tables=(table,))], tmp_path / "new" / "p.html")
    body = path.read_text(encoding="utf-8").split("<body>")[1]
    assert "<script>" not in body and "<b>" not in body and "&lt;c&gt;" in body
