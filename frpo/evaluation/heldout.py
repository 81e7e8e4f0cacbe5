"""Measure metrics on held-out prompts, with the same engines and reward functions as in training.

The metrics are pure functions of scored groups. The caller decides which model to measure and when.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from frpo.config.sections import EvaluateSection, Recipe
from frpo.data.prompts import PromptSet
from frpo.evaluation.passk import pass_at_k
from frpo.objectives.constraint import Constraint
from frpo.rewards import RewardSuite
from frpo.rollout.engine import Sampling
from frpo.rollout.sampler import EVALUATION, Sampler
from frpo.telemetry.intervals import mean_interval, upper_bound
from frpo.types import ScoredGroup

ROUNDING = 1e-9
"""Tolerance below `evaluate.success`: weights such as 0.7 + 0.2 + 0.1 add up to slightly less than 1."""


class Asked(Protocol):
    """The parts that are needed to sample the held-out prompts of a task and to score the completions."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def prompts(self) -> PromptSet: ...

    @property
    def rewards(self) -> RewardSuite: ...

    @property
    def sampler(self) -> Sampler: ...


def scored_heldout(parts: Asked, *, step: int, version: int) -> list[ScoredGroup]:
    """Sample and score `evaluate.samples` completions of every held-out prompt, with the engines' policy version."""
    section, prompts = parts.recipe.evaluate, parts.prompts.heldout
    sampling = Sampling(temperature=section.temperature, top_p=1.0, max_new_tokens=parts.recipe.rollout.max_new_tokens)
    groups = parts.sampler.sample(
        prompts, step=step, first_sample=step * len(prompts) * section.samples, group_size=section.samples,
        sampling=sampling, version=version, purpose=EVALUATION)
    return parts.rewards.score(groups).groups


def measures_kl(recipe: Recipe) -> bool:
    """Return whether the learner has a reference and held-out samples come from the policy itself (temperature 1)."""
    has_reference = recipe.objective.kl_coef > 0 or recipe.model.lora is not None
    return has_reference and recipe.evaluate.temperature == 1.0


def heldout_metrics(scored: Sequence[ScoredGroup], section: EvaluateSection, kl: Sequence[np.ndarray] | None = None,
                    constraint: Constraint | None = None, controllers: Mapping[str, float] = {}) -> dict[str, float]:
    """Compute reward, reward components, pass@k, lengths and, given `kl`, the sequence KL of P groups of equal size.

    kl: an array of shape G per group. Intervals are half-widths at 95 % over prompts. Completions of a prompt are
    averaged first, so intervals do not shrink with more samples per prompt. A completion passes if its reward is at
    least `section.success`. A completion on which every reward abstained does not pass, but is left out of the mean
    reward. The KL is unbiased for completions up to `rollout.max_new_tokens` long, if they were drawn at temperature 1
    from all tokens. With a constraint, eval/<cost>/upper is the upper end of the one-sided 95 % interval of the cost
    that the constraint limits, over its prompts. controllers: those of the run's state.
    """
    completions = [completion for group in scored for completion in group.group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    reward, interval = mean_interval(_prompt_mean(group.rewards_G) for group in scored)
    metrics = {"eval/reward": reward, "eval/interval": interval, "eval/prompts": float(len(scored)),
               "eval/length": float(np.mean(lengths)), "eval/length_p90": float(np.quantile(lengths, 0.9)),
               "eval/truncated": float(np.mean([completion.truncated for completion in completions]))}
    for k in section.pass_at:
        passed = _passes_at(k, section.success)
        metrics[f"eval/pass@{k}"], metrics[f"eval/pass@{k}/interval"] = mean_interval(map(passed, scored))
    for name in scored[0].terms:
        mean, interval = mean_interval(_prompt_mean(group.terms[name]) for group in scored)
        metrics |= {f"eval/{name}/mean": mean, f"eval/{name}/interval": interval}
    if kl is not None:
        metrics["eval/kl"], metrics["eval/kl_interval"] = mean_interval(float(kl_G.mean()) for kl_G in kl)
    if constraint is not None:
        metrics[f"eval/{constraint.cost}/upper"] = upper_bound(constraint.values(scored, controllers))
    return metrics


def interval_of(metric: str) -> str:
    """Return the name of the interval half-width that belongs to `metric` (AREA/reward, AREA/NAME/mean, ...)."""
    area, _, name = metric.partition("/")
    special = {"reward": f"{area}/interval", "kl": f"{area}/kl_interval"}
    return special.get(name, f"{metric.removesuffix('/mean')}/interval")


def _passes_at(k: int, success: float) -> Callable[[ScoredGroup], float]:
    def passed(group: ScoredGroup) -> float:
        return pass_at_k(len(group.rewards_G), int(np.sum(group.rewards_G >= success - ROUNDING)), k)

    return passed


def _prompt_mean(values_G: np.ndarray) -> float:
    kept = values_G[~np.isnan(values_G)]
    return float(kept.mean()) if len(kept) else float("nan")
