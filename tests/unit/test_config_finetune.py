"""Recipes of supervised fine-tuning: the objective by name or as a mapping, and what is refused with which words."""
from __future__ import annotations

import pytest

from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import load_any_recipe, load_recipe, recipe_digest, recipe_from_dict
from frpo.config.sections import Recipe
from frpo.errors import ConfigError
from frpo.objectives.csft import CSFT, CSFTPA
from frpo.objectives.supervised import SFT

BASE = """
model: {path: some/model, dtype: fp32, max_length: 64}
data: {path: rows.jsonl}
objective: csft_pa
"""


@pytest.fixture
def load(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE, encoding="utf-8")

    def load(*overrides, text=None):
        path = tmp_path / "base.yaml"
        if text is not None:
            path = tmp_path / "recipe.yaml"
            path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides, FinetuneRecipe)

    return load


def test_an_objective_is_a_name_or_a_mapping_and_overrides_go_into_either(load):
    assert load().objective == CSFTPA()
    assert load("objective=sft").objective == SFT()
    assert load("objective.delta_end=0.5").objective == CSFTPA(delta_end=0.5)
    assert load("objective={name: csft, beta_first: 2.0}").objective == CSFT(beta_first=2.0)
    assert load(text="extends: base.yaml\nobjective: {name: csft, floor: 0.1}").objective == CSFT(floor=0.1)


def test_a_dumped_recipe_is_read_back(load):
    from frpo.config.loader import dump_recipe

    recipe = load("objective.mu_max=10.0", "reference.mode=cache")
    assert recipe_from_dict(dump_recipe(recipe), FinetuneRecipe) == recipe
    assert type(load_any_recipe("finetune_gsm8k")) is FinetuneRecipe and type(load_any_recipe("smoke")) is Recipe


def test_where_the_reference_lies_is_not_what_is_learned(load):
    same = [load(), load("reference.mode=cache"), load("learner.num_ranks=2"), load("reference.cache_dir=elsewhere")]
    assert len({recipe_digest(recipe) for recipe in same}) == 1
    assert len({recipe_digest(recipe) for recipe in (load(), load("objective=csft"), load("reference.path=b"),
                                                     load("run.num_epochs=2"), load("data.batch_size=3"))}) == 5


@pytest.mark.parametrize("overrides, updates", [
    (["run.num_epochs=1"], 12), (["run.num_epochs=3"], 36), (["run.num_epochs=0.5"], 6), (["run.num_epochs=1.25"], 15),
    (["run.num_epochs=0.001"], 1), (["run.max_steps=5"], 5), (["run.max_steps=40"], 40)])
def test_the_length_of_a_run_in_updates(load, overrides, updates):
    assert load(*overrides).run.updates(per_epoch=12) == updates


@pytest.mark.parametrize("override", ["run.num_epochs=0", "run.num_epochs=-0.5", "run.max_steps=0"])
def test_a_run_of_no_updates_is_refused(load, override):
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        load(override)


@pytest.mark.parametrize("overrides, message", [
    (["objective=csfd"], "objective: unknown objective 'csfd' (did you mean 'csft'?); allowed: csft, csft_pa, kl_sft"),
    (["objective={name: csfd}"], "objective.name: unknown objective 'csfd' (did you mean 'csft'?)"),
    (["objective.beta_first=0.0"], "objective.beta_first: beta_first must be > 0, given 0.0"),
    (["objective.delta_start=-0.1"], "objective.delta_start: delta_start must be >= 0, given -0.1"),
    (["objective.detla_end=0.1"], "objective.detla_end: unknown key of objective 'csft_pa': 'detla_end' (did you mean"),
    (["objective=3"], "objective: a name such as csft_pa or a mapping such as {name: csft} is needed, given 3"),
    (["learner.micro_batch_tokens=32"], "learner.micro_batch_tokens = 32 cannot hold an example of model.max_length ="),
    (["learner.ranks=process", "learner.num_ranks=2"],
     "learner: ranks: process has one rank, given num_ranks = 2; set"),
    (["model.path=null", "model.tiny={warm_start: {source: prompts}}"], "model.tiny.warm_start.source: prompts needs"),
    (["run.num_epochs=abc"], "run.num_epochs: should be a valid number, given 'abc'"),
    (["run.num_steps=3"], "unknown key 'run.num_steps'; did you mean"),
])
def test_a_mistake_is_one_line_that_names_the_key(load, overrides, message):
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_of_the_other_command_is_told_so(tmp_path):
    with pytest.raises(ConfigError, match="smoke is a recipe of `frpo train`, by its sections; this "
                                          "command takes recipes of `frpo finetune`"):
        load_recipe("smoke", kind=FinetuneRecipe)
    with pytest.raises(ConfigError, match="finetune_gsm8k is a recipe of `frpo finetune`"):
        load_recipe("finetune_gsm8k")


def test_an_auxiliary_term_needs_a_reference_if_its_loss_does():
    auxiliary = "auxiliary={objective: %s, data: {path: rows.jsonl}}"
    off = "objective.kl_coef=0.0"
    assert load_recipe("smoke", [off]).learner_spec.reference == "none"
    assert load_recipe("smoke", [off, auxiliary % "sft"]).learner_spec.reference == "none"
    spec = load_recipe("smoke", [off, auxiliary % "{name: csft, floor: 0.1}"]).learner_spec
    assert spec.reference == "live" and spec.supervised_loss == CSFT(floor=0.1)
    with pytest.raises(ConfigError, match=r"auxiliary.objective.floor: floor must be in \[0, 2\), given 3.0"):
        load_recipe("smoke", [auxiliary % "{name: csft, floor: 3.0}"])
