"""Reward on held-out prompts, sampled through the same engines and scored by the same functions as in training."""
from __future__ import annotations

import numpy as np

from frpo.builder import Parts
from frpo.rollout.engine import Sampling
from frpo.rollout.sampler import EVALUATION
from frpo.telemetry import mean_interval
from frpo.types import RunState


def evaluate_heldout(parts: Parts, state: RunState) -> dict[str, float]:
    """`eval/...` metrics of the policy version in `state`: reward with the half-width of its 95 % interval, every
    component, completion length, truncated share.

    The interval is over prompts (completions of one prompt are averaged first), so it does not shrink with samples.
    """
    section, prompts = parts.recipe.evaluate, parts.prompts.heldout
    sampling = Sampling(temperature=section.temperature, top_p=1.0, max_new_tokens=parts.recipe.rollout.max_new_tokens)
    groups = parts.sampler.sample(
        prompts, step=state.step, first_sample=state.step * len(prompts) * section.samples, group_size=section.samples,
        sampling=sampling, version=state.policy_version, purpose=EVALUATION)
    scored = parts.rewards.score(groups).groups
    reward, interval = mean_interval(_prompt_mean(group.rewards_G) for group in scored)
    completions = [completion for group in groups for completion in group.completions]
    metrics = {"eval/reward": reward, "eval/interval": interval, "eval/prompts": float(len(prompts)),
               "eval/length": float(np.mean([len(completion.token_ids) for completion in completions])),
               "eval/truncated": float(np.mean([completion.truncated for completion in completions]))}
    for name in scored[0].terms:
        metrics[f"eval/{name}/mean"] = mean_interval(_prompt_mean(group.terms[name]) for group in scored)[0]
    return metrics


def _prompt_mean(values_G: np.ndarray) -> float:
    kept = values_G[~np.isnan(values_G)]
    return float(kept.mean()) if len(kept) else float("nan")
