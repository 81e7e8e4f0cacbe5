"""Mistakes in an estimator of the user are found before anything starts, and named."""
import pytest

from frpo.config.loader import load_recipe
from frpo.errors import ConfigError
from frpo.objectives.base import estimators
from frpo.objectives.trial import try_estimator
from frpo.run.build import tried_objective

SOURCE = '''
from dataclasses import dataclass
import numpy as np
from frpo.objectives.base import GroupAdvantages, valid_rewards

def frozen(cls): return dataclass(frozen=True, kw_only=True)(cls)

@frozen
class Good:
    def advantages(self, rewards_G): return valid_rewards(rewards_G).scatter(lambda r_K: r_K - r_K.mean())
@frozen
class Bare:
    def advantages(self, rewards_G): return rewards_G - rewards_G.mean()
@frozen
class TooFew:
    def advantages(self, rewards_G): return GroupAdvantages(advantages_G=np.zeros(3))
@frozen
class Nan:
    def advantages(self, rewards_G): return GroupAdvantages(advantages_G=rewards_G - rewards_G.mean())
@frozen
class Unjudged:
    def advantages(self, rewards_G): return GroupAdvantages(advantages_G=np.ones(rewards_G.size))
@frozen
class NoArgument:
    def advantages(self): return None
@frozen
class Divides:
    def advantages(self, rewards_G): return valid_rewards(rewards_G).scatter(lambda r_K: [1 / 0])
@frozen
class Shifted:
    def advantages(self, rewards_G): return valid_rewards(rewards_G).scatter(lambda r_K: r_K + 5)
@frozen
class Misspelt:
    def advantage(self, rewards_G): return None
class Plain:
    def advantages(self, rewards_G): return None
def function(rewards_G): return None
'''


@pytest.fixture
def named(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE, encoding="utf-8")
    return lambda name: load_recipe("smoke", [f"objective.advantage={{name: '{path}:{name}'}}"])


@pytest.mark.parametrize("name, message", [
    ("Bare", r"mine.py:Bare: .* returns ndarray; return GroupAdvantages\(advantages_G=...\), such as valid_rewards"),
    ("TooFew", r"returns advantages of shape \(3,\); return one number for each reward, shape \(4,\)"),
    ("Nan", r"a missing reward \(NaN\), returns \[nan, .*; return finite numbers"),
    ("Unjudged", "return 0 for a completion without a reward"),
    ("NoArgument", r"fails in .*: TypeError: NoArgument.advantages\(\) takes 1 positional argument but 2 were given"),
    ("Divides", r"different rewards, fails in .*mine.py, line 28: ZeroDivisionError: division by zero"),
])
def test_a_wrong_estimator_is_named_with_its_mistake(named, name, message):
    with pytest.raises(ConfigError, match=message):
        tried_objective(named(name).model_copy(update={"rollout": load_recipe(
            "smoke", ["rollout.group_size=4"]).rollout}))


@pytest.mark.parametrize("name, message", [
    ("Misspelt", r"has no method advantages \(did you mean 'advantage'\?\); it has advantage"),
    ("Plain", r"is not a dataclass; put @dataclass\(frozen=True, kw_only=True\) above it"),
    ("function", "but is a function; name a class"),
    ("Goood", r"has no 'Goood' \(did you mean 'Good'\?\); it defines Bare, Divides, Good"),
])
def test_what_is_no_estimator_is_said_in_its_own_words(named, name, message):
    with pytest.raises(ConfigError, match=message):
        named(name)


def test_advantages_that_do_not_sum_to_0_are_noted(named):
    note, = tried_objective(named("Shifted"))
    assert "Shifted: the advantages of a group sum to" in note and "subtract their mean, unless this is meant" in note
    assert tried_objective(named("Good")) == []


@pytest.mark.parametrize("size", [2, 3, 8])
def test_every_estimator_of_our_own_passes(size):
    """`given` takes what a scalariser makes; alone it does not sum to 0."""
    for name, cls in estimators().items():
        assert bool(try_estimator(cls(), size)) is (name == "given")


def test_an_estimator_of_the_constraint_is_tried_too(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE, encoding="utf-8")
    rewards = ", ".join(f"{{name: {name}, function: 'frpo.rewards.verifiers:boxed_format', weight: {weight}}}"
                        for name, weight in (("r", 1.0), ("c", 0.0)))
    recipe = load_recipe("smoke", [f"rewards=[{rewards}]", f"objective.constraint={{cost: c, advantage: {{name: "
                                                           f"'{path}:Bare'}}}}"])
    with pytest.raises(ConfigError, match="mine.py:Bare.*returns ndarray"):
        tried_objective(recipe)
