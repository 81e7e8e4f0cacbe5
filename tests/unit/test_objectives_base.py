"""The estimator registry, building from a recipe's values, and the baselines GRPO, Dr. GRPO, RLOO."""
from __future__ import annotations

import math
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from frpo.config.loader import recipe_from_dict
from frpo.errors import RewardError
from frpo.objectives.base import (
    AdvantageEstimator,
    GroupAdvantages,
    LossInputs,
    Surrogate,
    build_estimator,
    build_surrogate,
    estimator,
    estimators,
    surrogates,
    valid_rewards,
)
from frpo.objectives.cispo import CISPO
from frpo.objectives.clip import Clip
from frpo.objectives.frpo import FRPO
from frpo.objectives.group import GRPO, RLOO, DrGRPO
from frpo.objectives.gspo import GSPO
from frpo.objectives.reduction import REDUCTIONS, token_weights
from frpo.objectives.reinforce import Reinforce


@dataclass(frozen=True, kw_only=True)
class Doubled:
    """An estimator of a user, outside the package."""

    factor: float = 2.0
    needed: int

    def advantages(self, rewards_G):
        return valid_rewards(rewards_G).scatter(lambda r_K: self.factor * (r_K - r_K.mean()))


class NoDataclass:
    def advantages(self, rewards_G):
        return GroupAdvantages(advantages_G=rewards_G)


@dataclass(frozen=True, kw_only=True)
class Silent:
    """A surrogate of a user that does not say whether it needs whole sequences."""

    def objective(self, tokens):
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Own(Silent):
    whole_sequences = True


def test_every_file_of_the_package_is_found():
    assert {"frpo": FRPO, "grpo": GRPO, "dr_grpo": DrGRPO, "rloo": RLOO}.items() <= estimators().items()
    assert all(isinstance(cls(), AdvantageEstimator) and cls.name == name for name, cls in estimators().items())
    assert not isinstance(NoDataclass(), AdvantageEstimator)


def test_surrogates_are_found_apart_from_estimators():
    assert {"clip": Clip, "gspo": GSPO, "cispo": CISPO, "reinforce": Reinforce}.items() <= surrogates().items()
    assert all(isinstance(cls(), Surrogate) and cls.name == name for name, cls in surrogates().items())
    assert not surrogates().keys() & estimators().keys()


def test_surrogates_are_built_like_estimators():
    assert build_surrogate({"name": "clip", "clip_low": 0.1, "dual_clip": 3}) == Clip(clip_low=0.1, dual_clip=3.0)
    assert build_surrogate({"name": "gspo"}) == GSPO(clip_low=3e-4, clip_high=4e-4)
    own = build_surrogate({"name": f"{__name__}:Own"})
    assert own == Own() and own.name == f"{__name__}:Own"


def test_a_class_in_a_file_is_found_and_a_recipe_takes_it_to_another_process(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from frpo.objectives.group import GRPO\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Halved(GRPO):\n"
        "    share: float = 0.5\n")
    name = f"{tmp_path}/mine.py:Halved"
    recipe = recipe_from_dict({"model": {"tiny": {}}, "objective": {"advantage": {"name": name, "share": 0.25}},
                               "rewards": [{"name": "any", "function": "a:b"}]})
    travels = pickle.dumps(recipe)
    other = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()).objective.advantage)"
    done = subprocess.run([sys.executable, "-c", other], input=travels, capture_output=True, timeout=120, check=True)
    assert done.stdout.decode().strip() == "Halved(eps=0.0001, share=0.25)"
    with pytest.raises(ValueError, match=r"mine.py has no 'Halve' \(did you mean 'Halved'\?\)"):
        build_estimator({"name": f"{tmp_path}/mine.py:Halve"})


@pytest.mark.parametrize("values, message", [
    ({"name": "clipp"}, r"unknown surrogate 'clipp' \(did you mean 'clip'\?\); allowed: cispo, clip, gspo, rein"),
    ({"name": "frpo"}, "unknown surrogate 'frpo'"),
    ({"clip_low": 0.1}, "surrogate needs a name, one of cispo, clip, gspo, reinforce, 'package.module:Class' or 'path"),
    ({"name": "clip", "cliplow": 0.1}, r"unknown key of surrogate 'clip': 'cliplow' \(did you mean 'clip_low'\?\)"),
    ({"name": "cispo", "clip_low": "none"}, "clip_low of surrogate 'cispo' must be a valid number, given 'none'"),
    ({"name": f"{__name__}:NoDataclass"}, r"must be a dataclass with a method objective\(tokens\)"),
    ({"name": f"{__name__}:Silent"}, "Silent' must define whole_sequences"),
])
def test_mistakes_in_surrogates_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        build_surrogate(values)


def test_a_fresh_process_finds_estimators_that_nobody_imported():
    script = "from frpo.objectives.base import build_estimator; print(build_estimator({'name': 'rloo'}))"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert told.stdout == "RLOO()\n", told.stderr


def test_build_by_name_turns_integers_into_floats():
    values = {"name": "frpo", "lam": 2, "estimator": "plugin", "rho": None}
    built = build_estimator(values)
    assert built == FRPO(lam=2.0, estimator="plugin") and type(built.lam) is float
    assert values["name"] == "frpo", "the caller's values must stay"


def test_build_by_path_keeps_a_name_that_can_be_rebuilt():
    path = f"{__name__}:Doubled"
    built = build_estimator({"name": path, "needed": 3})
    assert built.name == path
    assert built.advantages(np.array([1.0, 3.0])).advantages_G.tolist() == [-2.0, 2.0]
    own = build_estimator({"name": "frpo.objectives.group:RLOO"})
    assert own == RLOO() and own.name == "rloo"


@pytest.mark.parametrize("values, message", [
    ({"name": "frop"}, r"unknown advantage 'frop' \(did you mean 'frpo'\?\).*frpo, given, grpo, rloo.*module:Class"),
    ({"lam": 1.0}, "advantage needs a name"),
    ({"name": "frpo", "lambda": 1.0}, r"'frpo': 'lambda' \(did you mean 'lam'\?\); allowed: lam, estimator, scale"),
    ({"name": "rloo", "eps": 1.0}, "'eps'; allowed: none"),
    ({"name": "frpo", "lam": "x"}, "lam of advantage 'frpo' must be a valid number, given 'x'$"),
    ({"name": "frpo", "lam": "1e-3"}, r"given '1e-3' \(text, not a number: write 0\.001\)"),
    ({"name": "frpo", "lam": True}, "lam of advantage 'frpo' must be a valid number, given True"),
    ({"name": "frpo", "rho": True}, "rho of advantage 'frpo' must be a valid number, given True"),
    ({"name": "frpo", "scale": "exakt"}, "scale of advantage 'frpo' must be 'exact', 'unit' or 'max1', given 'exakt'"),
    ({"name": "frpo", "lam": -1}, r"lam must be > 0, given -1\.0"),
    ({"name": "grpo", "eps": -1}, r"eps must be >= 0, given -1\.0"),
    ({"name": "no.such:Thing"}, "advantage 'no.such:Thing': there is no module 'no' on sys.path"),
    ({"name": f"{__name__}:Missing"}, "Missing"),
    ({"name": f"{__name__}:NoDataclass"}, "must be a dataclass with a method advantages"),
    ({"name": f"{__name__}:Doubled"}, "needs a value for 'needed'"),
])
def test_mistakes_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        build_estimator(values)


def test_a_name_is_not_taken_twice():
    with pytest.raises(ValueError, match="'frpo' is already taken by frpo.objectives.frpo:FRPO"):
        estimator("frpo")(Doubled)
    assert estimators()["frpo"] is FRPO


@pytest.mark.parametrize("built, expected", [
    # r = (1, 2, 6): mean 3, unbiased std sqrt((4 + 1 + 9)/2) = sqrt 7
    (GRPO(eps=0.0), [-2 / math.sqrt(7), -1 / math.sqrt(7), 3 / math.sqrt(7)]),
    (GRPO(eps=1.0), [-2 / (math.sqrt(7) + 1), -1 / (math.sqrt(7) + 1), 3 / (math.sqrt(7) + 1)]),
    (DrGRPO(), [-2.0, -1.0, 3.0]),
    (RLOO(), [1 - 4.0, 2 - 3.5, 6 - 1.5]),
])
def test_baselines_by_hand(built, expected):
    assert built.advantages(np.array([1.0, 2.0, 6.0])).advantages_G == pytest.approx(expected)


@pytest.mark.parametrize("name", ["frpo", "grpo", "dr_grpo", "rloo"])
def test_missing_rewards_are_treated_alike(name):
    built = build_estimator({"name": name})
    result = built.advantages([None, 1.0, math.inf, 2.0, math.nan, 6.0])
    whole = built.advantages([1.0, 2.0, 6.0]).advantages_G
    assert result.advantages_G.tolist() == [0.0, whole[0], 0.0, whole[1], 0.0, whole[2]]
    assert {"abstained": 2.0, "invalid": 1.0, "zero_advantage": 0.0}.items() <= result.stats.items()
    for flat in ([0.1] * 3 + [math.nan], [5.0, math.nan], [math.nan], []):
        nothing = built.advantages(np.array(flat))
        assert nothing.advantages_G.tolist() == [0.0] * len(flat) and nothing.stats["zero_advantage"] == 1.0


@pytest.mark.parametrize("size", [1e149, -1e150])
@pytest.mark.parametrize("values, power", [
    ({"name": "grpo"}, 0), ({"name": "dr_grpo"}, 1), ({"name": "rloo"}, 1), ({"name": "frpo", "lam": math.inf}, 1),
    ({"name": "frpo", "estimator": "plugin", "rho": 0.1, "scale": "exact"}, 1),
    ({"name": "frpo", "estimator": "plugin", "rho": 0.1, "scale": "unit"}, 0)])
def test_vast_rewards_have_the_advantages_of_ordinary_ones_at_their_scale(values, power, size):
    """None of these depends on the unit of the reward; GRPO's eps is nothing beside a standard deviation of 1e10."""
    rewards = np.array([1.0, 0.0, 0.0, -0.5])
    vast = build_estimator(values).advantages(size * rewards).advantages_G
    ordinary = build_estimator(values).advantages(math.copysign(1e10, size) * rewards).advantages_G
    assert (vast / abs(size) ** power).tolist() == pytest.approx((ordinary / 1e10 ** power).tolist(), rel=1e-9)
    assert vast.all()


@pytest.mark.parametrize("values", [{}, {"lam": 0.1, "scale": "exact"}, {"scale": "unit", "guard": "shrink"},
                                    {"estimator": "plugin"}])
def test_with_a_temperature_of_its_own_frpo_sees_only_the_worst_of_vast_rewards(values):
    """p is 1 at the worst: the plug-in gives it s (1 - k), the others s."""
    result = build_estimator({"name": "frpo", **values}).advantages(np.array([1e149, 0.0, -1e150, 1e150]))
    assert np.isfinite(result.advantages_G).all() and result.advantages_G.argmin() == 2
    assert all(math.isfinite(value) for value in result.stats.values()) and result.stats["max_weight"] == 1.0
    if "estimator" in values:
        assert result.advantages_G.tolist() == [1.0, 1.0, -3.0, 1.0]


@pytest.mark.parametrize("name", ["frpo", "grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("size", [1.01e150, -1e200, 1e308])
def test_a_reward_whose_square_is_no_number_is_refused(name, size):
    """GRPO would give the whole group 0, RLOO infinity."""
    said = f"has the rewards [{size}, 0.0, nan]; allowed is -1e+150 to 1e+150"
    with pytest.raises(RewardError, match=re.escape(said)):
        build_estimator({"name": name}).advantages([size, 0.0, None])


def test_rewards_of_many_groups_are_refused():
    with pytest.raises(ValueError, match=r"one-dimensional, given shape \(2, 2\)"):
        RLOO().advantages(np.ones((2, 2)))


def test_loss_inputs_refuse_to_broadcast():
    flat, column = torch.zeros(3), torch.zeros(3, 1)
    with pytest.raises(AssertionError, match="all tensors of LossInputs must have one shape"):
        LossInputs(logprobs_N=flat, old_logprobs_N=flat, ref_logprobs_N=None, advantage_N=column, policy_weight_N=flat,
                   kl_weight_N=flat, mask_N=flat.bool(), rollout_logprobs_N=None, sequence_N=flat.long())


@pytest.mark.parametrize("reduction, expected", [
    # N = 4 sequences of 2, 0, 3, 5 tokens, L_max 10
    ("seq-mean-token-mean", [1 / 8, 0, 1 / 12, 1 / 20]),
    ("seq-sum", [1 / 4, 0, 1 / 4, 1 / 4]),
    ("token-mean", [1 / 10, 0, 1 / 10, 1 / 10]),
    ("fixed-length", [1 / 40, 0, 1 / 40, 1 / 40]),
])
def test_token_weights(reduction, expected):
    weights = token_weights(reduction, np.array([2, 0, 3, 5]), 10)
    assert weights.dtype == np.float64 and weights == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("reduction", sorted(REDUCTIONS))
def test_only_empty_sequences_weigh_nothing(reduction):
    assert token_weights(reduction, np.zeros(3, dtype=int), 10).tolist() == [0.0] * 3


@pytest.mark.parametrize("keys, message", [
    (("seq-summ", [1], 5), "unknown reduction 'seq-summ'.*did you mean 'seq-sum'.*token-mean, fixed-length"),
    (("seq-sum", [-1], 5), "lengths must be >= 0"),
    (("fixed-length", [1], 0), "max_length 0"),
])
def test_reduction_mistakes_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        token_weights(*keys)
