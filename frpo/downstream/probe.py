"""What is left of a task while a policy is being fine-tuned for another: asked of the running engines, step by step.

The fine-tuning's weights are pushed into engines that run already, its learner gives the KL to the policy it began as.
When to ask is `kl_spacing`'s business, and what the numbers mean together is for `retained`.
"""
from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from frpo.cluster.learner_group import LearnerGroup
from frpo.cluster.recovery import RecoveringEngines
from frpo.config.sections import Recipe
from frpo.data.prompts import PromptSet
from frpo.downstream.kl_spacing import ProbeSchedule
from frpo.evaluation.heldout import heldout_metrics, scored_heldout
from frpo.rewards import RewardSuite
from frpo.rollout.sampler import Sampler
from frpo.run.checks import CHECKED_PUSHES, check_logprob_gap
from frpo.run.journal import Journal
from frpo.telemetry.timer import PhaseTimer
from frpo.types import RunState, ScoredGroup

WORST = 0.1
"""The share of completions that is the lowest decile."""

Exact = Callable[[str, Sequence[str]], dict[str, float]]
"""(folder of a model, held-out prompts) -> metrics that need no samples, since every outcome can be enumerated."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Held-out prompts and what completions of them are worth. name: the area of its metrics."""

    name: str
    recipe: Recipe
    prompts: PromptSet
    rewards: RewardSuite


@dataclass(frozen=True, kw_only=True)
class _Asked:
    recipe: Recipe
    prompts: PromptSet
    rewards: RewardSuite
    sampler: Sampler


class TaskProbe:
    """A `frpo.types.Probe` of one fine-tuning."""

    def __init__(self, *, schedule: ProbeSchedule, tasks: Sequence[Task], exact: Exact | None,
                 engines: RecoveringEngines, learner: LearnerGroup, journal: Journal, timer: PhaseTimer):
        self.schedule, self.tasks, self.exact = schedule, tasks, exact
        self.engines, self.learner, self.journal, self.timer = engines, learner, journal, timer
        self.unchecked = CHECKED_PUSHES

    def __call__(self, state: RunState, total: int) -> dict[str, float]:
        if not self.schedule.due(state.step, total):
            return {}
        with self.timer.phase("push"):
            if self.engines.pushed != state.policy_version:
                self.engines.push(state.policy_version)
        metrics: dict[str, float] = {}
        for number, task in enumerate(self.tasks):
            with self.timer.phase("sample"):
                scored = sampled(task, self.engines, step=state.step, version=state.policy_version)
            if number == 0 and self.unchecked:
                check_agreement(task, self.engines, self.learner, scored, state.policy_version)
                self.unchecked -= 1
            if number == 0:
                self.journal.keep_samples(state.step, scored, task.name)
            kl = self.learner.kl_groups([group.group for group in scored], to="start") if number == 0 else None
            metrics |= task_metrics(task, scored, kl)
            if kl is not None:
                self.schedule.note(state.step, metrics[f"{task.name}/kl"])
        if self.exact:
            with tempfile.TemporaryDirectory() as folder:
                self.learner.export(folder)
                prompts = [prompt.messages[-1]["content"] for prompt in self.tasks[0].prompts.heldout]
                metrics |= {f"exact/{name}": value for name, value in self.exact(folder, prompts).items()}
        return metrics


def sampled(task: Task, engines: RecoveringEngines, *, step: int, version: int, samples: int | None = None
            ) -> list[ScoredGroup]:
    """Scored completions of the task's held-out prompts by the weights that the engines hold, `samples` a prompt."""
    recipe = task.recipe
    if samples is not None:
        recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"samples": samples})})
    sampler = Sampler(engines, recipe.rollout.num_engines, recipe.run.seed, recipe.rollout.assignment)
    asked = _Asked(recipe=recipe, prompts=task.prompts, rewards=task.rewards, sampler=sampler)
    return scored_heldout(asked, step=step, version=version)


def check_agreement(task: Task, engines: RecoveringEngines, learner: LearnerGroup, scored: Sequence[ScoredGroup],
                    version: int) -> None:
    """Raise InvariantError where engines do not serve what the learner pushed: they would be measured, not the policy.
    """
    check_logprob_gap(task.recipe, learner, engines.pool, [group.group for group in scored], version)


def task_metrics(task: Task, scored: Sequence[ScoredGroup], kl: Sequence[np.ndarray] | None) -> dict[str, float]:
    """`<task>/...`: mean reward and every component with intervals over prompts, lowest decile, KL and its interval."""
    rewards = np.concatenate([group.rewards_G for group in scored])
    found = {name.removeprefix("eval/"): value
             for name, value in heldout_metrics(scored, task.recipe.evaluate, kl).items()}
    return {f"{task.name}/{name}": value for name, value in (found | {"decile": lowest_decile(rewards)}).items()}


def lowest_decile(rewards_N: np.ndarray) -> float:
    """Mean of the lowest tenth of all rewards (their CVaR), the one on the border counted in part; NaN are left out."""
    kept_N = np.sort(rewards_N[~np.isnan(rewards_N)])
    if len(kept_N) == 0:
        return float("nan")
    share = WORST * len(kept_N)
    weight_N = np.clip(share - np.arange(len(kept_N)), 0.0, 1.0)
    return float(weight_N @ kept_N / share)
