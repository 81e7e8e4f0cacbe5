"""Learn from the batch of one step: U optimizer updates on minibatches of whole groups, repeated E times.

U is `learner.updates_per_step`, E is `learner.epochs_per_step`. The batch already has advantages, for the policy that
sampled it. Later updates are off-policy. They use the log-probs of the policy before the first update and, if
`objective.reweight` is current, advantages at the current policy.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from frpo.cluster.learner_group import LearnerGroup
from frpo.config.sections import Recipe
from frpo.data.batcher import pack, pack_examples
from frpo.data.examples import ExampleSet
from frpo.data.order import ExampleStream
from frpo.objectives.base import Reweightable
from frpo.objectives.constraint import Mixture
from frpo.objectives.stage import Scores, reweighted, sequence_log_ratios
from frpo.objectives.supervised import Progress
from frpo.run import checks
from frpo.telemetry.step import reweight_metrics
from frpo.telemetry.sums import MetricSums
from frpo.telemetry.timer import PhaseTimer
from frpo.types import AdvantagedGroup, OptimStepOutput


class Updater:
    """Run the learner's updates of every step, for a whole run."""

    def __init__(self, recipe: Recipe, learner: LearnerGroup, auxiliary: ExampleSet | None, timer: PhaseTimer):
        """Set up the updates. auxiliary: examples of the recipe's supervised term; None without such a term."""
        self.recipe, self.learner, self.timer = recipe, learner, timer
        self.movement = checks.MovementWatch(self.recipe)
        self.auxiliary: ExampleStream | None = None
        if (section := self.recipe.auxiliary) is not None:
            assert auxiliary is not None  # read wherever the recipe has the section
            self.auxiliary = ExampleStream(auxiliary.train, batch_size=section.data.batch_size,
                                           seed=self.recipe.run.seed, shuffle=section.data.shuffle)

    def learn(self, groups: Sequence[AdvantagedGroup], done: int, kl_coef: float,
              mixture: Mixture | None = None) -> tuple[MetricSums, OptimStepOutput]:
        """Run all updates on one batch. Returns metrics over all updates, and the output of the last update.

        done: number of updates before this batch. mixture: mixes rewards with a constrained cost.
        """
        section, learner, metrics = self.recipe.learner, self.learner, MetricSums()
        updates, size = section.updates_per_step * section.epochs_per_step, len(groups) // section.updates_per_step
        old: Scores | None = None
        if updates > 1:
            old = learner.score_groups([group.scored.group for group in groups], "policy")
        for index in range(updates):
            start = index % section.updates_per_step * size
            part, old_part = groups[start:start + size], None if old is None else old[start:start + size]
            if index > 0 and self.recipe.objective.reweight == "current":
                assert old_part is not None  # scored above
                part = self.reweighted(part, old_part, metrics, kl_coef, mixture)
            update = pack(part, learner.layout, old_logprobs=old_part, watched=self.recipe.objective.watches,
                          **self.weighting)
            watch = self.movement.due(update)
            learned = learner.forward_backward(update, kl_coef=kl_coef, watch_movement=watch).parts
            # From the second update on the policy is not the one that sampled: the gap to the engine has no meaning.
            metrics.update({k: v for k, v in learned.items() if index == 0 or not k.startswith("rollout/")})
            total = self.recipe.run.num_steps * updates
            if self.auxiliary:
                metrics.update(self.auxiliary_gradient(done + index, total))
            stepped = learner.optim_step(total, watch_movement=watch)
            checks.check_gradient(stepped.grad_norm, stepped.policy_version)
            metrics.add("policy/grad_norm", stepped.grad_norm, 1.0)
            if watch:
                checks.check_movement(learner.movement_report())
        return metrics, stepped

    def auxiliary_gradient(self, update: int, total: int) -> MetricSums:
        """Add the gradient of the supervised term to that of the policy loss, for update number `update` of `total`."""
        section = self.recipe.auxiliary
        assert section is not None and self.auxiliary is not None  # `learn` calls only then
        packed = pack_examples(self.auxiliary.batch(update), self.learner.layout, reduction=section.reduction)
        progress = Progress(epochs_done=min(1.0, update / total), num_epochs=1)
        return self.learner.supervised_forward_backward(packed, progress, coefficient=section.weight)

    def reweighted(self, groups: Sequence[AdvantagedGroup], old: Scores, metrics: MetricSums, kl_coef: float,
                   mixture: Mixture | None) -> list[AdvantagedGroup]:
        """Return the groups of one update with advantages at the current policy. Costs one more forward pass."""
        objective = self.recipe.objective
        with self.timer.phase("reweight"):
            current = self.learner.score_groups([group.scored.group for group in groups], "policy")
        log_ratios = sequence_log_ratios(groups, current, old, **self.weighting)
        assert isinstance(objective.advantage, Reweightable)  # the recipe is checked for this
        groups = reweighted(groups, objective.advantage, log_ratios, objective.kl_in_reward(kl_coef), mixture)
        metrics.update(reweight_metrics(groups))
        return groups

    @property
    def weighting(self) -> dict[str, Any]:
        """Return the settings that define how token losses become one number."""
        objective = self.recipe.objective
        return {"reduction": objective.reduction, "max_length": self.recipe.rollout.max_new_tokens,
                "train_truncated": objective.truncated == "train"}
