"""Learner ranks driven by hand-made samples, and all that they carry from update to update. Not a test itself."""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray
import torch

from frpo.cluster.learner_group import LearnerGroup
from frpo.cluster.runtime import wait_for
from frpo.config.loader import dump_recipe, recipe_from_dict
from frpo.config.memory import memory_strategy
from frpo.config.sections import Recipe
from frpo.data.batcher import pack
from loop import hand_made_groups, small_recipe

TOTAL_UPDATES = 10
"""Of the learning-rate schedule, which is falling: a resumed run must know how many updates are done."""

State = dict[str, torch.Tensor]


def strategy_file(folder: Path, name: str, sub_group_size: int) -> str:
    """ds_configs/<name>.json with, in stage 3, partitioned small tensors in sub-groups of about so many numbers."""
    strategy = memory_strategy(name)
    if strategy["zero_optimization"]["stage"] == 3:
        strategy["zero_optimization"] |= {"stage3_param_persistence_threshold": 1000, "sub_group_size": sub_group_size}
    path = folder / f"{name}_{sub_group_size}.json"
    path.write_text(json.dumps(strategy), encoding="utf-8")
    return str(path)


def recipe_for(folder: Path, path: str, strategy: str, ranks: int, dtype: str = "fp32", kl_coef: float = 0.0,
               sub_group_size: int = 30_000, **model: Any) -> Recipe:
    """A recipe in which a step depends on all that a learner remembers.

    AdamW's epsilon is far above the rounding of a gradient, so that runs which differ in rounding only stay together.
    """
    file = strategy_file(folder, strategy, sub_group_size)
    values = dump_recipe(small_recipe(path, file, num_ranks=ranks, dtype=dtype))
    values["learner"] |= {"eps": 1e-3, "weight_decay": 0.1, "schedule": "linear", "warmup_steps": 1}
    values["objective"] |= {"kl_coef": kl_coef}
    values["model"] |= model
    return recipe_from_dict(values)


def train(learner: LearnerGroup, updates: range) -> list[float]:
    """Updates number `updates` of the run, each on its own samples. Returns their learning rates."""
    rates = []
    for update in updates:
        parts = pack(hand_made_groups(seed=update), learner.layout, reduction="seq-mean-token-mean", max_length=16)
        learner.forward_backward(parts)
        rates.append(learner.optim_step(TOTAL_UPDATES).lr)
    return rates


def on_all(learner: LearnerGroup, function: Any, *arguments: Any) -> list[Any]:
    """`function(actor, *arguments)` inside every rank at once."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[function.__module__])  # actors cannot import from the tests
    return wait_for(function.__name__, [
        (a, a.handle.__ray_call__.remote(function, *arguments)) for a in learner.ranks.actors], 60.0)


def state_of(learner: LearnerGroup) -> State:
    """Weights, fp32 masters and moments, all of them whole, and the step counts."""
    states = on_all(learner, gathered_state)
    assert all(len(state["steps"].unique()) == 1 for state in states)
    return states[0]


def gathered_state(actor: Any) -> State:
    """Inside a rank, collective."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine, state = actor.learner.engine, {}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # after a load, otherwise the first step's doing
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            state[f"{name} weight"] = parameter.detach().clone()
        if parameter.requires_grad:
            state[f"{name} master"] = safe_get_full_fp32_param(parameter).clone()
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{name} {moment}"] = safe_get_full_optimizer_state(parameter, moment).clone()
    steps = [inner["step"] for inner in engine.optimizer.optimizer.state.values() if "step" in inner]
    return state | {"steps": torch.tensor([float(step) for step in steps])}


def assert_same(ours: State, theirs: State) -> None:
    """To the bit, save for how many step counts there are."""
    assert ours["steps"][0] == theirs["steps"][0] > 0
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if name != "steps" and not torch.equal(ours[name], theirs[name])] == []


def distances(ours: State, theirs: State) -> dict[str, float]:
    """By kind of tensor, the largest difference over the largest number."""
    assert ours.keys() == theirs.keys()

    def worst(kind: str) -> float:
        names = [name for name in theirs if name.endswith(f" {kind}")]
        largest = max(theirs[name].abs().max().item() for name in names)
        return max((ours[name].float() - theirs[name].float()).abs().max().item() for name in names) / largest

    return {kind: worst(kind) for kind in ("weight", "master", "exp_avg", "exp_avg_sq")}
