"""A sweep of one seed or several without forks, from files written by hand: which policy is best, and whether it is."""
from __future__ import annotations

import json
import math
import re

import pytest
from matplotlib import pyplot as plt

from frpo.config.loader import load_recipe
from frpo.config.retention import RetentionRecipe
from frpo.downstream.archive import write_archive
from frpo.downstream.before import START, missing, write_distance
from frpo.downstream.command import run_retention, write_report
from frpo.downstream.pictures import spent
from frpo.downstream.plan import make_plan
from frpo.downstream.reading import collect
from frpo.downstream.report import sentences
from frpo.downstream.sweep import sweep_recipe
from frpo.downstream.tables import all_tables
from frpo.evaluation.heldout import interval_of

NAMES = [f"policy-kl_coef={value}" for value in (0, 0.1, 0.2)]


def row(reward, interval=0.02, **more):
    return {"step": 4, "reward/mean": reward, "eval/reward": reward, "eval/interval": interval,
            "eval/exact/mean": reward, "eval/exact/interval": interval, **more}


def sweep(tmp_path, *rows, seeds=(0,), **changes):
    """Policies whose last rows are these, of every seed; the first has a KL of 0.4 nats to its start, measured after.
    """
    plan = make_plan(sweep_recipe("smoke", [], over=["objective.kl_coef=[0,0.1,0.2]"], seeds=seeds,
                                  folder=str(tmp_path / "sweep"), **changes))
    for seed in plan.seeds:
        for stage, last in zip(seed.policies.values(), rows):
            stage.run_dir.mkdir(parents=True, exist_ok=True)
            lines = [{**last, "step": 0}, {name: value + 0.01 * seed.seed * (name == "eval/reward")
                                           for name, value in last.items()}]
            (stage.run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            stage.finish(steps=4, seconds=30.0)
        write_distance(seed, NAMES[0], START, {"kept/kl": 0.4, "kept/kl_interval": 0.05, "kept/reward": 0.99})
    write_archive(plan.recipe)
    return plan


KNOWN = {"eval/kl": 0.2, "eval/kl_interval": 0.01}


def best(tmp_path, *rewards, interval=0.02, **changes):
    found = collect(sweep(tmp_path, *(row(reward, interval, **KNOWN) for reward in rewards), **changes))
    return found.chosen, "\n".join(sentences(found))


def test_the_best_is_told_with_its_interval(tmp_path):
    chosen, told = best(tmp_path, 0.1, 0.5, 0.3)
    assert chosen == NAMES[1] and told == (
        f"Largest kept/reward: {NAMES[1]}, 0.500 ± 0.020, {tmp_path}/sweep/seed0/policies/{NAMES[1]}/export.")


def test_a_lead_within_the_interval_is_told(tmp_path):
    """.034 against .033 and .015 of one seed, ± .02 each: differences of .001 and .019 ± .028."""
    _, told = best(tmp_path, 0.033, 0.034, 0.015)
    assert (f"The best is not distinguishable from {NAMES[0]} (0.033 ± 0.020, 0.001 ± 0.028 less), {NAMES[2]} "
            "(0.015 ± 0.020, 0.019 ± 0.028 less); ±: 95 % interval over held-out prompts of one seed.") in told


def test_over_seeds_policies_are_compared_in_pairs(tmp_path):
    """Each gains .01 a seed, so that all differences are the same, however wide the intervals are."""
    chosen, told = best(tmp_path, 0.033, 0.034, 0.015, seeds=(0, 1, 2))
    assert chosen == NAMES[1] and "distinguishable" not in told and "0.044 ± 0.025" in told


@pytest.mark.parametrize("rewards, message", [
    ((0.008, 0.008, 0.002), f"Equal: {NAMES[0]}, {NAMES[1]}; the first is taken."),
    ((0.0, 0.0, 0.0), "All 3 policies have the same kept/reward, 0: none is best, the first is taken.")])
def test_ties_are_told(tmp_path, rewards, message):
    chosen, told = best(tmp_path, *rewards)
    assert chosen == NAMES[0] and told.endswith(message) and "distinguishable" not in told


def test_a_measure_without_an_interval_cannot_tell_chance(tmp_path):
    _, told = best(tmp_path, 0.1, 0.2, 0.3, choose="reward/mean")
    assert "This lead may be chance: reward/mean has no interval from one seed" in told


def test_a_measure_that_nobody_has_is_told_with_those_there_are_and_is_a_failure(tmp_path, capsys):
    plan = sweep(tmp_path, *(row(reward, **KNOWN) for reward in (0.1, 0.2, 0.3)), choose="policy/foo")
    told = "\n".join(sentences(collect(plan)))
    assert told == ("No policy has a policy/foo.\nNot measured: policy/foo; available measures: eval/exact/mean, "
                    "eval/kl, eval/reward, kept/exact/mean, kept/reward.")
    assert run_retention(plan) == 1 and "available measures: eval/exact/mean" in capsys.readouterr().out
    bounded = sweep(tmp_path, *(row(reward, **KNOWN) for reward in (0.1, 0.2, 0.3)), within=["eval/kl=[null,0.01]"])
    assert sentences(collect(bounded)) == ["No policy has a kept/reward with eval/kl in [any, 0.01]."]
    assert run_retention(bounded) == 0, "that no policy keeps within bounds is a result"


def test_the_kl_of_a_policy_whose_training_ran_no_reference_is_measured_to_its_start(tmp_path):
    plan = sweep(tmp_path, row(0.1), row(0.2, **KNOWN), row(0.3, **KNOWN))
    seed = plan.seeds[0]
    assert [missing(plan.recipe, seed, name).reference for name in NAMES] == [None, None, None]
    (seed.measured(NAMES[0]) / "reference_kl.json").unlink()
    assert [missing(plan.recipe, seed, name).reference for name in NAMES] == [START, None, None]
    warned = "\n".join(collect(plan).warnings)
    assert (f"{NAMES[0]}: its KL to the model that it began with is not measured for seed(s) 0; run the same "
            "command again to measure it") in warned
    title = spent(collect(plan)).get_suptitle().replace("\n", " ")
    assert title.endswith(f"not shown, because their KL to the reference is unknown: {NAMES[0]}")
    plan = sweep(tmp_path, row(0.1), row(0.2, **KNOWN), row(0.3, **KNOWN))
    found = collect(plan)
    assert found.policy_by_seed(NAMES[0], "eval/kl") == {0: 0.4} and found.value(NAMES[0], "kept/reward") == 0.1
    figure = spent(found)
    assert len(figure.axes[0].containers) == 3 and figure.get_suptitle() == (
        "bars: 95 % interval over held-out prompts, one seed")
    plt.close("all")


def test_a_sweep_without_forks_is_told_as_one(tmp_path):
    found = collect(sweep(tmp_path, row(0.1), row(0.2, **KNOWN), row(0.3, **KNOWN)))
    page = write_report(found).read_text(encoding="utf-8").split("<body>")[1].split("<details>")[0]
    assert "<h1>Sweep of smoke</h1>" in page
    assert not re.search("fork|decile|over KL|fine-tun", page.replace(str(tmp_path), ""))
    assert "<h3>Trainings</h3>" in page and (tmp_path / "sweep" / "trainings.png").is_file()
    table = all_tables(found)[-1]
    assert table.title == "Reward reached, KL spent" and len(all_tables(found)) == 2
    assert table.note == "one seed ± 95 % interval over its held-out prompts, where they were sampled"
    assert table.rows[0] == (NAMES[0], "0.400 ± 0.050", "0.100 ± 0.020")


def trained(tmp_path, begun, *rewards, interval=0.02, **changes):
    """Policies of which all have begun with this reward of each seed, and have these now."""
    plan = sweep(tmp_path, *(row(reward, interval, **KNOWN) for reward in rewards), **changes)
    for stage in plan.stages:
        path = stage.run_dir / "metrics.jsonl"
        first, *others = path.read_text(encoding="utf-8").splitlines()
        first = json.loads(first) | {"eval/reward": begun[stage.seed]}
        path.write_text("\n".join([json.dumps(first), *others]) + "\n", encoding="utf-8")
    return plan


def test_the_model_before_training_stands_beside_what_was_made_of_it(tmp_path):
    """.25 ± .02 before; after it .1, .5 and .24, of which the last is within both intervals."""
    found = collect(trained(tmp_path, [0.25], 0.1, 0.5, 0.24))
    table = all_tables(found)[-1]
    assert table.rows[0] == ("before training", "0.000", "0.250 ± 0.020") and len(table.rows) == 4
    assert table.note.endswith("; before training: what all trained policies began with")
    assert sentences(found)[0] == "Reward before training: 0.250 ± 0.020."
    assert f"below the reward before training: {NAMES[0]} (-0.150 ± 0.028)" in found.warnings
    assert not any("chosen" in each for each in found.warnings)
    axis = spent(found).axes[0]
    line, = (line for line in axis.lines if line.get_label() == "before training")
    assert set(line.get_ydata()) == {0.25} and "before training" in {
        text.get_text() for text in axis.get_legend().get_texts()}
    plt.close("all")
    page = write_report(found).read_text(encoding="utf-8")
    assert "<td>before training</td>" in page and "one export has several rewards" in page
    numbers = json.loads((tmp_path / "sweep" / "results.json").read_text(encoding="utf-8"))
    assert numbers["before_training"][0] == {
        "policy": NAMES[0], "seed": 0, "kept/reward": 0.25, "kept/interval": 0.02, "eval/kl": 0.0}


@pytest.mark.parametrize("best, told", [(0.4, None), (0.26, "+0.010 ± 0.028"), (0.25, "+0.000 ± 0.028"),
                                        (0.2, "-0.050 ± 0.028")])
def test_a_choice_that_is_no_better_than_before_training_is_a_warning(tmp_path, best, told):
    found = collect(trained(tmp_path, [0.25], 0.0, best, 0.1))
    warned = [each for each in found.warnings if "chosen" in each]
    sentence = f"the chosen policy {NAMES[1]} is not above the reward before training ({told})"
    assert warned == ([sentence] if told else [])
    below = f"below the reward before training: {NAMES[0]} (-0.250 ± 0.028), {NAMES[2]} (-0.150 ± 0.028)"
    assert below in found.warnings


def test_over_seeds_the_gain_is_that_of_pairs(tmp_path):
    """Before .2, .21, .22; after it .1 and .01 more a seed, so that the loss is the same in each; and 0.2 or .3."""
    found = collect(trained(tmp_path, [0.2, 0.21, 0.22], 0.1, 0.2, 0.3, seeds=(0, 1, 2)))
    assert all_tables(found)[-1].rows[0] == ("before training", "0.000 ± 0.000", "0.210 ± 0.025")
    assert f"below the reward before training: {NAMES[0]} (-0.100 ± 0.000)" in found.warnings
    assert found.gain(NAMES[1]).mean == pytest.approx(0.0) and found.gain(NAMES[2]).differs


def test_without_an_interval_a_smaller_reward_is_below(tmp_path):
    warned = "\n".join(collect(trained(tmp_path, [0.25], 0.24, 0.5, 0.26, interval=math.nan)).warnings)
    assert f"below the reward before training: {NAMES[0]} (-0.010)" in warned


def test_policies_that_began_with_other_rewards_have_no_row_in_common(tmp_path):
    """Each is compared with its own start all the same."""
    plan = trained(tmp_path, [0.25, 0.25], 0.1, 0.5, 0.3, seeds=(0, 1))
    path = plan.seeds[1].policies[NAMES[2]].run_dir / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("0.25", "0.27", 1), encoding="utf-8")
    found = collect(plan)
    assert found.before_training == {} and "before training" not in {row[0] for row in all_tables(found)[-1].rows}
    assert not any("before training" in each for each in sentences(found))
    assert "before training" not in {line.get_label() for line in spent(found).axes[0].lines}
    assert found.gain(NAMES[2]).mean == pytest.approx((0.05 + 0.04) / 2)
    plt.close("all")


def test_a_single_policy_stands_beside_the_model_before_training_too(tmp_path):
    plan = make_plan(sweep_recipe("smoke", [], over=["objective.kl_coef=[0.1]"], seeds=[0], folder=str(tmp_path)))
    stage, = plan.stages
    stage.run_dir.mkdir(parents=True)
    (stage.run_dir / "metrics.jsonl").write_text("".join(
        json.dumps(row(reward, **KNOWN) | {"step": step}) + "\n" for step, reward in ((0, 0.25), (4, 0.5))))
    stage.finish(steps=4, seconds=1.0)
    assert [line[0] for line in all_tables(collect(plan))[-1].rows] == ["before training", NAMES[1]]


@pytest.mark.parametrize("metric, interval", [
    ("kept/reward", "kept/interval"), ("eval/kl", "eval/kl_interval"), ("kept/exact/mean", "kept/exact/interval"),
    ("eval/pass@4", "eval/pass@4/interval")])
def test_where_an_interval_stands(metric, interval):
    assert interval_of(metric) == interval


# --- recipes that are not found ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("where, written", [(".", "my_sft.yaml"), ("conf", "conf/my_sft.yaml")])
def test_a_recipe_that_lies_here_or_beside_the_matrix_is_named(tmp_path, monkeypatch, capsys, where, written):
    from frpo.__main__ import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    (tmp_path / where / "my_sft.yaml").write_text("extends: lab_downstream_sft\n", encoding="utf-8")
    (tmp_path / "conf" / "matrix.yaml").write_text(
        "policies: {a: {path: x}}\ndownstream: {sft: {recipe: my_sft}}\nmeasure: {kept: {recipe: lab_policy}}\n",
        encoding="utf-8")
    assert main(["retention", "conf/matrix.yaml", "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert "downstream.sft: recipe not found: " in told
    assert told.endswith(f"\n{written} exists: write recipe: {written}. Paths begin in the working directory\n")
    plan = make_plan(load_recipe("conf/matrix.yaml", ["downstream.sft.recipe=" + written], RetentionRecipe))
    assert len(plan.seeds[0].forks) == 1
