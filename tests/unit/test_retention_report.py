"""A wider matrix from files written by hand, with a model that exists and two regimes: records, tables, pictures, page.

Two policies through `sft`, one of them through `rl` too; three seeds; everything is enumerated beside the samples.
"""
from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from matplotlib import pyplot as plt
from matplotlib.collections import PathCollection
from matplotlib.container import BarContainer
from plotly.offline import get_plotlyjs

from frpo.config.loader import load_recipe
from frpo.config.retention import RetentionRecipe
from frpo.downstream.archive import RECIPE
from frpo.downstream.before import complete, missing, read_distance, write_distance
from frpo.downstream.charts import kept_charts
from frpo.downstream.command import show, write_report
from frpo.downstream.curves import differences, kept
from frpo.downstream.pictures import bars, certificates, frontier, spent
from frpo.downstream.plan import make_plan
from frpo.downstream.reading import collect
from frpo.downstream.report import section_of, sentences
from frpo.downstream.tables import (
    all_tables,
    certificate_table,
    fork_table,
    frontier_table,
    own_differences,
    own_table,
    policy_table,
    state_table,
)
from frpo.telemetry.intervals import mean_interval

ENDS = {("base", "sft"): 0.5, ("given", "sft"): 0.6, ("made", "sft"): 0.7, ("made", "rl"): 0.3}
"""Sampled reward at the end of a fork of seed 0; the next seeds have .01 more each."""
STEPS = (0, 10, 20)


UNKNOWN = ("given is given by path, so its KL to a reference is not known; set policies.given.reference to the "
           "policy that it was trained from")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def probes(fork, decile=0.2):
    end = ENDS[fork.policy, fork.regime] + 0.01 * fork.seed
    return [{"step": step, "kept/kl": kl, "kept/reward": reward, "kept/decile": 0.1, "kept/interval": 0.02,
             "exact/reward": reward / 2, "exact/decile": decile, "utility/reward": utility}
            for step, kl, reward, utility in zip(STEPS, (0.0, -0.1, 0.5), (0.9, 0.85, end), (0.0, 0.25, 0.5))]


def matrix(tmp_path, kl=0.8, **changes):
    policy = {"recipe": "lab_policy", "overrides": ["model.path=x"]}
    path = tmp_path / "wide" / RECIPE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({
        "run": {"name": "wide", "dir": str(tmp_path / "wide")}, "seeds": [0, 1, 2],
        "policies": {"base": {**policy, "fork": False}, "given": {"path": "models/$seed"},
                     "made": {**policy, "start": "base"}},
        "downstream": {"sft": {"recipe": "lab_downstream_sft"},
                       "rl": {"recipe": "lab_downstream_grpo", "policies": ["made"]}},
        "measure": {"kept": policy, "max_kl": 0.5}, "certificate": {"samples": 4, "lambdas": [1.0]},
        "compare": [["made", "given"]], **changes}, sort_keys=False), encoding="utf-8")
    plan = make_plan(load_recipe(path, (), RetentionRecipe))
    for seed in plan.seeds:
        for stage in seed.policies.values():
            write(stage.run_dir / "metrics.jsonl", [{"step": 2, "eval/kl": 9.0}, {"step": 3, "eval/kl": kl,
                                                     "eval/reward": 0.77}, {"step": 4, "reward/mean": 1.0}])
            stage.finish(steps=4, seconds=60.0)
        for name in plan.recipe.forked:
            folder = seed.folder / "policies" / name
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(folder / "certificate.npz", rewards_PN=np.full((3, 4), 0.9))
        for fork in seed.forks:
            write(fork.run_dir / "metrics.jsonl", probes(fork))
            fork.finish(steps=20, seconds=30.0)
    return plan


def cells(table):
    return {row[0]: dict(zip(table.columns, row)) for row in table.rows}


# --- the record -------------------------------------------------------------------------------------------------------

def test_regimes_and_policies_are_told_apart(tmp_path):
    found = collect(matrix(tmp_path))
    assert found.exact and found.by_seed("made", "sft", "end") == pytest.approx({0: 0.35, 1: 0.355, 2: 0.36})
    assert found.by_seed("made", "rl", "end") == pytest.approx({0: 0.15, 1: 0.155, 2: 0.16})
    assert found.value("made", "rl/end") == pytest.approx(0.155) and np.isnan(found.value("given", "rl/end"))
    assert [path.metrics["kept/reward"][-1] for path in found.forks("given", "sft").values()] == [0.6, 0.61, 0.62]
    assert found.forks("given", "rl") == {} and found.summaries["made", "rl", 1]["utility"] == 0.5


def test_what_is_known_of_a_policy_comes_from_its_forks_or_from_its_own_evaluation(tmp_path):
    found = collect(matrix(tmp_path))
    assert found.policies["made", 0] | {"kept/reward": 0.9, "exact/reward": 0.45, "eval/kl": 0.8} == (
        found.policies["made", 0])
    assert found.policies["given", 2]["kept/reward"] == 0.9 and "eval/kl" not in found.policies["given", 2]
    assert found.policies["base", 1] == {"step": 3, "eval/kl": 0.8, "eval/reward": 0.77, "kept/reward": 0.77}


def test_samples_are_told_unless_every_fork_was_enumerated(tmp_path):
    plan = matrix(tmp_path)
    fork = plan.seeds[2].forks[0]
    write(fork.run_dir / "metrics.jsonl", [{k: v for k, v in row.items() if k[:5] != "exact"} for row in probes(fork)])
    found = collect(plan)
    assert not found.exact and found.value("made", "rl/end") == pytest.approx(0.31)
    assert "sampled reward" in fork_table(found, "through sft").note


def test_a_kl_below_zero_counts_as_zero_and_a_point_on_the_bound_is_not_below_it(tmp_path):
    found = collect(matrix(tmp_path)).certified["given", 0]
    assert found.slack == pytest.approx([0.0, -0.05, 0.2]) and (found.violations, found.clear_violations) == (1, 1)
    plan = matrix(tmp_path)
    np.savez(plan.seeds[0].folder / "policies" / "given" / "certificate.npz", rewards_PN=np.full((3, 4), 0.9 + 1e-12))
    assert collect(plan).certified["given", 0].violations == 1


def test_without_finite_samples_there_is_no_certificate_and_without_forks_no_point(tmp_path):
    plan = matrix(tmp_path)
    np.savez(plan.seeds[0].folder / "policies" / "given" / "certificate.npz", rewards_PN=np.full((3, 4), np.nan))
    for seed in plan.seeds:
        for fork in seed.forks:
            if fork.policy == "made":
                (fork.run_dir / "done.json").unlink()
    found = collect(plan)
    assert set(found.certified) == {("given", 1), ("given", 2), ("made", 0), ("made", 1), ("made", 2)}
    assert found.certified["made", 0].slack.size == 0 and found.certified["made", 0].violations == 0
    row = cells(certificate_table(found))["made"]
    assert (row["points"], row["smallest slack"], row["B(0.5)"]) == ("0", "", "0.400 ± 0.000")


def test_a_probe_on_which_every_reward_abstained_is_no_point_of_a_certificate(tmp_path):
    plan = matrix(tmp_path)
    fork = plan.seeds[0].forks[0]
    write(fork.run_dir / "metrics.jsonl", [{**row, "kept/reward": row["kept/reward"] if row["step"] else None}
                                           for row in probes(fork)])
    found = collect(plan)
    assert found.certified["given", 0].slack == pytest.approx([-0.05, 0.2])
    section_of(found, tmp_path)  # pictures too


@pytest.mark.parametrize("kl, told", [(0.88 - 0.01, False), (0.89, True), (0.71, True)])
def test_kl_within_a_tenth_is_matched(tmp_path, kl, told):
    policy = {"recipe": "lab_policy", "overrides": ["model.path=x"]}
    plan = matrix(tmp_path, policies={"given": policy, "made": policy})
    for seed in plan.seeds:
        write(seed.policies["made"].run_dir / "metrics.jsonl", [{"step": 3, "eval/kl": kl, "eval/reward": 0.7}])
    warnings = collect(plan).warnings
    assert [w[:36] for w in warnings] == ["made and given are not at the same KL"[:36]] * told
    assert collect(matrix(tmp_path)).warnings == (UNKNOWN,), "three seeds; a model that exists has no known KL"


def test_a_stage_that_failed_before_it_was_done_has_not_failed(tmp_path):
    plan = matrix(tmp_path)
    plan.seeds[0].forks[0].fail("once")
    broken = plan.seeds[1].forks[1]
    (broken.run_dir / "done.json").unlink()
    broken.fail("for good")
    found = collect(plan)
    assert found.failures == {"made, seed 1, sft": "for good"}
    assert found.warnings == (UNKNOWN, "made, seed 1, sft failed: for good"), "and it is not missing besides"
    assert state_table(found).rows == (("base", "3/3", "", ""), ("given", "", "3/3", ""),
                                       ("made", "3/3", "2/3, 1 failed", "3/3"))


def distance(seed, policy, reference, *kl_P, reward=0.4):
    """As a run writes it, from the KL of each prompt."""
    mean, interval = mean_interval(kl_P)
    write_distance(seed, policy, reference, {"kept/reward": reward, "kept/kl": mean, "kept/kl_interval": interval})


def with_reference(tmp_path, compare=(("made", "given"),), **changes):
    """`given` is measured against `base`, a model that exists too, and so is `made`, which starts from it."""
    policy = {"recipe": "lab_policy", "overrides": ["model.path=x"]}
    plan = matrix(tmp_path, policies={"base": {"path": "models/base"}, "given": {"path": "models/$seed", **changes},
                                      "made": {**policy, "start": "base"}}, compare=[list(pair) for pair in compare])
    for seed in plan.seeds:
        distance(seed, "given", "base", 0.4, 0.7 + 0.2 * seed.seed)
    return plan


def test_a_model_that_exists_has_its_measured_kl_and_its_place_in_the_frontier(tmp_path):
    """Means of prompts .4 and .7, .9, 1.1: .55, .65, .75. The base is the reference of both: 0 nats."""
    plan = with_reference(tmp_path, reference="base")
    assert read_distance(plan.recipe, plan.seeds[0], "given") == {
        "eval/kl": pytest.approx(0.55), "eval/kl_interval": pytest.approx(12.706 * 0.15), "kept/reward": 0.4}
    found = collect(plan)
    assert found.policy_by_seed("given", "eval/kl") == pytest.approx({0: 0.55, 1: 0.65, 2: 0.75})
    rows = cells(frontier_table(found))
    assert [rows[name]["KL spent, nats"] for name in ("base", "given", "made")] == ["0.000", "0.650", "0.800"]
    places = {bar.get_label(): bar.lines[0].get_xydata().tolist()[0] for bar in spent(found).axes[0].containers}
    assert places == {"base": pytest.approx([0.0, 0.9]), "given": pytest.approx([0.65, 0.9]),
                      "made": pytest.approx([0.8, 0.9])}
    assert found.warnings == ("made and given are not at the same KL to their reference (+0.15 of 0.65 nats): what "
                              "they keep is not comparable",)
    plt.close("all")


def test_a_policy_that_is_not_forked_has_its_place_too(tmp_path):
    """Its reward is that of the samples which measured its KL; a single prompt has no interval."""
    plan = with_reference(tmp_path, compare=(), reference="base", fork=False)
    for seed in plan.seeds:
        distance(seed, "given", "base", 0.2, reward=0.5 + 0.1 * seed.seed)
    found = collect(plan)
    assert found.forks("given", "sft") == {} and np.isnan(found.policies["given", 0]["eval/kl_interval"])
    row = cells(frontier_table(found))["given"]
    assert row["KL spent, nats"] == "0.200" and row["reward reached"] == "0.600"
    assert row["kept through sft over updates"] == "-"
    places = {bar.get_label(): bar.lines[0].get_xydata().tolist()[0] for bar in spent(found).axes[0].containers}
    assert places["given"] == pytest.approx([0.2, 0.6])
    plt.close("all")


def test_a_model_that_exists_and_is_not_forked_is_measured_against_nothing(tmp_path):
    """`base` is start and reference of others, so that its KL is 0; nothing says what the KL of `lone` is to."""
    policy = {"recipe": "lab_policy", "overrides": ["model.path=x"], "start": "base"}
    plan = matrix(tmp_path, compare=[], policies={
        "base": {"path": "models/base", "fork": False}, "lone": {"path": "models/lone", "fork": False}, "made": policy,
        "hidden": {**policy, "fork": False}})
    assert plan.recipe.shown == ["made", "base", "lone"], "one that a recipe makes is a start only"
    assert not any(complete(plan.recipe, seed) for seed in plan.seeds)
    told = collect(plan).warnings
    assert "base: its reward is not measured for seed(s) 0, 1, 2; run the same command again to measure it" in told
    for seed in plan.seeds:
        assert {name: missing(plan.recipe, seed, name).reference for name in plan.recipe.shown} == {
            "made": None, "base": "base", "lone": "lone"}
        for name, reward in (("base", 0.3), ("lone", 0.5)):
            write_distance(seed, name, name, {"kept/reward": reward + 0.1 * seed.seed, "kept/decile": 0.1})
    assert all(complete(plan.recipe, seed) for seed in plan.seeds)
    found = collect(plan)
    rows = cells(frontier_table(found))
    assert [(rows[name]["KL spent, nats"], rows[name]["reward reached"]) for name in ("base", "lone")] == [
        ("0.000", "0.400"), ("-", "0.600")]
    assert cells(policy_table(found))["base"]["reward"] == "0.400 ± 0.248"
    places = {bar.get_label(): bar.lines[0].get_xydata().tolist()[0] for bar in spent(found).axes[0].containers}
    assert places["base"] == pytest.approx([0.0, 0.4]) and "lone" not in places
    assert found.warnings == (UNKNOWN.replace("given is", "lone is").replace(".given.", ".lone."),)
    plt.close("all")


def test_a_kl_to_another_reference_or_a_missing_one_is_not_told(tmp_path):
    plan = with_reference(tmp_path, reference="made")
    found = collect(plan)
    assert cells(frontier_table(found))["given"]["KL spent, nats"] == "-"
    assert found.warnings == ("given: its KL to made is not measured for seed(s) 0, 1, 2; run the same command again "
                              "to measure it",)
    distance(plan.seeds[1], "given", "made", 0.2, 0.4)
    found = collect(plan)
    assert found.policy_by_seed("given", "eval/kl") == pytest.approx({1: 0.3})
    assert "given: its KL to made is not measured for seed(s) 0, 2;" in "\n".join(found.warnings)
    found = collect(with_reference(tmp_path / "none"))
    assert found.warnings == (UNKNOWN,) and read_distance(found.plan.recipe, found.plan.seeds[0], "given") is None
    alone = collect(matrix(tmp_path / "alone", only_policies=["given"], compare=[]))
    assert alone.warnings == (), "without others there is no frontier"


@pytest.mark.parametrize("other, known", [([], True), (["evaluate.temperature=0.5"], False), (["rewards=[]"], False)])
def test_a_reward_before_training_is_compared_with_one_of_the_same_task_only(tmp_path, other, known):
    """What forks keep is measured by `measure.kept`; a training may evaluate otherwise."""
    task = ["model.path=x", "rewards=[{name: short, function: 'frpo.rewards.length:short'}]"]
    plan = matrix(tmp_path, measure={"kept": {"recipe": "lab_policy", "overrides": task}, "max_kl": 0.5}, policies={
        "given": {"path": "models/$seed"},
        "made": {"recipe": "lab_policy", "overrides": [*task, *(o for o in other if o != "rewards=[]")] if other != [
            "rewards=[]"] else ["model.path=x"]}})
    for seed in plan.seeds:
        write(seed.policies["made"].run_dir / "metrics.jsonl", [
            {"step": 0, "eval/reward": 0.95}, {"step": 4, "eval/reward": 0.99}])
    found = collect(plan)
    assert bool(found.before_training) is known
    assert ("below the reward before training: made (-0.050 ± 0.000)" in found.warnings) is known
    assert ("before training" in cells(frontier_table(found))) is known
    if known:
        row = cells(frontier_table(found))["before training"]
        assert row["reward reached"] == "0.950" and row["kept through sft over updates"] == ""


def test_a_reference_stands_above_the_kl_that_a_training_reported(tmp_path):
    policy = {"recipe": "lab_policy", "overrides": ["model.path=x"]}
    plan = matrix(tmp_path, policies={"base": {**policy, "fork": False}, "given": {"path": "models/$seed"},
                                      "made": {**policy, "start": "base", "reference": "given"}})
    distance(plan.seeds[0], "made", "given", 0.1, 0.3)
    found = collect(plan)
    assert found.policy_by_seed("made", "eval/kl") == pytest.approx({0: 0.2}), "0.8 nats may be to another reference"
    assert "made: its KL to given is not measured for seed(s) 1, 2;" in "\n".join(found.warnings)
    assert found.policy_by_seed("given", "eval/kl") == {0: 0.0, 1: 0.0, 2: 0.0}


def test_other_references_and_a_kl_that_is_not_finite_are_told(tmp_path):
    plan = matrix(tmp_path, policies={"base": {"path": "b"}, "given": {"path": "g", "reference": "base"},
                                      "made": {"path": "m", "reference": "given"}})
    for seed in plan.seeds:
        distance(seed, "given", "base", 0.4, 0.6)
        distance(seed, "made", "given", *((float("inf"), 0.6) if seed.seed else (0.4, 0.6)))
    warnings = "\n".join(collect(plan).warnings)
    assert "only between policies of the same reference: given to base, made to given" in warnings
    assert "made: its KL to the reference was not finite for seed(s) 1, 2" in warnings
    assert "not measured" not in warnings


def test_curves_of_the_page_tell_values_and_completions_and_break_off_in_gaps(tmp_path):
    """The fork of seed 0 goes from 0 to 3 nats between two probes; those of the others stay near."""
    plan = matrix(tmp_path)
    fork = next(stage for stage in plan.seeds[0].forks if stage.name == "made, seed 0, sft")
    rows = probes(fork)
    rows[2] |= {"kept/kl": 3.0}
    write(fork.run_dir / "metrics.jsonl", rows)
    write(fork.run_dir / "samples.jsonl", [
        {"step": step, "task": task, "prompt": "ask", "completion": f"{task} {step}", "reward": 0.5, "rewards": {}}
        for step in STEPS for task in ("kept", "eval")])
    chart = kept_charts(collect(plan))["Kept through sft"]
    assert list(chart.panels) == ["over updates", "over KL"]
    lines = [trace for trace in chart.panels["over KL"]["data"]
             if trace["name"] == "made" and trace["mode"] == "lines"]
    between = [[y for x, y in zip(line["x"], line["y"]) if 0.2 < x < line["x"][-1]] for line in lines]
    assert set(between[0]) == {None} and None not in between[1] + between[2] and len(between[1]) > 50
    assert [line["showlegend"] for line in lines] == [True, False, False]
    marks = next(trace for trace in chart.panels["over updates"]["data"]
                 if trace["name"] == "made" and trace["mode"] == "markers")
    assert marks["customdata"] == [f"made/sft/0/{step}" for step in STEPS]
    assert marks["text"][2].split("<br>") == ["seed 0, update 20", "KL 3.000 nats", "reward 0.350",
                                              "lowest decile 0.200", "new task 0.500"]
    assert [chart.samples[key][0]["completion"] for key in marks["customdata"]] == ["kept 0", "kept 10", "kept 20"]


# --- tables and sentences ---------------------------------------------------------------------------------------------

def test_tables_of_a_wide_matrix(tmp_path):
    found = collect(matrix(tmp_path, choose={"measure": "sft/end", "bounds": {"eval/kl": [0.7, None]}}))
    assert [table.title.partition(":")[0] for table in all_tables(found)] == [
        "What has run", "Policies before any fine-tuning", "Frontier", "Kept through sft",
        "Differences through sft, seed by seed", "Kept through rl", "Certificate"]
    assert found.chosen == "made" and set(cells(frontier_table(found))) == {"given", "made (chosen)"}
    assert cells(frontier_table(found))["given"]["KL spent, nats"] == "-"
    through_rl = fork_table(found, "through rl")
    assert "enumerated reward" in through_rl.note and set(cells(through_rl)) == {"made"}
    row = cells(certificate_table(found))["given"]
    assert row | {"B(0.25)": "0.650 ± 0.000", "B(1)": "-0.100 ± 0.000", "B(2)": "-1.100 ± 0.000", "points": "9",
                  "below the bound": "3", "beyond error": "3", "smallest slack": "-0.050", "mean slack": "0.053"} == row
    high = collect(matrix(tmp_path, choose={"measure": "sft/end", "bounds": {"eval/kl": [0.81, None]}}))
    assert high.chosen is None and "No policy has a sft/end with eval/kl in [0.81, any]." in sentences(high)
    alone = collect(matrix(tmp_path, only_policies=["made"], only_regimes=["rl"], certificate=None))
    known = collect(matrix(tmp_path, only_policies=["given"], compare=[]))
    assert frontier_table(known).columns == ("policy", "reward reached", "lowest decile",
                                             "kept through sft over updates", "kept through sft over KL")
    assert found.pairs == [("made", "given")] and alone.pairs == []
    assert len(all_tables(alone)) == 3 and not any("against" in line for line in sentences(alone))


@pytest.mark.parametrize("pair, key, seeds, told", [
    (["made", "given"], "compare", [0, 1, 2],
     "Forks of made against given through sft: at the same KL more is kept (+0.0"),
    (["given", "made"], "controls", [0, 1, 2],
     "As a control, forks of given against made through sft: at the same KL less is kept (-0.0"),
    (["made", "given"], "compare", [1], "per update the reward differs by +0.013 (one seed).")])
def test_a_sentence_follows_its_numbers(tmp_path, pair, key, seeds, told):
    found = collect(matrix(tmp_path, seeds=seeds, compare=[], **{key: [pair]}) if key == "controls" else matrix(
        tmp_path, seeds=seeds, compare=[pair]))
    assert told in "\n".join(sentences(found))
    assert "through rl" not in "\n".join(sentences(found)), "which only one of them goes through"


TABLE = {"title": "Layout", "note": "[exact]", "columns": ["SFT", "RL"], "before": "first", "percent": True,
         "published": "elsewhere", "differences": [["RL", "SFT"]], "rows": [
             {"title": "end", "forks": [["made", "sft"], ["made", "rl"]], "measure": "kept/reward",
              "beside": "exact/reward", "published": {"": [88.9, None], "other": [1.5]}},
             {"title": "new", "forks": [["given", "sft"], ["made", "rl"]], "measure": "utility"},
             {"title": "not run", "forks": [["late", "sft"]] * 2, "measure": "end"}]}


def test_a_table_of_the_recipe_is_laid_out_as_it_says(tmp_path):
    policy = {"recipe": "lab_policy", "overrides": ["model.path=x"]}
    found = collect(matrix(tmp_path, tables=[TABLE], only_policies=["given", "made"], policies={
        "base": {**policy, "fork": False}, "given": {"path": "models/$seed"}, "made": {**policy, "start": "base"},
        "late": policy}))
    shown = own_table(found, found.plan.recipe.tables[0])
    assert shown.columns == ("", "first", "SFT", "RL", "published: elsewhere")
    assert shown.rows == (
        ("end", "90.0 ± 0.0", "71.0 ± 2.5 [36]", "31.0 ± 2.5 [16]", "88.9 / -\nother 1.5"),
        ("new", "-", "50.0 ± 0.0", "50.0 ± 0.0", "")), "the summary's `utility` has no first value"
    assert shown.note.startswith("in %, mean") and shown.note.endswith("; [exact]")
    assert shown.narrow is shown, "a layout stays"
    changes = own_differences(found, found.plan.recipe.tables[0])
    assert changes.columns == ("", "RL - SFT") and changes.rows == (
        ("end", "-40.0 ± 0.0* [0/3]"), ("new", "+0.0 ± 0.0 [0/3]"))
    assert [each.title for each in all_tables(found)][:2] == [shown.title, changes.title]
    drawn = bars(found, found.plan.recipe.tables[0]).axes[0]
    assert [[round(bar.get_height(), 6) for bar in column.patches] for column in drawn.containers
            if isinstance(column, BarContainer)] == [[71.0, 50.0], [31.0, 50.0]]
    assert [mark.get_offsets().tolist() for mark in drawn.collections if isinstance(mark, PathCollection)] == [
        [[pytest.approx(-0.2), 88.9]]]
    assert "Layout" in section_of(found, tmp_path / "page").pictures
    plt.close("all")


def test_of_one_policy_alone_the_regimes_stand_side_by_side(tmp_path):
    found = collect(matrix(tmp_path, only_policies=["made"]))
    assert found.groups == {"by made": [("sft", "made", "sft"), ("rl", "made", "rl")]}
    assert [table.title.partition(":")[0] for table in all_tables(found)] == [
        "What has run", "Policies before any fine-tuning", "Kept by made", "Certificate"]
    assert set(cells(fork_table(found, "by made"))) == {"sft", "rl"}
    pictures = section_of(found, tmp_path / "page").pictures
    assert list(pictures) == ["Kept by made", "Certificates", "What forks keep, and what they learn"]
    sft, rl = kept(found, "by made").axes[0].lines
    assert (sft.get_label(), rl.get_label()) == ("sft", "rl") and sft.get_color() != rl.get_color()
    plt.close("all")


def test_several_rewards_are_told_each(tmp_path):
    plan = matrix(tmp_path)
    for seed in plan.seeds:
        for fork in seed.forks:
            write(fork.run_dir / "metrics.jsonl", [{**row, "kept/safe/mean": 0.1, "kept/kind/mean": row["step"] / 40}
                                                   for row in probes(fork)])
    row = cells(fork_table(collect(plan), "through sft"))["made"]
    assert (row["end, kind"], row["end, safe"]) == ("0.500 ± 0.000", "0.100 ± 0.000")
    assert not any("end," in name for name in fork_table(collect(matrix(tmp_path)), "through sft").columns)


def test_two_points_are_no_curve(tmp_path):
    plan = matrix(tmp_path)
    for seed in plan.seeds:
        for fork in seed.forks:
            write(fork.run_dir / "metrics.jsonl", probes(fork)[::2])
    titles = section_of(collect(plan), tmp_path / "page").pictures
    assert not any(title.startswith(("Kept", "Differences")) for title in titles)


# --- pictures and the page --------------------------------------------------------------------------------------------

def test_pictures_show_what_was_measured(tmp_path):
    plan = matrix(tmp_path, choose={"measure": "sft/end"})
    late = plan.seeds[0].forks[0]
    write(late.run_dir / "metrics.jsonl", [{**row, "kept/kl": 0.61 * row["kept/kl"]} for row in probes(late)[::2]])
    found = collect(plan)
    figure = kept(found, "through sft")
    assert len(figure.axes) == 2, "the lowest decile is the same everywhere"
    given, made = figure.axes[0].lines
    assert given.get_xdata().tolist() == [0, 20] and made.get_xdata().tolist() == [0, 10, 20]
    assert made.get_ydata() == pytest.approx([0.45, 0.425, 0.355])
    told = [line.get_xdata()[np.isfinite(line.get_ydata())] for line in figure.axes[1].lines]
    assert [kl[-1] for kl in told] == pytest.approx([0.303125, 0.5]), "as far as all forks, up to .305 and .5"
    assert [len(each.get_offsets()) for each in figure.axes[0].collections if isinstance(each, PathCollection)] == [
        2, 3, 3, 3, 3, 3], "and every probe of every seed is a point"
    write(late.run_dir / "metrics.jsonl", probes(late, decile=0.3))
    assert len(kept(collect(plan), "through sft").axes) == 4
    same = matrix(tmp_path / "same", only_policies=["given"], compare=[])
    for fork in same.seeds[0].forks + same.seeds[1].forks + same.seeds[2].forks:
        write(fork.run_dir / "metrics.jsonl", [{**row, "exact/reward": 0.5} for row in probes(fork)])
    assert len(kept(collect(same), "by given").axes) == 2, "the reward is shown even so"
    mark, = spent(found).axes[0].containers
    assert mark.lines[0].get_marker() == "*", "the chosen one stands out"
    where = [mark.lines[0].get_xydata().tolist() for mark in spent(found).axes[1].containers]
    assert where == [[[pytest.approx(0.8), pytest.approx(found.value("made", "sft/over updates"))]]]
    assert spent(found).axes[0].get_xlim()[0] == 0 and np.ptp(spent(found).axes[0].get_ylim()) >= 0.1 - 1e-9
    ends = [bar.lines[0].get_xydata().tolist()[0] for bar in frontier(found).axes[0].containers]
    assert ends == [pytest.approx([0.5, y]) for y in (0.305, 0.355, 0.155)]
    axes = certificates(found).axes
    assert axes[0].lines[0].get_ydata()[[0, -1]] == pytest.approx([0.9, 0.9 - 2.0])
    assert len(axes[1].collections[-1].get_offsets()) == 18
    plt.close("all")


def test_differences_are_drawn_seed_by_seed(tmp_path):
    plan = matrix(tmp_path, compare=[["made", "given"]], certificate=None)
    (plan.seeds[2].forks[0].run_dir / "done.json").unlink()
    found = collect(plan)
    assert found.common_seeds(("made", "given"), "sft") == [0, 1] and found.common_seeds(("made", "given"), "rl") == []
    updates, kl = differences(found, "sft").axes
    line, zero = updates.lines
    assert line.get_label() == "made - given" and line.get_xdata().tolist() == [0, 10, 20]
    assert line.get_ydata() == pytest.approx([0.0, 0.0, 0.05]) and zero.get_ydata()[0] == 0.0
    along = dict(zip(kl.lines[0].get_xdata().round(6), kl.lines[0].get_ydata()))
    assert along[0.5] == pytest.approx(0.05) and max(along) == 0.5
    titles = list(section_of(found, tmp_path / "page").pictures)
    assert "Differences through sft, seed by seed" in titles and not any("Differences through rl" in t for t in titles)
    plt.close("all")


def test_the_page_and_the_file_of_numbers_hold_everything(tmp_path, capsys):
    plan = matrix(tmp_path, choose={"measure": "sft/end"})
    np.savez(plan.seeds[0].folder / "policies" / "given" / "certificate.npz", rewards_PN=np.full((3, 4), 0.91))
    (plan.seeds[1].folder / "heldout.json").write_text(json.dumps(
        {"heldout": 128, "uids": [], "overlap": {"made/rl": 17}}), encoding="utf-8")
    found = collect(plan)
    page = write_report(found).read_text(encoding="utf-8")
    for text in (*sentences(found), *found.warnings, *(table.note for table in all_tables(found)),
                 "<td>seen by made/rl</td><td>17</td>", "only_policies: null", "<summary>Recipe</summary>",
                 "&#34;made, seed 0, rl&#34;: 30.0"):
        assert text.replace("'", "&#39;") in page
    assert "<td>sft</td><td class=\"told\">what forks go through: frpo finetune with sft</td>" in page
    own = page.replace(get_plotlyjs(), "")
    assert len(own) < len(page) and not any(text in own for text in ("http", "@import", "<link", " src=h", "url("))
    results = json.loads((tmp_path / "wide" / "results.json").read_text(encoding="utf-8"))
    certificate = next(each for each in results["certificates"] if (each["policy"], each["seed"]) == ("made", 0))
    assert certificate["bound"] == pytest.approx([0.9, 0.65, 0.4, -0.1, -1.1, -3.1]) and certificate["points"] == 6
    given = results["certificates"][0]
    assert (given["policy"], given["violations"], given["clear_violations"]) == ("given", 2, 1), "by .01 and by .06"
    end = next(each for each in results["compared"] if (each["regime"], each["measure"]) == ("sft", "end"))
    assert (end["pair"], end["mean"], end["positive"]) == (["made", "given"], pytest.approx(0.05), 3)
    assert results["seconds"]["made, seed 2"] == 60.0
    show(all_tables(found))
    printed = capsys.readouterr().out
    assert "[3/3]" in printed and "What has run" in printed and "lowest decile, exact" in printed
