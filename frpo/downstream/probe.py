"""Measure how much of a task is left while a policy is fine-tuned for another task, at some updates.

The weights of the fine-tuning are pushed into engines that run already. Its learner computes the KL to the policy from
which the fine-tuning began. `kl_spacing` decides when to probe; `retained` summarizes the numbers.
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
"""Share of completions that form the lowest decile."""

Exact = Callable[[str, Sequence[str]], dict[str, float]]
"""Function (folder of a model, held-out prompts) -> metrics without samples, because all outcomes can be enumerated."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Task to measure: held-out prompts and the rewards of their completions. name: the area of the task's metrics."""

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
    """Probe (`frpo.types.Probe`) of one fine-tuning."""

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
    """Sample and score completions of the task's held-out prompts with the weights that the engines hold.

    samples: completions per prompt; None: the number in the task's recipe.
    """
    recipe = task.recipe
    if samples is not None:
        recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"samples": samples})})
    sampler = Sampler(engines, recipe.rollout.num_engines, recipe.run.seed, recipe.rollout.assignment)
    asked = _Asked(recipe=recipe, prompts=task.prompts, rewards=task.rewards, sampler=sampler)
    return scored_heldout(asked, step=step, version=version)


def check_agreement(task: Task, engines: RecoveringEngines, learner: LearnerGroup, scored: Sequence[ScoredGroup],
                    version: int) -> None:
    """Raise InvariantError if the engines do not serve the weights that the learner pushed. A probe would then measure
    the engines' weights, not the policy.
    """
    check_logprob_gap(task.recipe, learner, engines.pool, [group.group for group in scored], version)


def task_metrics(task: Task, scored: Sequence[ScoredGroup], kl: Sequence[np.ndarray] | None) -> dict[str, float]:
    """Return `<task>/...`: mean reward and every component with intervals over prompts, lowest decile, and the KL with
    its interval.
    """
    rewards = np.concatenate([group.rewards_G for group in scored])
    found = {name.removeprefix("eval/"): value
             for name, value in heldout_metrics(
                 scored, task.recipe.evaluate, kl, task.recipe.objective.constraint).items()}
    return {f"{task.name}/{name}": value for name, value in (found | {"decile": lowest_decile(rewards)}).items()}


def lowest_decile(rewards_N: np.ndarray) -> float:
    """Return the mean of the lowest tenth of all rewards (their CVaR). The reward on the border counts in part; NaN
    rewards are left out.
    """
    kept_N = np.sort(rewards_N[~np.isnan(rewards_N)])
    if len(kept_N) == 0:
        return float("nan")
    share = WORST * len(kept_N)
    weight_N = np.clip(share - np.arange(len(kept_N)), 0.0, 1.0)
    return float(weight_N @ kept_N / share)
