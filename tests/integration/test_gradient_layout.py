"""The gradient is the same one however a batch is laid out over ranks and micro-batches, and it is the formula's.

AdamW with an epsilon far above every gradient makes a first step linear in it, so the exported weights give back the
gradient that DeepSpeed applied. The judge is plain autograd on the whole batch in one process.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from loop import random_model, small_recipe, splitting_strategy
from transformers import AutoModelForCausalLM

from frpo.cluster.learner_group import LearnerGroup
from frpo.cluster.runtime import wait_for
from frpo.config.loader import dump_recipe, recipe_from_dict
from frpo.config.sections import Recipe
from frpo.data.batcher import pack
from frpo.types import AdvantagedGroup, Completion, Prompt, RolloutGroup, ScoredGroup

EPSILON, STEP_OVER_EPSILON = 1e8, 1.0
KL_COEF = 0.3
LAYOUTS = [(1, 1, 10_000), (1, 3, 64), (2, 1, 64), (2, 2, 10_000), (2, 3, 10_000), (2, 3, 64)]
"""(ranks, ZeRO stage, tokens a micro-batch may hold): whole batches and single samples, alone and split."""


def hand_made_groups() -> list[AdvantagedGroup]:
    """3 groups of 3 samples of 1-9 tokens, one without advantage, with random reference log-probs."""
    random = np.random.default_rng(0)
    groups = []
    for draw in range(3):
        lengths = random.integers(1, 10, size=3)
        completions = tuple(
            Completion(text="", token_ids=tuple(int(t) for t in random.integers(7, 104, size=n)),
                       logprobs=tuple(-random.random(n)), loss_mask=(True,) * int(n), version_spans=(), seed=0,
                       finish_reason="stop") for n in lengths)
        prompt = Prompt(uid=str(draw), messages=(), token_ids=tuple(int(t) for t in random.integers(7, 104, size=5)))
        advantages = random.normal(size=3) * (draw != 1)
        scored = ScoredGroup(group=RolloutGroup(group_id=(0, draw), prompt=prompt, completions=completions),
                             rewards_G=advantages, terms={})
        groups.append(AdvantagedGroup(scored=scored, advantages_G=advantages, stats={},
                                      ref_logprobs=tuple(-6 * random.random(n) for n in lengths)))
    return groups


def judged_gradient(path: str, groups: list[AdvantagedGroup]) -> dict[str, torch.Tensor]:
    """d/dtheta of -(1/N) sum_i (1/T_i) sum_t [A_i log pi - beta k3], ratio one, by autograd in float64."""
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    samples = [(g.scored.group.prompt.token_ids, c.token_ids, a, r) for g in groups
               for c, a, r in zip(g.scored.group.completions, g.advantages_G, g.ref_logprobs)]
    loss = 0.0
    for prompt, completion, advantage, reference in samples:
        ids = torch.tensor([prompt + completion])
        logprobs = network(input_ids=ids).logits[0, len(prompt) - 1:-1].log_softmax(-1)
        chosen = logprobs[torch.arange(len(completion)), ids[0, len(prompt):]]
        d = torch.tensor(reference) - chosen
        k3 = d.exp() - d - 1
        loss = loss - (advantage * chosen - KL_COEF * k3).mean() / len(samples)
    loss.backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.fixture(scope="module")
def learner_of(ray_cluster):
    """(recipe, model) -> its learner ranks, built anew in processes that earlier recipes of as many ranks started."""
    running: dict[int, LearnerGroup] = {}

    def build(recipe: Recipe, path: str) -> LearnerGroup:
        count = recipe.learner.num_ranks
        if count not in running:
            running[count] = LearnerGroup(recipe, path, "cpu")
            return running[count]
        calls = [(a, a.handle.build.remote(dump_recipe(recipe), path, "cpu", {})) for a in running[count].ranks]
        wait_for("rebuild", calls, recipe.learner.startup_timeout_s)
        return running[count]

    yield build
    for learner in running.values():
        learner.close()


def applied_gradient(learner: LearnerGroup, recipe: Recipe, path: str, groups: list[AdvantagedGroup],
                     folder: Path) -> tuple[dict[str, torch.Tensor], float]:
    """What one step of the real learner moved, divided by the step size; and the norm that DeepSpeed reports."""
    batch = pack(groups, num_ranks=recipe.learner.num_ranks, updates=1, reduction="seq-mean-token-mean",
                 micro_batch_tokens=recipe.learner.micro_batch_tokens, max_length=16)
    learner.forward_backward(batch.updates[0])
    stepped = learner.optim_step(1)
    learner.export(str(folder))
    before = dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).named_parameters())
    after = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).named_parameters())
    return {name: (before[name] - after[name]).detach() / STEP_OVER_EPSILON for name in before}, stepped.grad_norm


@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks, stage, micro_batch_tokens", LAYOUTS)
def test_gradient_is_the_formulas(learner_of, tmp_path, ranks, stage, micro_batch_tokens):
    path = random_model(tmp_path / "model", "qwen2", tied=True)
    values = dump_recipe(small_recipe(path, splitting_strategy(tmp_path, stage), num_ranks=ranks))
    values["learner"] |= {"lr": EPSILON * STEP_OVER_EPSILON, "eps": EPSILON, "grad_clip": 1e9,
                          "micro_batch_tokens": micro_batch_tokens}
    values["objective"] |= {"kl_coef": KL_COEF, "kl_estimator": "k3"}
    recipe, groups = recipe_from_dict(values), hand_made_groups()
    applied, norm = applied_gradient(learner_of(recipe, path), recipe, path, groups, tmp_path / "export")
    wanted = judged_gradient(path, groups)
    total = torch.cat([g.flatten() for g in wanted.values()]).norm().item()
    worst = max((applied[name] - wanted[name]).abs().max().item() for name in wanted)
    print(f"\nranks {ranks} ZeRO-{stage} micro-batch {micro_batch_tokens}: worst difference / gradient norm "
          f"{worst / total:.1e}, norm {norm:.6f} against {total:.6f}")
    assert worst < 2e-5 * total
    assert norm == pytest.approx(total, rel=1e-5)
