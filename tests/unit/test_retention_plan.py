"""A retention recipe as stages, and every mistake in one that is known before anything starts."""
from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import load_recipe
from frpo.config.retention import RetentionRecipe
from frpo.downstream.before import SAMPLES, missing, write_distance, write_samples
from frpo.downstream.plan import DONE, make_plan
from frpo.downstream.sweep import sweep_recipe
from frpo.errors import ConfigError


def lab(*overrides):
    return make_plan(load_recipe("lab", overrides, RetentionRecipe))


def recipe(tmp_path, **changes):
    values = {"run": {"dir": str(tmp_path / "run")}, "measure": {"kept": {"recipe": "lab_policy"}},
              "policies": {"given": {"path": "somewhere"}, "made": {"recipe": "lab_policy", "start": "given"}},
              "downstream": {"sft": {"recipe": "lab_downstream_sft"}}}
    path = tmp_path / "matrix.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}), encoding="utf-8")
    return load_recipe(path, (), RetentionRecipe)


def test_the_laboratory():
    plan = lab("seeds=[4, 7]", "run.dir=here")
    seed = plan.seeds[1]
    assert list(seed.policies) == ["warm", "frpo", "frpo_1", "frpo_inf", "frpo_plugin", "no_baseline", "dr_grpo"]
    assert [(s.policy, s.regime) for s in seed.forks if s.policy == "frpo"] == [
        ("frpo", "sft"), ("frpo", "csft"), ("frpo", "csft_pa"), ("frpo", "grpo")]
    assert [s.regime for s in seed.forks if s.policy == "frpo_1"] == ["sft"]
    warm, frpo = seed.policies["warm"], seed.policies["frpo_1"]
    assert isinstance(warm.recipe, FinetuneRecipe) and warm.start == "here/seed7/setup/model" and warm.origin is None
    assert (frpo.start, frpo.origin, frpo.recipe.run.seed) == ("here/seed7/policies/warm/export", warm, 7)
    assert frpo.recipe.objective.advantage.lam == 1.0 and frpo.recipe.rewards[0].kwargs == {"seed": 7}
    fork = next(s for s in seed.forks if s.policy == "frpo_1")
    assert fork.start == "here/seed7/policies/frpo_1/export" and fork.first is warm
    assert str(fork.run_dir) == "here/seed7/forks/frpo_1/sft" and fork.recipe.model.tiny is None
    assert len(list(plan.stages)) == 2 * (7 + 12)
    assert (fork.name, fork.recipe.run.name, fork.model) == (
        "frpo_1, seed 7, sft", "frpo_1", "here/seed7/forks/frpo_1/sft/export")
    assert seed.stages[:7] == tuple(seed.policies.values())
    assert plan.model_of("warm") == "here/seed4/policies/warm/export"
    assert seed.utility.run.seed == seed.kept.run.seed == 7 and seed.utility.evaluate.samples == 1
    assert seed.kept.model.path == "here/seed7/setup/model"


def test_a_model_that_exists_is_a_start_and_words_are_filled_in(tmp_path):
    where = tmp_path / "run"
    own = ["data.path=$setup/$seed-$$.jsonl", "run.num_steps=5"]
    kept = {"recipe": "quickstart", "overrides": ["evaluate.samples=5"], "extra": ["evaluate.samples=6"]}
    plan = make_plan(recipe(tmp_path, seeds=[3], measure={"kept": kept}, policies={
        "given": {"path": "$run/$seed/model", "fork": False},
        "made": {"recipe": "quickstart", "start": "given", "overrides": own, "extra": ["run.num_steps=6"]}},
        downstream={"more": {"recipe": "quickstart_downstream", "overrides": ["run.num_epochs=5"],
                             "extra": ["run.num_epochs=6"]}}))
    seed, = plan.seeds
    made, = seed.policies.values()
    fork, = seed.forks
    assert seed.given == {"given": f"{where}/3/model"} and plan.model_of("given") == f"{where}/3/model"
    assert (made.start, made.origin, made.first) == (f"{where}/3/model", None, made)
    assert made.recipe.model.tiny is None, "the recipe's own would be made on the spot"
    assert made.recipe.data.path == f"{where}/seed3/setup/3-$.jsonl"
    assert (made.recipe.run.num_steps, fork.recipe.run.num_epochs, seed.kept.evaluate.samples) == (6, 6, 6)
    assert fork.start == made.model and fork.origin is made


def test_forks_of_a_model_that_exists_begin_with_it(tmp_path):
    fork = make_plan(recipe(tmp_path)).seeds[0].forks[0]
    assert (fork.policy, fork.start, fork.recipe.model.path, fork.origin) == ("given", "somewhere", "somewhere", None)


def test_a_reference_is_needed_where_its_policy_is(tmp_path):
    policies = {"base": {"path": "b", "fork": False}, "mid": {"recipe": "lab_policy", "start": "base", "fork": False},
                "given": {"path": "g", "reference": "mid"}, "other": {"path": "o"}}
    found = recipe(tmp_path, policies=policies, only_policies=["given"])
    assert found.needed() == ["base", "given", "mid"] and found.forked == ["given"]
    seed, = make_plan(found).seeds
    assert [stage.name for stage in seed.stages] == ["mid, seed 0", "given, seed 0, sft"]
    assert seed.model_of("given") == "g" and seed.model_of("mid") == str(tmp_path / "run/seed0/policies/mid/export")
    assert seed.has("given") and not seed.has("mid")
    seed.policies["mid"].finish(steps=1)
    assert seed.has("mid")


@pytest.mark.parametrize("certificate, reference, written, wanted", [
    (None, None, [], (0, None)), ({"samples": 9}, None, [], (9, None)), ({"samples": 9}, "other", [], (9, "other")),
    ({"samples": 9}, "other", ["samples"], (0, "other")), ({"samples": 9}, "other", ["kl"], (9, None)),
    ({"samples": 9}, "third", ["samples", "kl"], (0, "third"))])
def test_what_is_still_to_measure_of_a_policy_before_any_fork(tmp_path, certificate, reference, written, wanted):
    found = recipe(tmp_path, certificate=certificate, policies={
        "given": {"path": "g", **({"reference": reference} if reference else {})}, "other": {"path": "o"},
        "third": {"path": "t"}})
    seed, = make_plan(found).seeds
    if "samples" in written:
        write_samples(seed, "given", [SimpleNamespace(rewards_G=np.array([0.5, 1.0]))])
        assert np.load(seed.measured("given") / SAMPLES)["rewards_PN"].tolist() == [[0.5, 1.0]]
    if "kl" in written:
        write_distance(seed, "given", "other", {"kept/kl": 0.5, "kept/reward": 0.25})
    lacking = missing(found, seed, "given")
    assert (lacking.samples, lacking.reference) == wanted and bool(lacking) == any(wanted)


def test_some_of_it():
    plan = lab("only_policies=[dr_grpo]", "only_regimes=[sft, grpo]", "seeds=[0]")
    assert [s.name for s in plan.stages] == ["warm, seed 0", "dr_grpo, seed 0", "dr_grpo, seed 0, sft",
                                             "dr_grpo, seed 0, grpo"]
    assert [s.policy for s in lab(*load_recipe("lab", (), RetentionRecipe).quick).seeds[0].policies.values()] == [
        "warm", "frpo", "dr_grpo"]


def test_a_point_of_the_frontier_can_be_among_some_of_it(tmp_path):
    """The policy that is not forked too; its reference is needed and has no place of its own."""
    policies = {"base": {"path": "b"}, "point": {"path": "p", "fork": False, "reference": "base"},
                "made": {"path": "m"}}
    found = recipe(tmp_path, policies=policies, only_policies=["made", "point"])
    assert (found.forked, found.shown, found.needed()) == (["made"], ["made", "point"], ["base", "made", "point"])
    assert recipe(tmp_path, policies=policies, only_policies=["made"]).shown == ["made"]
    policies["base"]["fork"] = False
    assert recipe(tmp_path, policies=policies, only_policies=["made", "base"]).shown == ["made", "base"]


def test_values_of_keys_become_policies(tmp_path):
    found = sweep_recipe("quickstart", ["run.num_steps=3"], folder=str(tmp_path), seeds=[0, 1],
                         over=["objective.kl_coef=[1e-3, 0.1]", "objective.advantage.lam=[.inf]"],
                         downstream=["quickstart_downstream"], within=["eval/kl=[null, 0.5]"])
    plan = make_plan(found)
    assert list(found.policies) == ["policy-kl_coef=0.001-lam=.inf", "policy-kl_coef=0.1-lam=.inf"]
    assert [s.recipe.objective.kl_coef for s in plan.seeds[0].policies.values()] == [0.001, 0.1]
    assert all(s.start is None and s.recipe.run.num_steps == 3 for s in plan.seeds[0].policies.values())
    assert len(plan.seeds) == 2 and len(plan.seeds[0].forks) == 2
    assert found.choose.bounds == {"eval/kl": (None, 0.5)} and found.certificate is None


def test_a_sweep_is_of_the_recipe_as_it_was_overridden(tmp_path):
    found = sweep_recipe("quickstart", ["data.heldout=9"], folder=str(tmp_path), seeds=[0], over=["run.num_steps=[1]"],
                         downstream=["recipes/quickstart_downstream.yaml"], choose="eval/kl")
    assert make_plan(found).seeds[0].kept.data.heldout == 9 and list(found.downstream) == ["quickstart_downstream"]
    assert found.choose.measure == "eval/kl"
    with pytest.raises(ConfigError, match=r"--within 'eval/kl=1' is not of the form eval/kl=\[null,0.5\]"):
        sweep_recipe("quickstart", [], folder="x", seeds=[0], over=["run.num_steps=[1]"], within=["eval/kl=1"])


def test_a_policy_over_values_keeps_its_own_overrides(tmp_path):
    many = [10_000_000 + i for i in range(9)]
    found = recipe(tmp_path, policies={"a": {**BASE, "extra": ["run.num_steps=1"], "over": {
        "evaluate.pass_at": [many], "objective.advantage.name": ["rloo"]}}}).policies
    name, = found
    assert name == f"a-pass_at={many}-name=rloo".replace(" ", "") and not found[name].over
    assert found[name].extra == ["run.num_steps=1", f"evaluate.pass_at={many}", "objective.advantage.name=rloo"]


def test_values_that_no_folder_could_be_called_are_told_apart_all_the_same(tmp_path):
    values = [{"name": "frpo", "lam": 0.5}, {"name": "rloo"}]
    found = recipe(tmp_path, policies={"a": {**BASE, "over": {"objective.advantage": values, "data.path": ["x/y.b"]}}})
    assert list(found.policies) == ["a-path=x_y.b-advantage=lam_0.5,name_frpo", "a-path=x_y.b-advantage=name_rloo"]
    first, second = make_plan(found).seeds[0].policies.values()
    assert (first.recipe.objective.advantage.lam, second.recipe.objective.advantage.name) == (0.5, "rloo")
    assert first.recipe.data.path == "x/y.b"


@pytest.mark.parametrize("over", ["objective.kl_coef", "objective.kl_coef=0.1", "=[1]", "objective.kl_coef=[]"])
def test_a_sweep_needs_lists(over):
    with pytest.raises(ConfigError, match=r"--over .* is not of the form objective.kl_coef=\[0.001,0.01\]"):
        sweep_recipe("quickstart", [], over=[over], seeds=[0], folder="x")


BASE = {"recipe": "lab_policy"}


@pytest.mark.parametrize("changes, message", [
    ({"policies": {}}, "policies: "),
    ({"policies": {"a": {}}}, "policies.a: give exactly one of path .* and recipe"),
    ({"policies": {"a": {"path": "x", "recipe": "y"}}}, "policies.a: give exactly one of path .* and recipe"),
    ({"policies": {"a": {"path": "x", "overrides": ["b.c=1"]}}}, "policies.a: path is a model that exists"),
    ({"policies": {"a": {"path": "x", "start": "b"}}}, "policies.a: path is a model that exists"),
    ({"policies": {"a": {**BASE, "over": {1: [2]}}}}, "policies.a.over.1.*: should be a valid string, given 1"),
    ({"policies": {"a": {**BASE, "over": {"run.seed": [{1}]}}}}, "over.run.seed.0: holds set, which the file"),
    ({"policies": {1: {**BASE, "over": {"run.seed": [1]}}}}, "policies.1.*: should be a valid string, given 1"),
    ({"policies": {"a": {"recipe": "x" * 300}}}, "policies.a.recipe: no path is that long"),
    ({"policies": {"a": {**BASE, "over": {"run.seed": [1], "run.name": []}}}}, "over.run.name: .* not be empty"),
    ({"policies": {"a": {**BASE, "over": {"run.seed": 1}}}}, "over.run.seed: should be a list"),
    ({"policies": {"a": {**BASE, "extra": "b.c=1", "over": {"run.seed": [1]}}}}, "extra: should be a list"),
    ({"policies": {"a": {**BASE, "start": "b"}}}, "policies.a.start: 'b' is not a policy; choose from a"),
    ({"policies": {"a": {"path": "x", "reference": "y"}}}, "policies.a.reference: 'y' is not a policy; choose from a"),
    ({"policies": {"a": {"path": "x", "reference": "a"}}}, "policies.a.reference: a -> a is a circle; name the policy"),
    ({"policies": {"a": {"path": "z", "reference": "b"}, "b": {"path": "x", "reference": "c"},
                   "c": {**BASE, "reference": "b"}}}, "policies.a.reference: a -> b -> c -> b is a circle"),
    ({"policies": {"a": {"path": "x", "fork": False, "reference": "b"}, "b": BASE}, "only_policies": ["a"]},
     "only_policies: a forked policy is needed, given 'a'; choose from b"),
    ({"only_policies": []}, "only_policies: a forked policy is needed, given none; choose from given, made"),
    ({"policies": {"a": {**BASE, "start": "b"}, "b": {**BASE, "start": "a"}}}, "policies a, b start from each other"),
    ({"policies": {"a": {**BASE, "over": {"data.path": ["x/y", "x y", "x:y"]}}}}, "get the name 'a-path=x_y'; rename"),
    ({"policies": {"a-lam=1": BASE, "a": {**BASE, "over": {"x.lam": [1]}}}}, "get the name 'a-lam=1'; rename"),
    ({"policies": {"a": {**BASE, "over": {"data.path": ["x" * 200]}}}}, "has 207 bytes, too long .* at most 200"),
    ({"policies": {"a": {**BASE, "fork": False}}}, "no policy has fork: true"),
    *(({"policies": {name: BASE}}, f"policy {re.escape(repr(name))} cannot name a folder")
      for name in ("a/b", "a\\b", "a:b", "", ".a")),
    ({"downstream": {"..": {"recipe": "x"}}}, "regime '..' cannot name a folder"),
    ({"compare": [["made", "other"]]}, "compare: 'other' is not a forked policy; choose from given, made"),
    ({"controls": [["made"]]}, "controls.0"),
    ({"controls": [["made", "other"]]}, "controls: 'other' is not a forked policy; choose from given, made"),
    ({"seeds": [1, 1]}, r"seeds must differ, given \[1, 1\]"), ({"seeds": []}, "seeds: .*"),
    ({"only_policies": ["x"]}, "only_policies: a forked policy is needed, given 'x'"),
    ({"only_regimes": ["x"]}, "only_regimes: 'x' is not a regime; choose from sft"),
    ({"downstream": {"a": {"recipe": "lab_downstream_sft", "policies": ["x"]}}}, "downstream.a.policies: 'x' is not"),
    ({"certificate": {"samples": 2}}, "certificate.samples: .*4, given 2"),
    ({"certificate": {"confidence": 1.0}}, "certificate.confidence: .*less than 1, given 1.0"),
    ({"certificate": {"lambdas": [1.0, 0.0]}}, "certificate.lambdas.1: .*greater than 0, given 0"),
    ({"measure": {"kept": BASE, "max_kl": 0.0}}, "measure.max_kl: .*greater than 0, given 0"),
    ({"measure": {"kept": BASE, "at": [-1]}}, "measure.at.0: .*0, given -1"),
    *(({"tables": [{"title": "t", "columns": ["A"], "rows": [
        {"title": "r", "forks": [["made", "sft"]], "measure": "end", **row}], **table}]}, message)
      for row, table, message in (
          ({"forks": [["made", "sft"]] * 2}, {}, "tables.0: row 'r' has 2 forks for the 1 columns A; give"),
          ({"forks": [["made", "rl"]]}, {}, "tables 't', row 'r': 'rl' is not a regime; choose from sft"),
          ({"forks": [["other", "sft"]]}, {}, "tables 't', row 'r': 'other' is not a forked policy; choose from"),
          ({"published": {"": [1.0, 2.0]}}, {"published": "x"}, "published '' has 2 numbers for 1 columns"),
          ({"published": {"": [1.0]}}, {}, "has published numbers, but the table has no `published`; set"),
          ({}, {"differences": [["A", "B"]]}, "tables.0: differences: 'B' is not a column; choose from A"),
          ({}, {"rows": []}, "tables.0.rows: .*not be empty"))),
    ({"tables": [{"title": "t", "columns": ["A"], "rows": [{"title": "r", "forks": [["made", "sft"]],
                                                            "measure": "end"}]}] * 2}, "tables: titles must differ"),
    ({"tables": [{"title": "t", "columns": ["A"], "rows": [{"title": "r", "forks": [["given", "sft"]],
                                                            "measure": "end"}]}],
      "downstream": {"sft": {"recipe": "lab_downstream_sft", "policies": ["made"]}}},
     "tables 't', row 'r': downstream.sft.policies does not have 'given'; add it"),
    ({"measure": {"kept": BASE, "probes": 3}}, "unknown key 'measure.probes'")])
def test_a_recipe_that_does_not_hold_together(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        recipe(tmp_path, **changes)


@pytest.mark.parametrize("changes, message", [
    ({"policies": {"a": {"recipe": "nowhere"}}}, "policies.a: .*no file 'nowhere'"),
    ({"policies": {"a": {"recipe": "lab"}}}, "policies.a: lab is a recipe of `frpo retention`; give"),
    ({"policies": {"a": {"recipe": "lab_reward_model"}}},
     "policies.a: lab_reward_model is a recipe of `frpo reward-model`; give a recipe of `frpo train` or `frpo fine"),
    ({"downstream": {"sft": {"recipe": "lab_cost_model"}}}, "lab_cost_model is a recipe of `frpo reward-model`; give"),
    ({"measure": {"kept": {"recipe": "lab_reward_model"}}}, "measure.kept: .*is a recipe of `frpo reward-model`"),
    ({"policies": {"a": {**BASE, "overrides": ["rollout.group_sise=2"]}}}, "policies.a: .*did you mean 'group_size'"),
    ({"policies": {"a": {**BASE, "overrides": ["data.path=$folder/x"]}}},
     r"unknown \$ word .*allowed: \$seed, \$setup"),
    ({"policies": {"a": {**BASE, "overrides": ["learner={ranks: ray, num_ranks: 2}"]}}},
     "a, seed 0: learner.num_ranks = 2, but measure.kept has 1"),
    *(({"policies": {"a": {**BASE, "overrides": [f"{key}={value}"]}}}, f"a, seed 0: {key} = .*, but measure.kept has")
      for key, value in (("learner.ranks", "ray"), ("learner.threads", 3), ("rollout.tensor_parallel_size", 2),
                         ("rollout.hook", "frpo.rollout.calculator:Calculator"))),
    ({"measure": {"kept": BASE, "utility": {**BASE, "overrides": ["rollout.num_engines=2"]}}},
     "measure.utility: rollout.num_engines = 2, but measure.kept has 1"),
    ({"policies": {"a": {"path": "$home/x"}}}, r"policies.a.path: '\$home/x' has an unknown \$ word"),
    ({"policies": {"a": {**BASE, "overrides": ["rollout.replay=x"]}}}, "a, seed 0: rollout.replay trains without"),
    ({"policies": {"a": {**BASE, "overrides": ["rollout.num_engines=2"]}}}, "a, seed 0: rollout.num_engines = 2, but"),
    ({"policies": {"a": {**BASE, "overrides": ["model.max_length=32"]}}}, "model.max_length = 32 is above the 16"),
    ({"downstream": {"sft": {"recipe": "lab_downstream_sft", "overrides": ["model.dtype=bf16"]}}},
     "given, seed 0, sft: model.dtype = 'bf16', but measure.kept has 'fp32'"),
    ({"measure": {"kept": {"recipe": "lab_downstream_sft"}}}, "measure.kept: .*is a recipe of `frpo finetune`"),
    ({"measure": {"kept": {**BASE, "overrides": ["data.heldout_path=null", "data.heldout=0"]}}},
     "measure.kept: lab_policy holds no prompts out"),
    ({"measure": {"kept": {**BASE, "overrides": ["evaluate.temperature=0.0"]}}},
     "measure.kept: .*at temperature 0; the KL of sequences is unbiased only at 1")])
def test_a_part_that_does_not_fit(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(recipe(tmp_path, **changes))


def test_held_out_prompts_may_be_a_file_alone(tmp_path):
    kept = {**BASE, "overrides": ["data.heldout=0", "data.heldout_path=x.jsonl"]}
    assert make_plan(recipe(tmp_path, measure={"kept": kept})).seeds[0].kept.data.heldout_path == "x.jsonl"


def test_a_result_of_another_recipe_is_refused(tmp_path):
    made, fork = (make_plan(recipe(tmp_path)).seeds[0].policies["made"], make_plan(recipe(tmp_path)).seeds[0].forks[1])
    assert fork.policy == "made" and made.done is None
    made.fail("a reason")
    assert made.failure == "a reason"
    made.finish(steps=3)
    assert made.done["steps"] == 3 and made.failure is None
    policies = {"given": {"path": "somewhere"}, "made": {**BASE, "start": "given", "overrides": ["run.num_steps=7"]}}
    other = make_plan(recipe(tmp_path, policies=policies)).seeds[0]
    with pytest.raises(ConfigError, match="made, seed 0 has now; choose another run.dir"):
        _ = other.policies["made"].done
    assert other.forks[1].digest != fork.digest  # what a fork began as is part of it
    assert other.forks[0].digest == make_plan(recipe(tmp_path)).seeds[0].forks[0].digest
    assert json.loads((made.run_dir / DONE).read_text(encoding="utf-8"))["digest"] == made.digest


@pytest.mark.parametrize("name, possible", [
    ("kept/reward", True), ("kept/world/mean", True), ("kept/decile", True), ("kept/foo", False), ("reward", False),
    ("sft/over KL", True), ("sft/kept/world/mean", True), ("sft/foo", False), ("sft/utility", False),
    ("eval/mine/mean", True), ("eval/foo", False), ("exact/J", False), ("utility/reward", False),
    ("policy/entropy", True)])
def test_what_a_policy_may_be_chosen_by_is_known_before(tmp_path, name, possible):
    """What the metrics of a training are called besides its evaluation can be known only afterwards."""
    own = {"recipe": "lab_policy", "start": "given",
           "overrides": ["rewards=[{name: mine, function: 'frpo.rewards.length:short'}]"]}
    for key, choose in (("measure", {"measure": name}), ("bounds", {"bounds": {name: [0.0, None]}})):
        made = recipe(tmp_path, policies={"given": {"path": "x"}, "made": own}, choose=choose)
        if possible:
            make_plan(made)
        else:
            with pytest.raises(ConfigError,
                               match=rf"choose.{key} .*'{name}' is not a measure of policies.* Allowed: k"):
                make_plan(made)
    exact = recipe(tmp_path, measure={"kept": BASE, "exact": "a:b", "utility": BASE}, choose={
        "measure": "exact/J", "bounds": {"utility/reward": [0, 1], "sft/utility": [0, 1]}})
    assert make_plan(exact).recipe.choose.measure == "exact/J"
