"""Recipes: inheritance, overrides, messages, round trip and digest."""
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import (
    KINDS,
    NOT_IN_DIGEST,
    dump_recipe,
    load_any_recipe,
    load_recipe,
    recipe_difference,
    recipe_digest,
    recipe_from_dict,
    to_recipe,
)
from frpo.config.reference import key_reference
from frpo.config.sections import Recipe
from frpo.errors import ConfigError
from frpo.objectives.clip import Clip
from frpo.objectives.correction import RolloutCorrection
from frpo.objectives.frpo import FRPO
from frpo.objectives.group import GRPO
from frpo.objectives.gspo import GSPO
from frpo.objectives.reinforce import Reinforce

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))

BASE = """
model: {path: models/some, max_length: 64}
data: {max_prompt_tokens: 16}
rollout: {prompts_per_step: 6, group_size: 4, max_new_tokens: 8}
rewards:
  - {name: exact, function: "a.b:c", kwargs: {tolerance: 1e-6}}
objective: {advantage: {name: frpo, lam: 2.0, guard: shrink}}
learner: {num_ranks: 2, micro_batch_tokens: 64}
"""


@pytest.fixture
def base(tmp_path):
    return write(tmp_path / "base.yaml", BASE)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


# --- files and overrides ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_loads_by_its_name(path):
    recipe = load_any_recipe(path.stem)
    assert recipe == load_recipe(path, kind=type(recipe)) == recipe_from_dict(dump_recipe(recipe), type(recipe))


def test_there_are_recipes():
    assert {"quickstart", "smoke"} <= {path.stem for path in RECIPES}


def test_a_chain_of_bases_merges_key_by_key_and_the_last_word_counts(tmp_path, base):
    write(tmp_path / "middle.yaml",
          "extends: base.yaml\nrun: {seed: 3, name: middle}\nlearner: {lr: 1e-4, num_ranks: 1}")
    (tmp_path / "sub").mkdir()
    path = write(tmp_path / "sub" / "leaf.yaml", "extends: ../middle.yaml\nrun: {name: leaf}")
    recipe = load_recipe(path, ["learner.lr=3e-4", "learner.lr=2e-4", "rollout.group_size=2"])
    assert (recipe.run.name, recipe.run.seed) == ("leaf", 3)
    assert (recipe.learner.lr, recipe.learner.num_ranks, recipe.learner.micro_batch_tokens) == (2e-4, 1, 64)
    assert (recipe.rollout.group_size, recipe.rollout.prompts_per_step) == (2, 6)
    assert recipe.rewards[0].name == "exact"


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_a_base_may_be_a_recipe_of_the_repository(tmp_path, name):
    path = write(tmp_path / "mine.yaml", f"extends: {name}\nrun: {{seed: 5}}")
    expected = dump_recipe(load_recipe("quickstart"))
    expected["run"]["seed"] = 5
    assert dump_recipe(load_recipe(path)) == expected


def test_a_list_is_replaced_whole(base):
    recipe = load_recipe(base, ["rewards=[{name: a, function: x.y:z, weight: -2}, {name: b, function: x.y:z}]"])
    assert [(reward.name, reward.weight, reward.kwargs) for reward in recipe.rewards] == [("a", -2, {}), ("b", 1, {})]


def test_a_circle_of_bases_is_named(tmp_path):
    write(tmp_path / "a.yaml", "extends: b.yaml")
    write(tmp_path / "b.yaml", "extends: a.yaml")
    message = error_of(tmp_path / "a.yaml")
    assert "goes in a circle" in message and message.count("a.yaml") == 3 and "b.yaml" in message
    assert "goes in a circle" in error_of(write(tmp_path / "c.yaml", "extends: c.yaml"))


@pytest.mark.parametrize("text, message", [
    ("extends: nowhere.yaml", r"recipe not found: no file 'nowhere' .*known: .*quickstart"),
    ("extends: [base.yaml]", r"mine.yaml: extends: should be one recipe's name or path, given \['base.yaml'\]"),
    ("- a\n- b", "mine.yaml: a recipe is a mapping of sections, given list"),
    ("false", "mine.yaml: a recipe is a mapping of sections, given bool"),
    ("run: {name: a", "mine.yaml, line 1, column 14: not valid YAML: expected ',' or '}'"),
    ("run:\n  seed: 1\n  seed: 2", "mine.yaml, line 3, column 3: not valid YAML: key 'seed' is given twice"),
    ("run: {}\nrun: {}", "mine.yaml, line 2, column 1: not valid YAML: key 'run' is given twice"),
    ("run: {name: \x01}", "mine.yaml: not valid YAML: unacceptable character"),
    ('run:\n  name: "a\\ud800"', r"mine.yaml, line 2, column 9: not valid YAML: '\\ud800' is a lone surrogate, half"),
    ("", "key 'model' is required"),
    ("run: {name: !!int x}", r"line 1, column 13: not valid YAML: 'x' cannot be read as int; put text into quotes"),
    ("run: {seed: 0x_}", "line 1, column 13: not valid YAML: '0x_' cannot be read as int"),
    ("run: {seed: !!int ''}", "line 1, column 13: not valid YAML: '' cannot be read as int"),
    (f"run: {{seed: {'1' * 5000}}}", "line 1, column 13: not valid YAML: '111.* cannot be read as int"),
    ("run: {seed: !!bool x}", "line 1, column 13: not valid YAML: 'x' cannot be read as bool"),
    ("run: {name: !!timestamp x}", "line 1, column 13: not valid YAML: 'x' cannot be read as timestamp"),
    ("run: {name: !!timestamp 2020-99-99}", "'2020-99-99' cannot be read as timestamp"),
    ("run: !!map [a]", "line 1, column 6: not valid YAML: expected a mapping node, but found sequence"),
    ("run: {? [a, b] : c}", "line 1, column 9: not valid YAML: found unhashable key"),
    ('run: {name: "\\U00110000"}', r"mine.yaml, line 1, column \d+: not valid YAML: chr\(\) arg not in range"),
    ("run: &a [*a]", r"line 1, column 10: not valid YAML: \*a stands inside &a, so it would contain itself"),
    (f"run: {'[' * 101}{']' * 101}", "line 1, column 106: .* nested more than 100 levels deep; make them flatter"),
    ("[" * 5000, "line 1, column 102: not valid YAML: lists and mappings are nested more than 100 levels deep"),
    ('extends: "a\\0b"', r"recipe not found: no file 'a\\x00b' and no recipes/a\\x00b.yaml"),
    (f"extends: {'x' * 300}", "recipe 'xxx.*x cannot be found: File name too long; check the path"),
])
def test_a_malformed_file_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path / "mine.yaml", text))


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"run: {name: \xff}")
    assert "mine.yaml: not UTF-8 (invalid start byte at byte 12)" in error_of(tmp_path / "mine.yaml")


def test_an_unknown_recipe_names_the_known_ones():
    assert "known: " in error_of("quikstart") and "quickstart" in error_of("quikstart")


@pytest.mark.parametrize("text, expected", [
    ("1e-6", 1e-6), ("1E-6", 1e-6), ("1.5e-3", 1.5e-3), ("+2.e+1", 20.0), (".5", 0.5), ("1", 1.0), ("0.25", 0.25)])
def test_scientific_notation_is_a_number_in_files_and_overrides(tmp_path, base, text, expected):
    path = write(tmp_path / "mine.yaml", f"extends: base.yaml\nlearner: {{lr: {text}}}")
    assert load_recipe(path).learner.lr == load_recipe(base, [f"learner.lr={text}"]).learner.lr == expected
    assert load_recipe(base, [f"objective.advantage.lam={text}"]).objective.advantage.lam == expected


@pytest.mark.parametrize("text", ["'1e5'", "2024-01-01", "1e", "e5", "1.2.3"])
def test_text_that_looks_like_a_number_or_a_date_stays_text(base, text):
    recipe = load_recipe(base, [f"run.name={text}", f"rewards=[{{name: a, function: b, kwargs: {{x: {text}}}}}]"])
    assert recipe.run.name == recipe.rewards[0].kwargs["x"] == text.strip("'")


def test_a_number_in_keyword_arguments_of_a_reward_is_one(base):
    assert load_recipe(base).rewards[0].kwargs == {"tolerance": 1e-6}


@pytest.mark.parametrize("override", ["run.name", "=3", "run..name=3", ".run=3"])
def test_an_override_of_another_form_is_shown(base, override):
    assert error_of(base, override) == f"override {override!r} is not of the form section.key=value"


def test_an_override_of_too_many_parts_is_shown_by_its_beginning(base):
    message = error_of(base, "a." * 3000 + "b=1")
    assert message.startswith("override 'a.a.a.") and "nested more than 100 levels deep" in message
    assert len(message) < 400 and len(error_of(base, "x" * 5000)) < 400


def test_an_override_that_is_no_yaml_is_shown(base):
    assert error_of(base, "run.seed=[1").startswith("override 'run.seed=[1', line 1, column 3: not valid YAML")


@pytest.mark.parametrize("overrides", [
    ["objective.advantage.name=grpo"],
    ["objective.advantage.name=rloo", "objective.advantage.name=grpo"]])
def test_another_estimator_drops_the_keys_of_the_old_one(base, overrides):
    assert load_recipe(base, overrides).objective.advantage == GRPO()


@pytest.mark.parametrize("order", [1, -1])
def test_keys_of_the_new_estimator_count_in_any_order(base, order):
    overrides = ["objective.advantage.name=grpo", "objective.advantage.eps=0.5"][::order]
    assert load_recipe(base, overrides).objective.advantage == GRPO(eps=0.5)


def test_the_same_estimator_keeps_its_keys(base):
    overrides = ["objective.advantage.name=frpo", "objective.advantage.scale=unit"]
    assert load_recipe(base, overrides).objective.advantage == FRPO(lam=2.0, guard="shrink", scale="unit")
    assert load_recipe(base, ["objective.advantage.name=grpo", *overrides]).objective.advantage.scale == "unit"


def test_a_surrogate_of_another_name_drops_the_keys_of_the_old_one(tmp_path, base):
    write(tmp_path / "middle.yaml",
          "extends: base.yaml\nobjective: {surrogate: {name: clip, clip_high: 0.28, dual_clip: 3.0}}")
    same = write(tmp_path / "same.yaml", "extends: middle.yaml\nobjective: {surrogate: {name: clip, clip_low: 0.1}}")
    other = write(tmp_path / "other.yaml", "extends: middle.yaml\nobjective: {surrogate: {name: gspo, clip_low: 1e-3}}")
    assert load_recipe(same).objective.surrogate == Clip(clip_low=0.1, clip_high=0.28, dual_clip=3.0)
    assert load_recipe(same, ["objective.surrogate.dual_clip=null"]).objective.surrogate.dual_clip is None
    assert load_recipe(other).objective.surrogate == GSPO(clip_low=1e-3, clip_high=4e-4)
    assert load_recipe(other, ["objective.surrogate.name=reinforce"]).objective.surrogate == Reinforce()
    assert load_recipe(base).objective.surrogate == Clip()


def test_rollout_correction_is_on_until_a_recipe_turns_it_off(base):
    assert load_recipe(base).objective.correction == RolloutCorrection(level="token", mode="truncate", high=2.0)
    assert load_recipe(base, ["objective.correction=null"]).objective.correction is None
    changed = load_recipe(base, ["objective.correction.mode=mask", "objective.correction.low=0.5"]).objective.correction
    assert changed == RolloutCorrection(mode="mask", low=0.5)


REWEIGHT = ["objective.reweight=current", "objective.surrogate.name=reinforce"]


def test_reweighting_is_accepted_where_it_can_work(base):
    recipe = load_recipe(base, [*REWEIGHT, "learner.updates_per_step=3", "learner.epochs_per_step=2"])
    assert recipe.objective.reweight == "current" and recipe.learner.epochs_per_step == 2
    assert load_recipe(base, []).objective.reweight == "frozen"


# --- messages ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("override, message", [
    ("lerner.lr=1", "unknown key 'lerner'; did you mean 'learner'?"),
    ("learner.lrr=1", "unknown key 'learner.lrr'; did you mean 'lr'?"),
    ("model.tiny.warm_start.step=1", "unknown key 'model.tiny.warm_start.step'; did you mean 'steps'?"),
    ("rewards=[{name: a, function: b, wieght: 1}]", "unknown key 'rewards.0.wieght'; did you mean 'weight'?"),
    ("objective.advantage.lamda=1",
     "objective.advantage.lamda: unknown key of advantage 'frpo': 'lamda' (did you mean 'lam'?)"),
    ("objective.advantage.name=frop", "objective.advantage.name: unknown advantage 'frop' (did you mean 'frpo'?)"),
    ("objective.surrogate={name: clip, clip_hi: 1}",
     "objective.surrogate.clip_hi: unknown key of surrogate 'clip': 'clip_hi' (did you mean 'clip_high'?)"),
    ("objective.surrogate.name=cispoo",
     "objective.surrogate.name: unknown surrogate 'cispoo' (did you mean 'cispo'?); allowed: cispo, clip, gspo"),
    ("objective.correction.hi=1", "unknown key 'objective.correction.hi'; did you mean 'high'?"),
    ("run.zzz=1", "unknown key 'run.zzz'; known keys: name, dir, seed"),
    ("7=1", "unknown key '7'; known keys: run, model"),
])
def test_an_unknown_key_is_answered_with_the_nearest_known_one(base, override, message):
    assert message in error_of(base, override)


@pytest.mark.parametrize("override, message", [
    ("run.seed=true", "run.seed: should be a valid integer, given True"),
    ("run.seed=1.0", "run.seed: should be a valid integer, given 1.0"),
    ("run.num_steps=1e3", "run.num_steps: should be a valid integer, given 1000.0"),
    ("run.name=3", "run.name: should be a valid string, given 3"),
    ("run.device=gpu", "run.device: should be 'auto', 'cpu' or 'cuda', given 'gpu'"),
    ("run=null", "run: should be a mapping of keys, given None"),
    ("rollout=5", "rollout: should be a mapping of keys, given 5"),
    ("run.dir.x=3", "run.dir: should be a valid string, given {'x': 3}"),
    ("learner.lr=abc", "learner.lr: should be a valid number, given 'abc'"),
    ("learner.lr=-1", "learner.lr: should be greater than 0, given -1"),
    ("learner.lr=.nan", "learner.lr: should be a finite number, given nan"),
    ("learner.timeout_s=.inf", "learner.timeout_s: should be a finite number, given inf"),
    ("learner.betas=[0.9, 1.0]", "learner.betas.1: should be less than 1, given 1.0"),
    ("learner.betas=['0.9', 0.95]", "learner.betas.0: should be a valid number, given '0.9'"),
    ("learner.betas=[0.9]", "key 'learner.betas.1' is required"),
    ("rollout.group_size=1", "rollout.group_size: should be greater than or equal to 2, given 1"),
    ("rewards=[]", "rewards: should not be empty, given []"),
    ("rewards.0.weight=2", "rewards: should be a list (an override replaces all of it), given {'0': {'weight': 2}}"),
    ("rewards=[{name: a}]", "key 'rewards.0.function' is required"),
    ("objective.advantage=frpo", "objective.advantage: a mapping such as {name: frpo, lam: 1.0} is needed"),
    ("objective.advantage.lam=0", "objective.advantage.lam: lam must be > 0, given 0"),
    ("objective.advantage.lam=-1.5", "objective.advantage.lam: lam must be > 0, given -1.5"),
    ("objective.advantage.lam=many", "objective.advantage.lam: lam of advantage 'frpo' must be a valid number"),
    ("objective.advantage.scale=big", "objective.advantage.scale: scale of advantage 'frpo' must be 'exact', 'unit'"),
    ("objective.advantage.rho=0.1", "objective.advantage.rho: rho needs plug-in weights to compute lam: set estimator"),
    ("objective.surrogate=clip", "objective.surrogate: a mapping such as {name: clip, clip_high: 0.28} is needed"),
    ("objective.surrogate.clip_low=0.1", "objective.surrogate.name: surrogate needs a name, one of cispo, clip, gspo"),
    ("objective.surrogate={name: clip, clip_low: 2}",
     "objective.surrogate.clip_low: clip_low must be in (0, 1), given 2.0"),
    ("objective.surrogate={name: clip, dual_clip: big}",
     "objective.surrogate.dual_clip: dual_clip of surrogate 'clip' must be a valid number, given 'big'"),
    ("objective.correction.level=tokens", "objective.correction.level: should be 'token', 'sequence' or 'geometric'"),
    ("objective.correction.high=-1", "objective.correction.high: should be greater than 0, given -1"),
    ("objective.correction.low=0.5", "objective.correction: low = 0.5 needs mode mask, because mode truncate has"),
    ("objective.truncated=drop", "objective.truncated: should be 'train' or 'mask', given 'drop'"),
    ("learner.epochs_per_step=0", "learner.epochs_per_step: should be greater than or equal to 1, given 0"),
    ("data.heldout_overlap=drop", "data.heldout_overlap: should be 'refuse', 'remove' or 'keep', given 'drop'"),
    ("data.selection.revisit=0", "data.selection.revisit: should be greater than 0, given 0"),
    ("data.selection.momentum=1", "data.selection.momentum: should be less than 1, given 1"),
    ("rewards=[{name: a, function: b, processes: 0}]", "rewards.0.processes: should be greater than or equal to 1"),
    ("rewards=[{name: a, function: b, processes: 2, actor: {}}]", "processes = 2 has no effect with actor; set"),
    ("rewards=[{name: a, function: b, actor: {gpus: 1.5}}]", "a part of one GPU or whole GPUs, given 1.5; set it to 1"),
    ("data.selection={low: 0.9, high: 0.1}", "data.selection: low = 0.9 is above high = 0.1, so every prompt"),
    ("model.tiny.hidden_size=90", "model.tiny: hidden_size = 90 with num_heads = 3: rollout engines on CPU need"),
])
def test_a_wrong_value_is_shown_beside_what_is_allowed(base, override, message):
    assert message in error_of(base, override)


@pytest.mark.parametrize("overrides, message", [
    (["learner.updates_per_step=4"], "rollout.prompts_per_step = 6 groups cannot be split evenly over "
                                     "learner.updates_per_step = 4; change one of them"),
    (["model.max_length=23"], "rollout.max_new_tokens = 24 exceeds model.max_length = 23; lower one .* or raise"),
    (["learner.micro_batch_tokens=23"], "learner.micro_batch_tokens = 23 cannot hold one sequence .* = 24 tokens; "),
    (["objective.reweight=current"], "objective: reweight: current has the ratios in its advantages already, "
                                     r"given surrogate clip; set surrogate to \{name: reinforce\}"),
    ([*REWEIGHT, "objective.advantage.name=rloo"],
     "with this advantage: the estimator rloo has no method `reweighted`; use frpo"),
    ([*REWEIGHT, "objective.advantage.lam=.inf"], "reweighted advantages need a finite lam and no rho, given"),
    ([*REWEIGHT, "objective.advantage.rho=0.3", "objective.advantage.estimator=plugin"], "and no rho, given rho = 0.3"),
    (["data.format=calculator"], "data.path: arithmetic needs format chat or text"),
    (["model.path=null"], "model: give exactly one of model.path .* and model.tiny .*; set the other to null"),
    (["model.tiny={}"], "model: give exactly one of model.path .* and model.tiny .*; set the other to null"),
    (["rewards=[{name: a, function: b}, {name: a, function: c}]"], r"distinct names, given \['a', 'a'\]; rename"),
])
def test_a_combination_that_cannot_work_names_both_sides(base, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(base, overrides)


def test_limits_that_just_fit_are_fine(base):
    recipe = load_recipe(base, ["model.max_length=24", "learner.micro_batch_tokens=24", "learner.updates_per_step=6"])
    assert recipe.model.max_length == 24


def test_every_mistake_is_reported_at_once_each_on_its_line(base):
    lines = error_of(base, "run.seed=-1", "learner.lrr=1", "rollout.top_p=2").splitlines()
    assert len(lines) == 3 and all(line.startswith(f"{base}: ") for line in lines)


# --- dump, digest, difference, reference ------------------------------------------------------------------------------

def test_a_dump_is_plain_and_reads_back_to_an_equal_recipe(base):
    recipe = load_recipe(base, ["objective.advantage.lam=.inf", "learner.betas=[0.8, 0.9]"])
    values = dump_recipe(recipe)
    assert recipe_from_dict(values) == recipe
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(values))) == recipe
    assert values["learner"]["betas"] == [0.8, 0.9] and values["run"]["resume"] == "auto"


def test_a_recipe_cannot_be_changed(base):
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(base).run.seed = 3


SAME = ["run.name=other", "run.dir=elsewhere", "run.num_steps=7", "run.save_every=1", "run.keep_last=9",
        "run.resume=never", "rollout.timeout_s=1", "learner.startup_timeout_s=1", "weight_sync.timeout_s=1",
        "evaluate.every=3", "evaluate.samples=2", "telemetry.traces=false", "checks.parameters_move=false",
        "learner.num_ranks=1", "learner.deepspeed=zero3_offload", "learner.micro_batch_tokens=99", "learner.threads=9",
        "learner.gradient_checkpointing=true", "rollout.num_engines=2", "weight_sync.bucket_mb=7",
        "rewards=[{name: exact, function: 'a.b:c', kwargs: {tolerance: 1e-6}, timeout_s: 5}]",
        "rewards=[{name: exact, function: 'a.b:c', kwargs: {tolerance: 1e-6}, processes: 3}]",
        "rewards=[{name: exact, function: 'a.b:c', kwargs: {tolerance: 1e-6}, actor: {gpus: 0.5, count: 2}}]"]
OTHER = ["run.seed=1", "model.path=models/other", "data.limit=9", "data.selection={}", "data.heldout_overlap=keep",
         "rollout.group_size=8", "learner.lr=1e-3",
         "model.dtype=fp32", "objective.advantage.lam=3.0", "objective.advantage.name=grpo", "shuffle_rewards=true",
         "objective.surrogate={name: clip, clip_high: 0.3}", "objective.correction=null", "objective.truncated=mask",
         "learner.epochs_per_step=2",
         "rewards=[{name: exact, function: 'a.b:c', kwargs: {tolerance: 1e-5}}]",
         "rewards=[{name: exact, function: 'a.b:c', kwargs: {tolerance: 1e-6, timeout_s: 1}}]"]


@pytest.mark.parametrize("override", SAME)
def test_what_a_checkpoint_does_not_depend_on_leaves_the_digest(base, override):
    first, second = load_recipe(base), load_recipe(base, [override])
    assert first != second and recipe_digest(first) == recipe_digest(second)
    assert recipe_difference(dump_recipe(first), dump_recipe(second)) == []


@pytest.mark.parametrize("override", OTHER)
def test_what_is_learned_changes_the_digest_and_is_named(base, override):
    first, second = load_recipe(base), load_recipe(base, [override])
    assert recipe_digest(first) != recipe_digest(second)
    assert recipe_difference(dump_recipe(first), dump_recipe(second))


def test_a_difference_names_key_old_and_new(base):
    first = load_recipe(base)
    second = load_recipe(base, ["learner.lr=1e-3", "objective.advantage.lam=3.0", "run.name=b",
                                "rewards=[{name: exact, function: 'a.b:d'}]"])
    assert recipe_difference(dump_recipe(first), dump_recipe(second)) == [
        "learner.lr: 1e-06 -> 0.001", "objective.advantage.lam: 2.0 -> 3.0",
        "rewards.0.function: a.b:c -> a.b:d", "rewards.0.kwargs.tolerance: 1e-06 -> None"]


def test_a_knob_that_an_older_version_did_not_have_counts_as_null(base):
    """A new optional key must not make every saved run another recipe."""
    values = dump_recipe(load_recipe(base))
    old = values | {"data": {key: value for key, value in values["data"].items() if key != "limit"}}
    assert recipe_difference(old, values) == []


def test_keys_outside_the_digest_exist():
    for section, keys in NOT_IN_DIGEST.items():
        found = set()
        for kind in (Recipe, FinetuneRecipe):
            if section in kind.model_fields:
                model = kind.model_fields[section].annotation
                found |= set(getattr(model, "__args__", (model,))[0].model_fields)
        assert keys <= found


def test_the_reference_lists_every_key_with_default_and_meaning():
    lines = key_reference().splitlines()

    def keys(model, prefix=""):
        for name, field in model.model_fields.items():
            parts = [field.annotation, *getattr(field.annotation, "__args__", ())]
            parts += [inner for part in parts for inner in getattr(part, "__args__", ())]
            inner = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
            if inner:
                many = "[]" if "list" in str(field.annotation) else ".NAME" if "dict" in str(field.annotation) else ""
                yield from keys(inner[0], f"{prefix}{name}{many}.")
            else:
                yield f"{prefix}{name}"

    expected = [key for kind in KINDS for key in keys(kind)]
    found = [line.split(" = ")[0] for line in lines if not line.startswith("# ")]
    assert found == expected and len(expected) > 60
    assert "learner.lr = 1e-06  # peak learning rate of AdamW" in lines
    assert ("rewards[].function = required  # the function, as 'package.module:function' or "
            "'path/file.py:function'") in lines
    assert all(line.split("# ")[1].strip() not in ("", "None") for line in lines)


def test_a_recipe_that_is_not_there_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ones.yaml").write_text("extends: smoke.yaml\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"no file 'onse.yaml' \(did you mean 'ones.yaml'\?\)"):
        load_recipe("onse.yaml")
    with pytest.raises(ConfigError, match=r"no recipes/smok.yaml \(did you mean 'smoke'\?\); known: "):
        load_recipe("smok")


# --- values that no recipe can hold -----------------------------------------------------------------------------------

POLICIES = "policies: {path: {path: x, pth: y}}\nmeasure: {kept: {recipe: smoke}}"


def test_an_unknown_key_of_a_section_under_a_name_is_told_the_keys_beside_it(tmp_path):
    path = write(tmp_path / "mine.yaml", POLICIES)
    with pytest.raises(ConfigError, match=r"unknown key 'policies.path.pth'; did you mean 'path'\?"):
        load_any_recipe(path)
    path = write(tmp_path / "mine.yaml", POLICIES.replace("pth: y", "over: {}") + "\ntables: [{title: a, row: []}]")
    with pytest.raises(ConfigError, match=r"unknown key 'tables.0.row'; did you mean 'rows'\?"):
        load_any_recipe(path)


@pytest.mark.parametrize("override, message", [
    ("run.seed=9223372036854775808", "run.seed: an integer must be below 2\\^63 in size, given one of 64 bits"),
    ("data.limit=99999999999999999999", "data.limit: an integer must be below 2\\^63 in size, given one of 67 bits"),
    ("evaluate.pass_at=[9223372036854775808]", "evaluate.pass_at: an integer must be below"),
    (f"run.dir={'x' * 256}", "run.dir: no path is that long, given 'xxx.*; allowed are 255 bytes for each name"),
    (f"run.dir={'é' * 128}", "run.dir: no path is that long"),
    (f"run.dir={'x/' * 2001}", "run.dir: no path is that long, .* and 4000 for all; shorten it"),
    ('run.resume="a\\0b"', r"run.resume: no path can hold the character NUL, given 'a\\x00b'; remove it"),
    (f"learner.deepspeed={'x' * 300}", "learner.deepspeed: no path is that long"),
    ('rollout.hook="a\\0.py:f"', "rollout.hook: no path can hold the character NUL"),
    ("data.path=[{prompt: a}]", r"data.path: should be a valid string, given \[\{'prompt': 'a'\}\]"),
    ("data.where={a: [!!timestamp 2020-01-01]}", "data.where.a.0: holds date, which the file of a recipe cannot hold"),
    ("data.where={a: [!!binary aGk=]}", "data.where.a.0: holds bytes, which the file"),
    ("data.where={a: [!!set {b}]}", "data.where.a.0: holds set, which the file of a recipe cannot hold; give text"),
    ("run={\"a\\0\": 1}", r"unknown key 'run.a\\x00'"),
])
def test_a_value_that_no_run_can_use_is_refused_by_its_key(base, tmp_path, monkeypatch, override, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        load_recipe(base, [override])
    assert sorted(tmp_path.rglob("*")) == before  # rows of a file are not written to another one


def test_the_largest_numbers_and_names_are_taken(base):
    recipe = load_recipe(base, [f"run.seed={2**63 - 1}", f"run.dir={'x' * 255}", f"data.where={{a: [{10**30}]}}"])
    assert (recipe.run.seed, recipe.run.dir, recipe.data.where) == (2**63 - 1, "x" * 255, {"a": [10**30]})


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("where, message", [
    ({"a": ["\ud800"]}, r"data.where.a.0: holds the lone surrogate '\\ud800', half a character; write the whole one"),
    ({"\udfff": [1]}, r"data.where.\\udfff: the key has a lone surrogate, half a character"),
    ({"a": [object]}, "data.where.a.0: holds type, which the file of a recipe cannot hold"),
    ({"a": [10**4300]}, "data.where.a.0: holds an integer of more than 4300 digits; write it as text"),
    ({"a": [deep(200)]}, "data.where.a.*: lists and mappings are nested more than 100 levels deep"),
    ({"a": [deep(5000)]}, "recipe: lists and mappings are nested more than 100 levels deep"),
    (deep(5000), "data.where: should be a valid dictionary, given list that is too large to show"),
    pytest.param(10**5000, "data.where: should be a valid dictionary, given int that is too large to show", id="int")])
def test_a_value_of_python_that_no_file_could_hold_is_refused(where, message):
    with pytest.raises(ConfigError, match=message):
        to_recipe({"extends": "smoke", "data": {"where": where}}, (), Recipe)


def test_mappings_of_python_without_end_are_refused():
    endless = {}
    endless["run"] = endless
    with pytest.raises(ConfigError, match="recipe: lists and mappings are nested more than 100 levels deep"):
        to_recipe(endless, (), Recipe)


def test_control_characters_of_an_error_are_shown_and_not_sent_to_the_terminal():
    assert str(ConfigError("a\x1b[31m\0\ud800 é\n\t日本")) == "a\\x1b[31m\\x00\\ud800 é\n\t日本"
