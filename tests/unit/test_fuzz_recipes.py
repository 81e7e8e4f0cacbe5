"""Recipes changed at random: each is a valid recipe or one ConfigError in plain words, and a dry run writes nothing."""
from __future__ import annotations

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from frpo.config.finetune import FinetuneRecipe
from frpo.config.keys import keys
from frpo.config.loader import (
    KINDS,
    load_any_recipe,
    load_policy,
    load_recipe,
    load_training,
    recipe_digest,
    recipe_from_dict,
    recipe_text,
    to_recipe,
)
from frpo.config.preference import RewardModelRecipe
from frpo.config.retention import RetentionRecipe
from frpo.config.sections import Recipe
from frpo.config.text import parse_yaml
from frpo.errors import ConfigError
from odd_values import LONG, any_values, assert_plain, fuzzed, plain_values

STARTS = {
    Recipe: ("smoke", "lab_policy", "frpo_safety_mistral_7b", "safe_rlhf", "smollm2_constrained", "gsm8k_calculator"),
    FinetuneRecipe: ("finetune_gsm8k", "csft_llama2_7b_chat", "quickstart_downstream"),
    RewardModelRecipe: ("lab_reward_model", "safe_rlhf_cost_model"),
    RetentionRecipe: ("quickstart_retention", "lab", "retention_csft_llama2_7b")}
STARTING_VALUES = {name: yaml.safe_load(recipe_text(name)) for names in STARTS.values() for name in names}
"""Valid recipes, without `extends`, from which the changes start."""
KNOWN = {kind: [key.name for key in keys(kind)] for kind in KINDS}

SNIPPETS = ["!!python/object/apply:os.getcwd []", "!!python/name:os.getcwd", "!!binary x", "!!binary aGk=", "!!set {a}",
            "!!set [a]", "!!omap [a: 1]", "!!omap x", "!!pairs [a: 1]", "!!map [a]", "!!map x", "!!seq {a: b}",
            "!!str [a]", "!!str {a: b}", "!!timestamp x", "!!timestamp 2020-01-01", "!!timestamp 2020-99-99", "!!int x",
            "!!int ''", "!!float x", "!!bool x", "!!null x", "!foo x", "!foo", "!<tag:yaml.org,2002:int> x", "!", "!!",
            "&a", "*a", "&a [*a]", "&a {b: *a}", "&a [1, 2]", "<<: *a", "{<<: [1]}", "{<<: {a: 1}}", "{<<: 1}",
            "{<<: [{a: 1}, {a: 2}]}", "{? [a, b] : c}", "{? {a: b} : c}", "{[a]: b}", "{{}: b}", "{? a}", "{: a}",
            "{=: 1}", "=", "{1: 2}", "{null: 1}", "{true: 1}", "{.nan: 1}", "{a: 1, a: 2}", "{1: a, 01: b}", "- ", ": ",
            ":", "{", "}", "[", "]", ",", "\t", "\n\t", "\0", "\x85", "\u2028", "\ufeff", "\x7f", "%YAML 9.9",
            "%TAG ! x", "---", "\n---\n", "\n--- a\n--- b\n", "...", "\n...\n", "0x_", "0b_", "0b2", "0o7", "1_000",
            "1:61", "1:99:99", "-", "+", ".", "_", "08", "1e999", "-1e999", "1e", ".inf", "-.INF", ".nan", "'", '"',
            '"\\x"', '"\\ud800"', '"\\U00110000"', '"\\0"', "|", ">", "|9", "|\n x", "@", "`", "%", "#", " #", "? ",
            "[" * 100, "[" * 1500, "{a: " * 1500, "[" * 1500 + "]" * 1500, "{a: " * 1500 + "}" * 1500, "- " * 1500,
            "1" * 5000, "x" * LONG, "extends: mine.yaml\n", "extends: other.yaml\n", "extends: smoke\n",
            "extends: nowhere\n", "extends: .\n", "extends: ''\n", "extends: [smoke]\n", "extends: {}\n",
            "extends: 3\n", 'extends: "a\\0b"\n', f"extends: {'x' * LONG}\n", "extends: a/../../b\n", "run: 1\n",
            "rewards: x\n", "objective: x\n", "policies: []\n", "objective: cost\n", "objective: csft\n",
            "objective: [sft]\n", "objective: {name: {}}\n", "1: 2\n", "null\n", "x\n"]
"""Pieces of YAML that are odd, dangerous to a careless reader, or broken."""

ENCODINGS = ["utf-8"] * 8 + ["utf-8-sig", "utf-16", "latin-1", "utf-32"]

ODD_OVERRIDES = ["", "=", "==", "a", "a=", "=a", "a.=1", ".a=1", "a..b=1", ".=1", "run=", "run.seed", "run.seed==1",
                 "run.seed= 1", " run.seed=1", "run .seed=1", "run.seed.x=1", "run.seed.x.y=1", "run={}", "run=null",
                 "run=[]", "rewards.0.name=x", "rewards.name=x", "rewards=x", "rewards=[]", "rewards={}",
                 "extends=smoke", "extends=x", "model=null", "model.tiny=", "model.path=", "data.where={a: 1}",
                 "data.where.a=[1]", "data.where.a=1", "é.x=1", "run.é=1", "run.\0=1", "run.seed=\0",
                 "run.name=\x1b[1m", "\x1b[1m=1", "\ud800=1", "run.name=\ud800", "run.name=\udcff", "a.b.c.d.e.f.g=1",
                 "1.2=3", f"{'x' * LONG}=1", f"run.{'x' * LONG}=1", f"run.name={'x' * LONG}", f"{'a.' * 1000}b=1",
                 f"{'a.' * 3000}b=1", "objective=1", "objective=frpo", "objective.name=csft", "objective.name=1",
                 "objective.advantage=grpo", "objective.advantage=1", "objective.advantage.name=x",
                 "objective.advantage.lam=x", "objective.surrogate=clip", "objective.surrogate=[]",
                 "placement=colocate", "placement=1", "placement.mode=x", "policies.x=1", "policies={}",
                 "policies..path=x", "learner.lr=1_0", "learner.lr=1e-3", "learner.lr=1:30", "learner.betas=[1]",
                 "learner.betas=0.9"]


DEPTH = 8
"""Levels of a recipe that changes reach. Values below are shared between cases, and stay as they are."""


def copied(value, depth=DEPTH):
    """A copy of the lists and mappings of a value, down to this depth."""
    if isinstance(value, dict) and depth:
        return {key: copied(item, depth - 1) for key, item in value.items()}
    return [copied(item, depth - 1) for item in value] if isinstance(value, list) and depth else value


def slots(value, path=()):
    """The paths of the values of a recipe, from outside to inside."""
    yield path
    if len(path) == DEPTH - 1:
        return
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from slots(item, (*path, key))


def within(value, path):
    for part in path:
        value = value[part]
    return value


def key_path(values, name):
    """The path of a known key such as rewards[].name in these values; sections that they lack are made."""
    path = []
    for part in name.split("."):
        here = within(values, path)
        if part == "NAME" and isinstance(here, dict):
            path.append(next(iter(here), "x"))
        else:
            path.append(part.removesuffix("[]"))
        here = within(values, path[:-1])
        if not isinstance(here, dict):
            return None
        if not isinstance(here.get(path[-1]), dict | list):
            here[path[-1]] = {}
        if part.endswith("[]"):
            if not (isinstance(here[path[-1]], list) and here[path[-1]]):
                return None
            path.append(0)
    return path


def misspelt(draw, key):
    near = [key.upper(), f"{key}s", key[:-1], key[1:], key.replace("_", "-"), f" {key}", f"{key} ", key * 2, "é", ""]
    return draw(st.sampled_from(near + ["lr", "learning_rate", "name", "x" * LONG, "a.b", "\0", "num_generations"]))


def changed(draw, kind, values, odd):
    """Change one thing of a recipe's values in place."""
    how = draw(st.sampled_from(["replace", "known", "known", "drop", "rename", "add", "repeat", "swap"]))
    if how == "known":
        path = key_path(values, draw(st.sampled_from(KNOWN[kind])))
        if path is not None:
            within(values, path[:-1])[path[-1]] = copied(draw(odd))
        return
    paths = [path for path in slots(values) if path]
    if not paths:
        return
    path = draw(st.sampled_from(paths))
    holder, last = within(values, path[:-1]), path[-1]
    if how == "replace":
        holder[last] = copied(draw(odd))
    elif how == "drop":
        del holder[last]
    elif how == "rename" and isinstance(holder, dict):
        holder[misspelt(draw, str(last))] = holder.pop(last)
    elif how == "add" and isinstance(holder, dict):
        holder[misspelt(draw, str(last))] = copied(draw(odd))
    elif how == "repeat" and isinstance(holder, list):
        holder.append(copied(holder[last]))
    elif how == "swap":
        other = draw(st.sampled_from(paths))
        holder[last] = copied(within(values, other))


@st.composite
def recipes(draw, odd, most=3):
    """A kind of recipe, and the values of a valid one with up to three changes."""
    kind = draw(st.sampled_from(KINDS))
    values = copied(STARTING_VALUES[draw(st.sampled_from(STARTS[kind]))])
    for _ in range(draw(st.integers(0, most))):
        changed(draw, kind, values, odd)
    return kind, values


@st.composite
def files(draw):
    """A kind of recipe, and the bytes of a file: YAML of changed values with up to two changes of its text."""
    kind, values = draw(recipes(plain_values, most=2))
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=draw(st.booleans()))
    for _ in range(draw(st.integers(0, 2))):
        places = [match.end() for match in re.finditer(r": |- |\n", text)] or [0]
        place = draw(st.sampled_from(places))
        until = text.find("\n", place)
        rest = draw(st.sampled_from([text[place:], text[until:] if until >= 0 else "", ""]))
        text = text[:place] + draw(st.sampled_from(SNIPPETS)) + rest
    return kind, text.encode(draw(st.sampled_from(ENCODINGS)), "replace")


@st.composite
def overrides(draw, kind):
    if draw(st.booleans()):
        return draw(st.sampled_from(ODD_OVERRIDES))
    key = draw(st.sampled_from(KNOWN[kind])).replace("[]", draw(st.sampled_from(["", ".0", "[0]"])))
    value = draw(plain_values.map(str) | st.sampled_from(SNIPPETS))
    return f"{key}={value}"


def outcome(read, *arguments):
    """Read a recipe: None if it is refused in plain words. A valid one must survive being written and read again."""
    try:
        recipe = read(*arguments)
    except ConfigError as error:
        assert_plain(str(error))
        return None
    assert type(recipe) in KINDS
    again = recipe_from_dict(parse_yaml(recipe.to_yaml(), "again"), type(recipe))
    assert again == recipe or ".nan" in recipe.to_yaml()  # which equals nothing
    if not isinstance(recipe, RetentionRecipe):
        assert recipe_digest(recipe) == recipe_digest(again)
    return recipe


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A working folder of its own, with a recipe that goes in a circle with mine.yaml."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "other.yaml").write_text("extends: mine.yaml\nrun: {name: other}\n")
        yield folder


def any_file(place, kind, content, changes):
    (place / "mine.yaml").write_bytes(content)
    outcome(load_recipe, "mine.yaml", changes, kind)
    if changes:
        outcome(load_any_recipe, "mine.yaml")
    else:
        outcome(load_training, "mine.yaml")
        outcome(load_policy, "mine.yaml")


def any_values_of_python(kind, values, changes):
    outcome(to_recipe, dict(values), changes, kind)
    outcome(recipe_from_dict, dict(values), kind)


def file_case(place, data):
    if data.draw(st.integers(0, 30)) == 0:
        outcome(load_any_recipe, data.draw(plain_values.map(str)), data.draw(st.lists(overrides(Recipe), max_size=1)))
        return
    kind, content = data.draw(files())
    any_file(place, kind, content, data.draw(st.lists(overrides(kind), max_size=2)))


def values_case(place, data):
    if data.draw(st.integers(0, 30)) == 0:
        outcome(to_recipe, data.draw(any_values), data.draw(st.lists(overrides(Recipe), max_size=1)), Recipe)
        return
    kind, values = data.draw(recipes(any_values))
    any_values_of_python(kind, values, data.draw(st.lists(overrides(kind), max_size=2)))


@fuzzed(600)
@given(st.data())
def test_a_changed_file_is_a_recipe_or_one_message(place, data):
    kind, content = data.draw(files())
    any_file(place, kind, content, data.draw(st.lists(overrides(kind), max_size=2)))


@fuzzed(400)
@given(st.data())
def test_changed_values_are_a_recipe_or_one_message(place, data):
    kind, values = data.draw(recipes(any_values))
    any_values_of_python(kind, values, data.draw(st.lists(overrides(kind), max_size=2)))
