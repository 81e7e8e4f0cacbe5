"""Recipes of reward models: how their kind is told, losses of the user's own, and what is refused with which words."""
from __future__ import annotations

import pickle

import pytest

from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import (
    dump_recipe,
    load_any_recipe,
    load_policy,
    load_recipe,
    load_training,
    recipe_digest,
    recipe_from_dict,
    recipe_names,
)
from frpo.config.preference import RewardModelRecipe
from frpo.config.retention import RetentionRecipe
from frpo.config.sections import Recipe
from frpo.errors import ConfigError
from frpo.objectives.preference import BradleyTerry, Cost

BASE = """
model: {path: some/model, dtype: fp32, max_length: 64}
data: {path: rows.jsonl}
objective: bradley_terry
"""
OWN = '''
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class OnPairs:
    compares: ClassVar[str] = "%s"
    width: float = 1.0

    def loss(self, inputs):
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class OnTokens:
    needs_reference: ClassVar[bool] = False

    def loss(self, inputs, progress):
        raise NotImplementedError
'''


@pytest.fixture
def place(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE, encoding="utf-8")
    return tmp_path


@pytest.fixture
def load(place):
    return lambda *overrides: load_recipe(place / "base.yaml", overrides, RewardModelRecipe)


def test_an_objective_is_a_name_or_a_mapping_and_bradley_terry_by_default(load, place):
    assert load().objective == BradleyTerry()
    assert load("objective=cost").objective == Cost()
    assert load("objective={name: cost, label_noise: 0.1}").objective == Cost(label_noise=0.1)
    assert load("objective.center=0.01").objective == BradleyTerry(center=0.01)
    (place / "bare.yaml").write_text(BASE.replace("objective: bradley_terry\n", ""), encoding="utf-8")
    assert load_recipe(place / "bare.yaml", (), RewardModelRecipe).objective == BradleyTerry()


def test_a_dumped_recipe_is_read_back_also_by_another_process(load):
    recipe = load("objective={name: cost, regularisation: 0.1}", "data.ties=drop")
    assert recipe_from_dict(dump_recipe(recipe), RewardModelRecipe) == recipe == pickle.loads(pickle.dumps(recipe))
    same = [load(), load("learner.num_ranks=2"), load("learner.packing=false"), load("run.device=cpu")]
    assert len({recipe_digest(each) for each in same}) == 1
    assert len({recipe_digest(each) for each in (load(), load("objective=cost"), load("data.ties=drop"),
                                                 load("objective.center=0.1"), load("data.too_long=cut"))}) == 5


def test_the_learner_gets_the_loss_and_no_reference(load):
    spec = load("objective=cost").learner_spec
    assert spec.preference_loss == Cost() and spec.is_reward_model and spec.reference == "none"
    assert spec.supervised_loss is None


@pytest.mark.parametrize("loader", [load_any_recipe, load_training])
def test_kinds_are_told_apart(loader, place):
    assert [type(loader(name)) for name in ("lab_reward_model", "lab_cost_model", "finetune_gsm8k", "smoke")] == [
        RewardModelRecipe, RewardModelRecipe, FinetuneRecipe, Recipe]
    assert type(loader(place / "base.yaml", ["objective=cost"])) is RewardModelRecipe
    assert type(loader(place / "base.yaml", ["objective={name: cost, label_noise: 0.1}"])) is RewardModelRecipe
    assert type(loader(place / "base.yaml", ["objective=sft"])) is FinetuneRecipe


def test_recipes_by_command():
    assert {"lab_reward_model", "lab_cost_model"} <= {*recipe_names("reward-model")}
    assert not {*recipe_names("reward-model")} & ({*recipe_names("finetune")} | {*recipe_names("train")})


@pytest.mark.parametrize("kind, name, told", [
    (Recipe, "lab_reward_model", "lab_reward_model is a recipe of `frpo reward-model`, by its sections; this command "
                                 "takes recipes of `frpo train`"),
    (FinetuneRecipe, "lab_cost_model", "this command takes recipes of `frpo finetune`"),
    (RetentionRecipe, "lab_cost_model", "is a recipe of `frpo reward-model`, by its sections"),
    (RewardModelRecipe, "smoke", "smoke is a recipe of `frpo train`, by its sections; this command takes recipes of "
                                 "`frpo reward-model`"),
    (RewardModelRecipe, "finetune_gsm8k", "finetune_gsm8k is a recipe of `frpo finetune`"),
    (RewardModelRecipe, "lab", "lab is a recipe of `frpo retention`")])
def test_a_recipe_of_another_command_is_told_so(kind, name, told):
    with pytest.raises(ConfigError) as caught:
        load_recipe(name, (), kind)
    assert told in str(caught.value)


def test_a_reward_model_is_no_policy():
    with pytest.raises(ConfigError, match="lab_reward_model is a recipe of `frpo reward-model`; give a recipe of `frpo "
                                          "train` or `frpo finetune`"):
        load_policy("lab_reward_model")


def test_a_loss_of_the_users_own_in_a_file(load, place):
    (place / "mine.py").write_text(OWN % "harm", encoding="utf-8")
    name = f"{place}/mine.py:OnPairs"
    recipe = load(f"objective={{name: '{name}', width: 3.0}}")
    assert (recipe.objective.width, recipe.objective.compares, recipe.objective.name) == (3.0, "harm", name)
    again = recipe_from_dict(dump_recipe(recipe), RewardModelRecipe)  # the file is loaded anew
    assert dump_recipe(again) == dump_recipe(recipe) and dump_recipe(recipe)["objective"]["width"] == 3.0
    for loader in (load_any_recipe, load_training):  # commands that take several kinds
        assert type(loader(place / "base.yaml", [f"objective={name}"])) is RewardModelRecipe
        assert type(loader(place / "base.yaml", [f"objective={place}/mine.py:OnTokens"])) is FinetuneRecipe
    with pytest.raises(ConfigError, match="is a recipe of `frpo reward-model`"):
        load_recipe(place / "base.yaml", [f"objective={name}"])
    with pytest.raises(ConfigError, match="OnPairs' must define needs_reference"):
        load_recipe(place / "base.yaml", [f"objective={name}"], FinetuneRecipe)
    with pytest.raises(ConfigError, match="OnTokens' must define compares"):
        load(f"objective={place}/mine.py:OnTokens")
    with pytest.raises(ConfigError, match="there is no|not found|no such file"):
        load_any_recipe(place / "base.yaml", [f"objective={place}/none.py:OnPairs"])


def test_a_loss_that_compares_something_else_is_refused(load, place):
    (place / "mine.py").write_text(OWN % "length", encoding="utf-8")
    with pytest.raises(ConfigError, match="'better' or 'harm'; given 'length'"):
        load(f"objective={place}/mine.py:OnPairs")


@pytest.mark.parametrize("overrides, message", [
    (["objective=bradly_terry"], "objective: unknown objective 'bradly_terry' (did you mean 'bradley_terry'?)"),
    (["objective={name: csot}"], "objective.name: unknown objective 'csot' (did you mean 'cost'?)"),
    (["objective.center=-1.0"], "objective.center: center must be >= 0, given -1.0"),
    (["objective={name: cost, label_noise: 0.7}"], "objective.label_noise: label_noise must be at least 0 and below"),
    (["objective.centre=0.1"], "objective.centre: unknown key of objective 'bradley_terry': 'centre' (did you mean"),
    (["objective=3"], "objective: a name such as cost or a mapping such as {name: cost} is needed, given 3"),
    (["learner.micro_batch_tokens=127"],
     "learner.micro_batch_tokens = 127 cannot hold a pair of answers of model.max_length = 64 tokens each; raise it to "
     "128 or lower model.max_length"),
    (["model.path=null", "model.tiny={warm_start: {source: prompts}}"], "model.tiny.warm_start.source: prompts needs"),
    (["data.ties=keep"], "data.ties: should be 'half' or 'drop', given 'keep'"),
    (["data.equal=keep"], "data.equal: should be 'refuse' or 'drop', given 'keep'"),
    (["data.contradictry=drop"], "unknown key 'data.contradictry'; did you mean 'contradictory'?"),
    (["data.batch_size=0"], "data.batch_size: should be greater than or equal to 1"),
    (["learner.lr=0.0"], "learner.lr: should be greater than 0"),
])
def test_a_mistake_is_one_line_that_names_the_key(load, overrides, message):
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_pair_that_just_fits_is_allowed(load):
    assert load("learner.micro_batch_tokens=128").learner.micro_batch_tokens == 128
