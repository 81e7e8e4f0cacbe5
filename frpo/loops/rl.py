"""The RL loop: sample groups, score them, compute advantages, update the policy, push its weights.

The code follows the algorithm step by step. `batches` supplies the batches, `update` runs the optimizer updates. Live
objects come from `run.build`, metric arithmetic from `telemetry`, formulas from `objectives`. Nothing of Ray, vLLM or
DeepSpeed is used here directly.
"""
from __future__ import annotations

import logging
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from frpo.evaluation.best import BestCheckpoint
from frpo.evaluation.heldout import heldout_metrics, measures_kl, scored_heldout
from frpo.loops.batches import batch_source
from frpo.loops.update import Updater
from frpo.objectives import kl_control
from frpo.objectives.constraint import Mixture
from frpo.objectives.stage import GroupLogprobs, compute_advantages
from frpo.run import checks
from frpo.run.build import RunParts
from frpo.run.stop_request import asked, stop_if_asked
from frpo.run.traces import trace_rows
from frpo.telemetry.progress import ProgressBar, phase, remark
from frpo.telemetry.step import rollout_metrics, staleness_metrics
from frpo.types import AdvantagedGroup, Probe, RolloutGroup, RunState, ScoredBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A finished step: its number (from 1), its metrics, and the groups that the policy learned from."""

    number: int
    metrics: Mapping[str, float]
    groups: Sequence[AdvantagedGroup]


class Trainer:
    """Drive one run from its first or restored step to its last."""

    def __init__(self, parts: RunParts, probe: Probe | None = None):
        """Set up the run. probe: a function that returns further metrics before the first and after every step."""
        self.probe = probe
        self.parts, self.recipe = parts, parts.recipe
        self.samples = self.recipe.rollout.replay is None
        self.unchecked = checks.CHECKED_PUSHES if self.samples else 0
        self.batches = batch_source(parts)
        self.updater = Updater(self.recipe, parts.learner, parts.auxiliary, parts.timer)
        self.noted_idle = False
        best = self.recipe.evaluate.best
        self.best = BestCheckpoint(best, parts.run_dir) if best else None

    def fit(self) -> RunState:
        """Train to the last step; save and export. Returns the final state."""
        for _ in self.steps():
            pass
        return self.state

    def steps(self) -> Generator[Step, None, None]:
        """Train, and yield every step once that step is done. Export the model after the last step."""
        run, journal = self.recipe.run, self.parts.journal
        state = self.state = journal.restore(self.parts.learner)
        with phase("comparing the learner with plain transformers"):
            checks.check_same_function(self.parts.learner, self.recipe, self.parts.sampling.prompts)
        if self.best:
            self.best.restore(state.step if journal.resume and state.file_offsets else None)
        with phase("pushing weights to the rollout engines"):
            self.parts.engines.push(state.policy_version)
        self.batches.start(state, journal.resume and journal.resume[0])
        with closing(self.batches), ProgressBar(run.num_steps, state.step, run.name) as bar:
            if state.step == 0:
                journal.write(0, self.evaluate(state) | self.parts.timer.collect(), bar)
            stop_if_asked(f"at step {state.step}")
            while state.step < run.num_steps:
                state, metrics, groups = self.step(state, bar)
                metrics |= self.evaluate(state) | self.parts.timer.collect()
                journal.write(state.step, metrics, bar)
                self.state = state
                bar.advance()
                last = state.step == run.num_steps
                if last or asked() or (run.save_every and state.step % run.save_every == 0):
                    bar.note("save")
                    self.save()
                if not last:
                    stop_if_asked(f"after step {state.step}")
                yield Step(number=state.step, metrics=metrics, groups=groups)
        with phase("exporting the model"):
            self.parts.learner.export(str(self.parts.run_dir / "export"))
        journal.finish(state)

    def save(self) -> None:
        """Save a checkpoint of the run as it is between two steps."""
        self.parts.journal.save(self.state, self.parts.learner, self.batches.save)

    def step(self, state: RunState, bar: ProgressBar) -> tuple[RunState, dict[str, float], Sequence[AdvantagedGroup]]:
        """Run one rollout batch, its optimizer updates and one weight push.

        Returns the new state, the metrics, and the groups that the policy learned from.
        """
        parts, timed, objective = self.parts, self.parts.timer.phase, self.recipe.objective
        kl_coef = state.controllers.get(kl_control.COEF, objective.kl_coef)
        batch = self.batches.next(state, bar)
        state, mixture, constrained = self.constrain(state, batch)
        with timed("score"):
            references = self.reference_logprobs([scored.group for scored in batch.chosen], state)
        weighed = compute_advantages(batch.chosen, objective.advantage, references,
                                     kl_in_reward=objective.kl_in_reward(kl_coef), mixture=mixture,
                                     scalarised=self.recipe.scalarised)
        self.note_where_nothing_teaches(weighed, state.step)
        with timed("learn"):
            learned, stepped = self.updater.learn(weighed, state.policy_version, kl_coef, mixture)
        with timed("sync"):
            parts.engines.push(stepped.policy_version)
        replaced = compute_advantages(batch.replaced, objective.advantage, [None] * len(batch.replaced),
                                      mixture=mixture, scalarised=self.recipe.scalarised)
        self.trace(weighed, replaced)
        metrics = rollout_metrics([*weighed, *replaced], parts.timer.seconds.get("generate", 0.0))
        metrics |= {**batch.counts} | learned.result() | staleness_metrics(weighed, state.policy_version)
        metrics |= {"policy/lr": stepped.lr, "policy/version": float(stepped.policy_version)} | constrained
        state = replace(state, step=state.step + 1, policy_version=stepped.policy_version,
                        data_cursor=state.data_cursor + batch.positions)
        if objective.kl_control:
            metrics["policy/kl_coef"] = kl_coef
            state = replace(state, controllers={**state.controllers, **objective.kl_control.after(
                state.controllers, kl_coef, metrics.get("policy/kl_sequence", math.nan))})
        return state, metrics, weighed

    def constrain(self, state: RunState, batch: ScoredBatch) -> tuple[RunState, Mixture | None, dict[str, float]]:
        """Move the multiplier by the costs of a batch, before its updates. Returns the state with the multiplier, the
        mixture of rewards and costs, and metrics; the state alone without a constraint.
        """
        constraint = self.recipe.objective.constraint
        if constraint is None:
            return state, None, {}
        measured = constraint.measure(batch.drawn, state.controllers)
        record = constraint.after(state.controllers, measured)
        checks.check_judged(constraint, record)
        for line in constraint.warnings(record, measured):
            logger.warning("%s", line)
        return replace(state, controllers=record), constraint.mixture(record), constraint.metrics(record, measured)

    def note_where_nothing_teaches(self, weighed: Sequence[AdvantagedGroup], step: int) -> None:
        """Print one note if no group of a step has two different rewards."""
        if self.noted_idle or any(group.advantages_G.any() for group in weighed):
            return
        self.noted_idle = True
        remark([f"note: in step {step + 1} the completions of each group have equal rewards, so the policy learns "
                "nothing from them; look at the samples, make the task easier, or raise rollout.group_size"])

    def reference_logprobs(self, groups: Sequence[RolloutGroup], state: RunState) -> GroupLogprobs:
        """Return log-probabilities under the frozen reference if a KL term needs them, else None for every group.

        For the first sampled batches (`checks.CHECKED_PUSHES`), check first that engines and learner agree.
        """
        if self.unchecked:
            checks.check_logprob_gap(self.recipe, self.parts.learner, self.parts.engines, groups, state.policy_version)
            self.unchecked -= 1
        if not self.recipe.objective.scores_reference:
            return [None] * len(groups)
        return self.parts.learner.score_groups(groups, "reference")

    def evaluate(self, state: RunState) -> dict[str, float]:
        """Return held-out metrics of the current policy if they are due, and the metrics of the probe."""
        every, total = self.recipe.evaluate.every, self.recipe.run.num_steps
        due = state.step in (0, total) or (every and state.step % every == 0)
        metrics: dict[str, float] = {}
        if due and self.samples and self.parts.sampling.prompts.heldout:
            metrics |= self.heldout_metrics(state)
        if self.probe:
            metrics |= self.probe(state, total)
        return metrics

    def heldout_metrics(self, state: RunState) -> dict[str, float]:
        """Measure held-out metrics of the current policy. Keep the policy if it is the best so far."""
        with self.parts.timer.phase("evaluate"):
            scored = scored_heldout(self.parts.sampling, step=state.step, version=state.policy_version)
            groups = [group.group for group in scored]
            kl = self.parts.learner.kl_groups(groups) if measures_kl(self.recipe) else None
            metrics = heldout_metrics(
                scored, self.recipe.evaluate, kl, self.recipe.objective.constraint, state.controllers)
        self.parts.journal.keep_samples(state.step, scored)
        if self.best:
            with self.parts.timer.phase("export"):
                self.best.offer(state, metrics, self.parts.learner.export)
        return metrics

    def trace(self, trained: Sequence[AdvantagedGroup], replaced: Sequence[AdvantagedGroup]) -> None:
        if "traces" in self.parts.journal.files:
            for row in (*trace_rows(trained), *trace_rows(replaced, trained=False)):
                self.parts.journal.files["traces"].append(row)
