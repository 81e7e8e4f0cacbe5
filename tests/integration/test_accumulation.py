"""Under bf16, the gradient of an update is the sum of its micro-batches' gradients, lost to rounding in none of them.

The network is a dot product with each micro-batch, so a micro-batch is its own gradient. The first is large, the others
are below its last bit in bf16, and so is most of what the second rank has. AdamW with an epsilon far above every
gradient makes a step linear in it, so that the fp32 masters give back what was applied.
"""
from __future__ import annotations

from typing import Any

import pytest
import torch

from frpo.config.loader import dump_recipe, recipe_from_dict
from learner_state import on_all, recipe_for
from loop import random_model

MICRO_BATCHES = 64
CPU = torch.device("cpu")
SHAPES = {"matrix": (128, 160), "vector": (33,)}
"""One that ZeRO-3 partitions and one that it keeps whole."""

EPSILON, BETA = 1e8, 0.9


class DotProduct(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)))

    def forward(self, micro_batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((getattr(self, name) * values).sum(dtype=torch.float32) for name, values in micro_batch.items())


def micro_batches_of(rank: int, update: int) -> list[dict[str, torch.Tensor]]:
    """In bf16, each number of its own: 0.5-1.5 in the first, times 2^-9 in the others; all times 2^-7 on rank 1."""
    random = torch.Generator().manual_seed(10 * update + rank)
    return [{name: ((torch.rand(shape, generator=random) + 0.5) * 2.0 ** (-9 * (i > 0) - 7 * rank)).bfloat16()
             for name, shape in SHAPES.items()} for i in range(MICRO_BATCHES)]


def moved_masters(actor: Any, values: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Inside a rank, collective: how far two updates moved the masters down from zero, and the norms reported."""
    from deepspeed.utils import safe_get_full_fp32_param

    from frpo.learner import zero as ds

    recipe = recipe_from_dict(values)
    engine = ds.build_policy(DotProduct, recipe.learner, ds.deepspeed_config(recipe.learner, recipe.model, CPU), CPU)
    norms = []
    for update in range(2):
        for micro_batch in micro_batches_of(actor.learner.rank, update):
            engine.backward(engine(micro_batch) * actor.learner.world_size)
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    return {name: -safe_get_full_fp32_param(p).double() for name, p in engine.module.named_parameters()}, norms


def summed(ranks: int, update: int) -> dict[str, torch.Tensor]:
    """An update's gradient in float64."""
    return {name: sum(batch[name].double() for rank in range(ranks) for batch in micro_batches_of(rank, update))
            for name in SHAPES}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_no_micro_batch_is_lost(learner_of, tmp_path, ranks, strategy):
    path = random_model(tmp_path / "model", "qwen2", tied=True)
    recipe = recipe_for(tmp_path, path, strategy, ranks, dtype="bf16")
    values = dump_recipe(recipe)
    values["learner"] |= {"deepspeed": strategy, "lr": EPSILON, "eps": EPSILON, "betas": [BETA, 0.95],
                          "weight_decay": 0.0, "grad_clip": 1e9}
    moved, norms = on_all(learner_of(recipe, path), moved_masters, values)[0]
    first, second = (summed(ranks, update) for update in range(2))
    # AdamW's first step follows the gradient, its second one the two moments' average.
    wanted = {name: first[name] + (BETA * first[name] + second[name]) / (1 + BETA) for name in SHAPES}
    worst = max(((moved[name] - wanted[name]).abs() / wanted[name]).max().item() for name in SHAPES)
    totals = [torch.cat([gradient.flatten() for gradient in update.values()]).norm().item()
              for update in (first, second)]
    print(f"\n{ranks} ranks, {strategy}: worst relative difference {worst:.1e}, norms {norms} against {totals}")
    assert worst < 1e-5
    assert norms == pytest.approx(totals, rel=1e-5)
