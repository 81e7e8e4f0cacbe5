"""A sweep of one seed or several without forks, from files written by hand: which policy is best, and whether it is."""
from __future__ import annotations

import json
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
    assert "cannot be said: reward/mean has no interval of one seed" in told


def test_a_measure_that_nobody_has_is_told_with_those_there_are_and_is_a_failure(tmp_path, capsys):
    plan = sweep(tmp_path, *(row(reward, **KNOWN) for reward in (0.1, 0.2, 0.3)), choose="policy/foo")
    told = "\n".join(sentences(collect(plan)))
    assert told == ("No policy has a policy/foo.\nNothing has measured policy/foo; there are eval/exact/mean, eval/kl, "
                    "eval/reward, kept/exact/mean, kept/reward.")
    assert run_retention(plan) == 1 and "there are eval/exact/mean" in capsys.readouterr().out
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
    assert (f"{NAMES[0]}: its KL to the model that it began with is not measured for seed(s) 0; the same command "
            "measures it") in warned
    title = spent(collect(plan)).get_suptitle().replace("\n", " ")
    assert title.endswith(f"not shown, since their KL to the reference is not known: {NAMES[0]}")
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
    assert told.endswith(f"\nThere is {written}: write recipe: {written}. Paths begin in the working directory\n")
    plan = make_plan(load_recipe("conf/matrix.yaml", ["downstream.sft.recipe=" + written], RetentionRecipe))
    assert len(plan.seeds[0].forks) == 1
