"""Two updates on one rollout batch: with `reweight: current` they are gradient steps of the group objective itself.

The judge is plain autograd in float64 on the loss form, ratios inside the log, step after step. AdamW without moments
and with an epsilon far above every gradient is gradient descent, so exported weights can be compared with the judge's.
"""
from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from frpo.config.loader import dump_recipe, recipe_from_dict
from frpo.loops.update import Updater
from frpo.objectives.frpo import FRPO
from frpo.telemetry.timer import PhaseTimer
from frpo.types import AdvantagedGroup
from loop import hand_made_groups, random_model, small_recipe, splitting_strategy

EPSILON = 1e8
LAM = 0.5
CASES = [("seq-sum", "plugin", 3e-3), ("seq-sum", "jackknife", 3e-3), ("seq-mean-token-mean", "jackknife", 3e-2)]
"""(reduction, estimator, step size): steps so long that the ratios of the second update leave 1 by tenths."""


def groups_of(estimator: FRPO) -> list[AdvantagedGroup]:
    """Hand-made groups with rewards in [0, 1], all different, and their advantages before any update."""
    random = np.random.default_rng(1)
    groups = []
    for group in hand_made_groups():
        rewards = random.random(3)
        outcome = estimator.advantages(rewards)
        groups.append(replace(group, scored=replace(group.scored, rewards_G=rewards), ref_logprobs=None,
                              advantages_G=outcome.advantages_G, stats=outcome.stats))
    return groups


def judged_loss(network, groups, old, reduction, estimator) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """sum_g (k/N) lam (Phi(log u - r/lam) - mean u) and all sequences' log-probs; old None: those at this network."""
    total, count, scores = 0.0, sum(len(g.advantages_G) for g in groups), []
    for index, group in enumerate(groups):
        prompt, log_u, scores_G = group.scored.group.prompt.token_ids, [], []
        for i, completion in enumerate(group.scored.group.completions):
            ids = torch.tensor([[*prompt, *completion.token_ids]])
            logprobs_TV = network(input_ids=ids).logits[0, len(prompt) - 1:-1].log_softmax(-1)
            chosen_T = logprobs_TV.gather(-1, ids[0, len(prompt):, None])[:, 0]
            then_T = chosen_T.detach() if old is None else old[index][i]
            ratio = (chosen_T - then_T).sum()
            log_u.append(ratio if reduction == "seq-sum" else ratio / len(chosen_T))
            scores_G.append(chosen_T.detach())
        scores.append(scores_G)
        log_u, k = torch.stack(log_u), len(log_u)
        exponents = log_u - torch.tensor(group.scored.rewards_G) / LAM

        def phi(values):
            return torch.logsumexp(values, 0) - math.log(len(values))

        value = phi(exponents)
        if estimator == "jackknife":
            others = [phi(torch.cat([exponents[:j], exponents[j + 1:]])) for j in range(k)]
            value = k * value - (k - 1) / k * sum(others)
        total = total + k / count * LAM * (value - log_u.exp().mean())
    return total, scores


def judged_steps(path, groups, reduction, estimator, size) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The parameters after two gradient steps of the judge, and the log-ratios before the second."""
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    old = None
    for _ in range(2):
        loss, scores = judged_loss(network, groups, old, reduction, estimator)
        old = old or scores
        network.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= size * parameter.grad
    ratios = torch.stack([(now - then).sum() for a, b in zip(scores, old) for now, then in zip(a, b)])
    return {name: parameter.detach() for name, parameter in network.named_parameters()}, ratios


@pytest.mark.timeout(120)
@pytest.mark.parametrize("reduction, estimator, size", CASES)
def test_two_updates_are_two_steps_of_the_group_objective(learner_of, tmp_path, reduction, estimator, size):
    path = random_model(tmp_path / "model", "qwen2", tied=True)
    advantage = {"name": "frpo", "lam": LAM, "estimator": estimator, "scale": "exact"}
    groups = groups_of(FRPO(lam=LAM, estimator=estimator, scale="exact"))
    wanted, ratios = judged_steps(path, groups, reduction, estimator, size)
    start = dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).named_parameters())
    moved = torch.cat([(wanted[name] - start[name]).flatten() for name in wanted]).norm().item()
    found = {}
    for reweight in ("current", "frozen"):
        values = dump_recipe(small_recipe(path, splitting_strategy(tmp_path, 2), num_ranks=2))
        values["learner"] |= {"lr": EPSILON * size, "eps": EPSILON, "betas": [0.0, 0.0], "grad_clip": 1e9,
                              "epochs_per_step": 2, "micro_batch_tokens": 28}
        values["data"]["max_prompt_tokens"], values["rollout"]["max_new_tokens"] = 5, 9
        values["objective"] |= {
            "advantage": advantage, "reweight": reweight, "reduction": reduction, "correction": None,
            "surrogate": {"name": "reinforce" if reweight == "current" else "clip"}}
        recipe = recipe_from_dict(values)
        learner = learner_of(recipe, path)
        Updater(recipe, learner, auxiliary=None, timer=PhaseTimer()).learn(groups, 0, 0.0)
        learner.export(str(tmp_path / reweight))
        after = AutoModelForCausalLM.from_pretrained(tmp_path / reweight, dtype=torch.float64).named_parameters()
        found[reweight] = torch.cat([(p - wanted[name]).flatten() for name, p in after]).norm().item() / moved
    print(f"\n{reduction}, {estimator}: ratios {ratios.exp().min():.3f} to {ratios.exp().max():.3f}; distance from the "
          f"judge's weights / way they moved: current {found['current']:.1e}, frozen {found['frozen']:.1e}")
    assert ratios.abs().max() > 0.2
    assert found["current"] < 1e-4  # the learner's weights are rounded to fp32 after both steps
    assert found["frozen"] > 0.1
