"""The gradient of supervised losses through DeepSpeed is the formula's, whatever the layout and wherever the reference
comes from; the judge is plain float64 autograd over whole log-softmaxes, example by example.

AdamW with an epsilon far above every gradient makes a first step linear in it (see test_gradient_layout).
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from frpo.cluster.learner_group import LearnerGroup
from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import dump_recipe, recipe_from_dict
from frpo.data.batcher import pack, pack_examples
from frpo.learner.model import cache_facts
from frpo.learner.state_cache import StateCache
from frpo.objectives.supervised import Progress
from frpo.types import Example
from loop import hand_made_groups, random_model, small_recipe, splitting_strategy

EPSILON = 1e8
PROGRESS = Progress(epochs_done=0.5, num_epochs=1)
PA = {"name": "csft_pa", "beta_first": 1.5, "delta_start": 2.0, "delta_end": 6.0}
"""delta 4: as much of the gradient as CSFT's."""

CASES = {
    "csft_pa, 1 rank, single examples": (PA, 1, 3, 24, True, "live"),
    "csft_pa, 2 ranks, packed, ZeRO-3": (PA, 2, 3, 64, True, "live"),
    "csft_pa, 2 ranks, padded, ZeRO-2": (PA, 2, 2, 64, False, "live"),
    "csft_pa, cached, 2 ranks, ZeRO-3": (PA, 2, 3, 64, True, "cache"),
    "mu detached, 2 ranks": (PA | {"mu_detach": True}, 2, 3, 64, True, "live"),
    "csft, 2 ranks": ({"name": "csft", "beta_first": 1.5}, 2, 3, 64, True, "live"),
    "kl_sft, 2 ranks": ({"name": "kl_sft", "kl_coef": 0.7}, 2, 3, 64, True, "live"),
    "sft, 2 ranks": ({"name": "sft"}, 2, 3, 64, True, "live"),
}


def examples() -> list[tuple[int, Example]]:
    """Nine examples of up to 22 tokens; two have a hole between two spans that are learned."""
    random = np.random.Generator(np.random.PCG64(3))
    found = []
    for index in range(9):
        prompt, response = random.integers(3, 9), random.integers(1, 14)
        mask = [False] * prompt + [True] * response
        if index % 4 == 2:
            mask[prompt + response // 2] = response == 1
        ids = tuple(int(t) for t in random.integers(7, 104, size=prompt + response))
        found.append((index, Example(uid=str(index), origin="", token_ids=ids, loss_mask=tuple(mask))))
    return found


def judged_gradient(path: str, other: str, objective: dict) -> tuple[dict[str, torch.Tensor], float]:
    policy, reference = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64) for p in (path, other))
    count, loss = sum(sum(example.loss_mask) for _, example in examples()), 0.0
    for _, example in examples():
        ids, learned = torch.tensor([example.token_ids]), torch.tensor(example.loss_mask)[1:]
        p_TV = policy(input_ids=ids).logits[0, :-1].log_softmax(-1)[learned]
        with torch.no_grad():
            q_TV = reference(input_ids=ids).logits[0, :-1].log_softmax(-1)[learned]
        y_T1 = ids[0, 1:][learned][:, None]
        chosen_T, held_T = p_TV.gather(1, y_T1)[:, 0], q_TV.gather(1, y_T1)[:, 0]
        kl_T = (p_TV.exp() * (p_TV - q_TV)).sum(-1)
        margin_T = p_TV.gather(1, q_TV.argmax(-1)[:, None])[:, 0] - p_TV.max(-1).values
        beta_T = torch.tensor([objective.get("beta_first")] + [2.0] * 4 + [0.1] * 20)[:len(y_T1)] if (
            "csft" in objective["name"]) else None
        if objective["name"] == "kl_sft":
            loss_T = 0.7 * kl_T - chosen_T
        elif objective["name"] == "sft":
            loss_T = -chosen_T
        else:
            loss_T = -(2 * torch.sigmoid(-beta_T * (chosen_T - held_T))).detach() * chosen_T
        if objective["name"] == "csft_pa":
            loss_T = loss_T - 4.0 * logsigmoid((kl_T.detach() if objective.get("mu_detach") else kl_T) * margin_T)
        loss = loss + loss_T.sum() / count
    loss.backward()
    return {name: parameter.grad for name, parameter in policy.named_parameters()}, loss.item()


def finetune_recipe(path: str, strategy: str, **changes: dict) -> FinetuneRecipe:
    values = {"model": {"path": path, "dtype": "fp32", "max_length": 24}, "data": {"path": "none.jsonl"},
              "learner": {"deepspeed": strategy, "lr": EPSILON, "eps": EPSILON, "grad_clip": 1e9, "timeout_s": 60.0}}
    for section, keys in changes.items():
        values[section] = {**values.get(section, {}), **keys}
    return recipe_from_dict(values, FinetuneRecipe)


def use_cache(learner: LearnerGroup, recipe: FinetuneRecipe, other: str, folder: Path) -> None:
    """Fill the cache in two goes, the second by another view of it, as after an interruption."""
    numbered = examples()
    facts = cache_facts(recipe.model, other, [example for _, example in numbered])
    lengths = [sum(example.loss_mask) for _, example in numbered]
    learner.begin_cache()
    StateCache.begin(folder, facts, lengths)
    learner.cache_reference(pack_examples(numbered[:5], learner.layout, reduction="token-mean"), str(folder))
    missing = StateCache.begin(folder, facts, lengths).missing()
    assert missing == [5, 6, 7, 8]
    rest = [numbered[i] for i in missing]
    learner.cache_reference(pack_examples(rest, learner.layout, reduction="token-mean"), str(folder))
    learner.end_cache(str(folder))
    learner.use_cache(str(folder))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", CASES)
def test_gradient_is_the_formulas(learner_of, tmp_path, case):
    objective, ranks, stage, tokens, packed, mode = CASES[case]
    path, other = (random_model(tmp_path / f"model{seed}", "qwen2", tied=True, seed=seed) for seed in (0, 1))
    recipe = finetune_recipe(
        path, splitting_strategy(tmp_path, stage), objective=objective, reference={"path": other, "mode": mode},
        learner={"num_ranks": ranks, "micro_batch_tokens": tokens, "packing": packed})
    learner = learner_of(recipe, path)
    if mode == "cache":
        use_cache(learner, recipe, other, tmp_path / "cache")
    update = pack_examples(examples(), learner.layout, reduction="token-mean")
    metrics = learner.supervised_forward_backward(update, PROGRESS).result()
    learner.optim_step(1)
    learner.export(str(tmp_path / "export"))
    before, after = (dict(AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64).named_parameters())
                     for p in (path, tmp_path / "export"))
    wanted, loss = judged_gradient(path, other, objective)
    total = torch.cat([g.flatten() for g in wanted.values()]).norm().item()
    worst = max(((before[name] - after[name]).detach() - wanted[name]).abs().max().item() for name in wanted)
    print(f"\n{case}, {len(update[0])} micro-batches a rank: largest difference / gradient norm {worst / total:.1e}, "
          f"loss {metrics['sft/loss']:.6f} against {loss:.6f}")
    assert worst < 2e-5 * total
    assert metrics["sft/loss"] == pytest.approx(loss, rel=1e-5)
    assert ("sft/kl" in metrics) == (objective["name"] != "sft")


@pytest.mark.timeout(120)
def test_a_supervised_term_adds_its_gradient_to_that_of_the_policy_loss(learner_of, tmp_path):
    """2 ranks, ZeRO-3: policy loss plus half of CSFT+PA, whose reference is the policy before the update."""
    path = random_model(tmp_path / "model", "qwen2", tied=True)
    values = dump_recipe(small_recipe(path, splitting_strategy(tmp_path, 3)))
    values["learner"] |= {"lr": EPSILON, "eps": EPSILON, "grad_clip": 1e9}
    values["objective"] |= {"kl_coef": 0.0, "correction": None}
    values["auxiliary"] = {"data": {"path": "none.jsonl"}, "objective": PA, "weight": 0.5}
    groups, moved = hand_made_groups(), {}
    for name, steps in {"policy": ("policy",), "supervised": ("supervised",), "both": ("policy", "supervised")}.items():
        learner = learner_of(recipe_from_dict(values), path)
        if "policy" in steps:
            learner.forward_backward(pack(groups, learner.layout, reduction="seq-mean-token-mean", max_length=16))
        if "supervised" in steps:
            update = pack_examples(examples(), learner.layout, reduction="token-mean")
            metrics = learner.supervised_forward_backward(update, PROGRESS, coefficient=0.5).result()
            assert metrics["sft/kl"] == pytest.approx(0, abs=1e-6) and metrics["csft/weight"] == pytest.approx(1)
        learner.optim_step(1)
        learner.export(str(tmp_path / name))
        before, after = (dict(AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64).named_parameters())
                         for p in (path, tmp_path / name))
        moved[name] = torch.cat([(before[key] - after[key]).detach().flatten() for key in before])
    assert min(moved["policy"].norm(), moved["supervised"].norm()) > 0.1
    assert (moved["both"] - moved["policy"] - moved["supervised"]).abs().max() < 1e-6 * moved["both"].norm()
    wanted, _ = judged_gradient(path, path, PA)
    half = torch.cat([gradient.flatten() for gradient in wanted.values()]) / 2
    assert (moved["supervised"] - half).abs().max() < 2e-5 * half.norm()
