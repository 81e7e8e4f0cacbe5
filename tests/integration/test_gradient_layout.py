"""The gradient is the same one however a batch is laid out over ranks and micro-batches, and it is the formula's.

AdamW with an epsilon far above every gradient makes a first step linear in it, so the exported weights give back the
gradient that DeepSpeed applied. The judge is plain autograd on the whole batch in one process.
"""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loop import hand_made_groups, random_model, small_recipe, splitting_strategy
from transformers import AutoModelForCausalLM

from frpo.cluster.learner_group import LearnerGroup
from frpo.config.loader import dump_recipe, recipe_from_dict
from frpo.data.batcher import pack
from frpo.types import AdvantagedGroup

EPSILON, STEP_OVER_EPSILON = 1e8, 1.0
KL_COEF = 0.3
LAYOUTS = [(1, 3, 14, True), (1, 3, 14, False), (2, 2, 28, True), (2, 3, 28, False), (4, 2, 42, False),
           (4, 3, 42, True), (1, 1, 10_000, True), (2, 1, 64, True)]
"""(ranks, ZeRO stage, tokens a micro-batch may hold, packed): single samples on one rank to whole shares on four."""


def judged_gradient(path: str, groups: list[AdvantagedGroup]) -> dict[str, torch.Tensor]:
    """d/dtheta of -(1/N) sum_i (1/T_i) sum_t [A_i log pi - beta k3], ratio one, by autograd in float64."""
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    samples = [(g.scored.group.prompt.token_ids, c.token_ids, a, r) for g in groups
               for c, a, r in zip(g.scored.group.completions, g.advantages_G, g.ref_logprobs)]
    loss = 0.0
    for prompt, completion, advantage, reference in samples:
        ids = torch.tensor([[*prompt, *completion]])
        logprobs = network(input_ids=ids).logits[0, len(prompt) - 1:-1].log_softmax(-1)
        chosen = logprobs[torch.arange(len(completion)), ids[0, len(prompt):]]
        d = torch.tensor(reference) - chosen
        k3 = d.exp() - d - 1
        loss = loss - (advantage * chosen - KL_COEF * k3).mean() / len(samples)
    loss.backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def applied_gradient(learner: LearnerGroup, groups: list[AdvantagedGroup], path: str, folder: Path
                     ) -> tuple[dict[str, torch.Tensor], float]:
    """What one step of the real learner moved, divided by the step size; and the norm that DeepSpeed reports."""
    learner.forward_backward(pack(groups, learner.layout, reduction="seq-mean-token-mean", max_length=16))
    stepped = learner.optim_step(1)
    learner.export(str(folder))
    before = dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).named_parameters())
    after = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).named_parameters())
    return {name: (before[name] - after[name]).detach() / STEP_OVER_EPSILON for name in before}, stepped.grad_norm


@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks, stage, micro_batch_tokens, packed", LAYOUTS)
def test_gradient_is_the_formulas(learner_of, tmp_path, ranks, stage, micro_batch_tokens, packed):
    path = random_model(tmp_path / "model", "qwen2", tied=True)
    values = dump_recipe(small_recipe(path, splitting_strategy(tmp_path, stage), num_ranks=ranks))
    values["learner"] |= {"lr": EPSILON * STEP_OVER_EPSILON, "eps": EPSILON, "grad_clip": 1e9,
                          "micro_batch_tokens": micro_batch_tokens, "packing": packed}
    values["data"]["max_prompt_tokens"], values["rollout"]["max_new_tokens"] = 5, 9
    values["objective"] |= {"kl_coef": KL_COEF, "kl_estimator": "k3", "correction": None}
    recipe, groups = recipe_from_dict(values), hand_made_groups()
    learner = learner_of(recipe, path)
    applied, norm = applied_gradient(learner, groups, path, tmp_path / "export")
    wanted = judged_gradient(path, groups)
    total = torch.cat([g.flatten() for g in wanted.values()]).norm().item()
    worst = max((applied[name] - wanted[name]).abs().max().item() for name in wanted)
    count = len(pack(groups, learner.layout, reduction="seq-mean-token-mean", max_length=16)[0])
    print(f"\n{ranks} ranks x {count} micro-batches, {'packed' if packed else 'padded'}, ZeRO-{stage}: largest "
          f"difference / gradient norm {worst / total:.1e}, norm {norm:.6f} against {total:.6f}")
    assert worst < 2e-5 * total
    assert norm == pytest.approx(total, rel=1e-5)
