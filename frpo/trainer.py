"""The RL loop: sample groups, score them, weigh them, update the policy, push its weights.

It reads like the algorithm. Where batches come from is in `batches`, how they are learned from in `update`; live
objects come from `builder`, metric arithmetic is in `step_metrics` and `telemetry`, formulas in `objectives`. Nothing
of Ray, vLLM or DeepSpeed is visible here.
"""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

from frpo import invariants
from frpo.batches import batch_source
from frpo.builder import Parts
from frpo.config.loader import recipe_digest
from frpo.errors import CheckpointError
from frpo.evaluate.best import BestCheckpoint
from frpo.evaluate.heldout import evaluate_heldout
from frpo.objectives.stage import References, advantaged
from frpo.step_metrics import rollout_metrics, staleness_metrics, trace_rows
from frpo.telemetry import ProgressBar, step_line
from frpo.types import AdvantagedGroup, RolloutGroup, RunState
from frpo.update import Updater


class Trainer:
    """Drives one run from its first or restored step to its last."""

    def __init__(self, parts: Parts):
        self.parts, self.recipe = parts, parts.recipe
        self.parity_unchecked = self.samples = self.recipe.rollout.replay is None
        self.batches = batch_source(parts)
        self.updater = Updater(parts)
        best = self.recipe.evaluate.best
        self.best = BestCheckpoint(best, parts.run_dir) if best else None

    def fit(self) -> RunState:
        """Train to the last step; save and export. Returns the final state."""
        run, every = self.recipe.run, self.recipe.evaluate.every
        state = self.restore()
        self.parts.engines.push(state.policy_version)
        self.batches.start(state, self.parts.resume and self.parts.resume[0])
        with closing(self.batches), ProgressBar(run.num_steps, state.step, run.name) as bar:
            if state.step == 0:
                self.write(0, self.evaluate(state, bar), bar)
            while state.step < run.num_steps:
                state, metrics = self.step(state, bar)
                if state.step == run.num_steps or (every and state.step % every == 0):
                    metrics |= self.evaluate(state, bar)
                self.write(state.step, metrics, bar)
                bar.advance()
                if state.step == run.num_steps or (run.save_every and state.step % run.save_every == 0):
                    self.save(state, bar)
        self.parts.learner.export(str(self.parts.run_dir / "export"))
        return state

    def step(self, state: RunState, bar: ProgressBar) -> tuple[RunState, dict[str, float]]:
        """One rollout batch, its optimizer updates, one weight push."""
        parts, phase, objective = self.parts, self.parts.timer.phase, self.recipe.objective
        batch = self.batches.next(state, bar)
        with phase("score"):
            references = self.reference_logprobs([scored.group for scored in batch.chosen], state)
        weighed = advantaged(batch.chosen, objective.advantage, references, objective.kl_in_reward)
        with phase("learn"):
            learned, stepped = self.updater.learn(weighed)
        with phase("sync"):
            parts.engines.push(stepped.policy_version)
        replaced = advantaged(batch.replaced, objective.advantage, [None] * len(batch.replaced))
        self.trace(weighed, replaced)
        metrics = rollout_metrics([*weighed, *replaced], parts.timer.seconds.get("generate", 0.0))
        metrics |= batch.counts | learned.result() | staleness_metrics(weighed, state.policy_version)
        metrics |= {"policy/lr": stepped.lr, "policy/version": float(stepped.policy_version)}
        return replace(state, step=state.step + 1, policy_version=stepped.policy_version,
                       data_cursor=state.data_cursor + batch.positions), metrics

    def reference_logprobs(self, groups: Sequence[RolloutGroup], state: RunState) -> References:
        """Log-probabilities under the frozen reference where a KL term asks; before it, once, the parity check."""
        if self.parity_unchecked:
            invariants.check_logprob_gap(self.parts, groups, state.policy_version)
            self.parity_unchecked = False
        if self.recipe.objective.kl_coef == 0:
            return [None] * len(groups)
        return self.parts.learner.score_groups(groups, "reference")

    def evaluate(self, state: RunState, bar: ProgressBar) -> dict[str, float]:
        """Held-out metrics of the current policy, which is kept if it is the best; none without prompts or engines."""
        if not (self.samples and self.parts.prompts.heldout):
            return {}
        bar.note("evaluate")
        with self.parts.timer.phase("evaluate"):
            metrics = evaluate_heldout(self.parts, state)
        if self.best:
            with self.parts.timer.phase("export"):
                self.best.offer(state, metrics, self.parts.learner.export)
        return metrics

    def restore(self) -> RunState:
        """The state to start from; files are cut back to what it remembers."""
        parts = self.parts
        if parts.resume is None:
            state = RunState(step=0, policy_version=0, data_cursor=0, recipe_digest=recipe_digest(self.recipe),
                             file_offsets=dict.fromkeys(parts.files, 0))
        else:
            path, state = parts.resume
            loaded = parts.learner.load(str(path / "learner"))
            if loaded != state.policy_version:
                raise CheckpointError(f"{path}: the learner's state is of policy version {loaded}, state.json says "
                                      f"{state.policy_version}; the folder was changed, resume from another checkpoint")
        for name, file in parts.files.items():
            file.truncate(state.file_offsets.get(name, 0))
        if self.best:
            self.best.restore(state.step if parts.resume and state.file_offsets else None)
        return state

    def save(self, state: RunState, bar: ProgressBar) -> None:
        """One resumable checkpoint."""
        bar.note("save")
        path = self.parts.checkpoints.begin(state.step)
        self.parts.learner.save(str(path / "learner"))
        self.batches.save(path)
        offsets = {name: file.offset() for name, file in self.parts.files.items()}
        self.parts.checkpoints.finish(path, replace(state, file_offsets=offsets))

    def trace(self, trained: Sequence[AdvantagedGroup], replaced: Sequence[AdvantagedGroup]) -> None:
        if "traces" in self.parts.files:
            for row in (*trace_rows(trained), *trace_rows(replaced, trained=False)):
                self.parts.files["traces"].append(row)

    def write(self, step: int, metrics: dict[str, float], bar: ProgressBar) -> None:
        """Metrics of one step to every sink, and its one log line."""
        metrics = metrics | self.parts.timer.collect()
        self.parts.files["metrics"].append({"step": step, **metrics})
        for sink in self.parts.sinks:
            sink.write(step, metrics)
        bar.log(step_line(step, metrics))
