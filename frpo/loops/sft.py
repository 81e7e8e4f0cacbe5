"""The supervised fine-tuning loop: pack examples into micro-batches, compute the loss, update, repeat.

The code follows the algorithm step by step. The loss is in `objectives.supervised`. If the loss needs a reference, the
learner runs the reference beside the policy, or reads its states from a cache. This module fills the cache first.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from frpo.data.batcher import pack_examples
from frpo.data.order import ExampleStream
from frpo.learner.model import cache_facts
from frpo.learner.state_cache import StateCache, being_filled
from frpo.objectives.supervised import Progress
from frpo.run import checks
from frpo.run.build_finetune import FinetuneParts
from frpo.run.stop_request import asked, stop_if_asked
from frpo.telemetry.progress import ProgressBar, phase
from frpo.telemetry.sums import MetricSums
from frpo.types import Example, Probe, RankBatches, RunState

CACHED_AT_A_TIME = 64
"""Number of examples in one call of the learner while a cache is filled."""

EVALUATED = ("sft/nll", "sft/kl", "csft/weight", "pa/loss", "pa/mu", "pa/disagree")
"""Metrics of held-out examples, reported as eval/..."""


class FineTuner:
    """Drive one run from its first or restored update to its last."""

    def __init__(self, parts: FinetuneParts, probe: Probe | None = None):
        """Set up the run. probe: a function that returns further metrics before the first and after every update."""
        self.probe = probe
        self.parts, self.recipe, self.learner = parts, parts.recipe, parts.learner
        self.train, self.heldout = parts.examples.train, parts.examples.heldout
        data = self.recipe.data
        self.stream = ExampleStream(self.train, batch_size=data.batch_size, seed=self.recipe.run.seed,
                                    shuffle=data.shuffle)
        self.total = self.recipe.run.updates(self.stream.per_epoch)
        self.movement = checks.MovementWatch(self.recipe)

    def fit(self) -> RunState:
        """Train to the last update; save and export. Returns the final state."""
        run, journal = self.recipe.run, self.parts.journal
        state = journal.restore(self.learner)
        self.provide_reference()
        with phase("comparing the learner with plain transformers"):
            checks.check_same_function(self.learner, self.recipe, self.parts.examples)
        with ProgressBar(self.total, state.step, run.name) as bar:
            if state.step == 0:
                journal.write(0, self.evaluate(state) | self.parts.timer.collect(), bar)
            stop_if_asked(f"at update {state.step}")
            while state.step < self.total:
                state, metrics = self.update(state)
                journal.write(state.step, metrics | self.evaluate(state) | self.parts.timer.collect(), bar)
                bar.advance()
                last = state.step == self.total
                if last or asked() or (run.save_every and state.step % run.save_every == 0):
                    bar.note("save")
                    journal.save(state, self.learner)
                if not last:
                    stop_if_asked(f"after update {state.step}")
        self.export(state)
        journal.finish(state)
        return state

    def update(self, state: RunState) -> tuple[RunState, dict[str, float]]:
        """Run one optimizer update on the next examples of the epoch. Returns the new state and the metrics."""
        batch = self.stream.batch(state.step)
        packed = self.packed(batch)
        watch = self.movement.due(packed)
        with self.parts.timer.phase("learn"):
            learned = self.learned(packed, state, watch)
            stepped = self.learner.optim_step(self.total, watch_movement=watch)
        checks.check_gradient(stepped.grad_norm, stepped.policy_version)
        if watch:
            checks.check_movement(self.learner.movement_report())
        metrics = learned.result() | {
            "policy/grad_norm": stepped.grad_norm, "policy/lr": stepped.lr,
            "data/epoch": self.progress(state.step + 1).epochs_done, **self.counts(batch)}
        return replace(state, step=state.step + 1, policy_version=stepped.policy_version,
                       data_cursor=state.data_cursor + len(batch)), metrics

    def learned(self, packed: RankBatches, state: RunState, watch: bool) -> MetricSums:
        """Accumulate the gradient of one update. Returns the metrics of its loss."""
        return self.learner.supervised_forward_backward(packed, self.progress(state.step), watch_movement=watch)

    def counts(self, batch: list[tuple[int, Any]]) -> dict[str, float]:
        """Return the tokens of an update, by metric name."""
        return {"data/tokens": float(sum(len(example.token_ids) for _, example in batch)),
                "data/response_tokens": float(sum(sum(example.loss_mask) for _, example in batch))}

    def export(self, state: RunState) -> None:
        """Write the final model."""
        with phase("exporting the model"):
            self.learner.export(str(self.parts.run_dir / "export"))

    def progress(self, updates: int) -> Progress:
        """Return the progress, in epochs, after this number of updates."""
        return Progress(epochs_done=updates / self.stream.per_epoch, num_epochs=self.total / self.stream.per_epoch)

    def packed(self, batch: list[tuple[int, Any]]) -> RankBatches:
        return pack_examples(batch, self.learner.layout, reduction=self.recipe.reduction)

    def evaluate(self, state: RunState) -> dict[str, float]:
        """Return held-out metrics of the current policy if they are due, and the metrics of the probe."""
        every = self.recipe.evaluate.every
        due = state.step in (0, self.total) or (every and state.step % every == 0)
        metrics = self.heldout_metrics(state) if due and self.heldout else {}
        return metrics | (self.probe(state, self.total) if self.probe else {})

    def heldout_metrics(self, state: RunState) -> dict[str, float]:
        numbered = list(enumerate(self.heldout, start=len(self.train)))
        with self.parts.timer.phase("evaluate"):
            found = self.learner.supervised_forward_backward(
                self.packed(numbered), self.progress(state.step), learn=False).result()
        return {f"eval/{name.partition('/')[2]}" if name.startswith("sft/") else f"eval/{name.replace('/', '_')}": value
                for name, value in found.items() if name in EVALUATED}

    def provide_reference(self) -> None:
        """Fill the cache of reference states and let the learner read from the cache.

        Do nothing unless `reference.mode` is cache and the objective needs a reference.
        """
        section, recipe = self.recipe.reference, self.recipe
        if section.mode != "cache" or not recipe.objective.needs_reference:
            return
        folder = Path(section.cache_dir or self.parts.run_dir / "reference_cache").absolute()
        examples = [*self.train, *self.heldout]
        facts = cache_facts(recipe.model, recipe.reference.path or self.parts.model_path, examples)
        with being_filled(folder):
            cache = StateCache.begin(folder, facts, [sum(example.loss_mask) for example in examples])
            if not cache.is_complete:
                self.fill(cache, examples)
        self.learner.use_cache(str(folder))

    def fill(self, cache: StateCache, examples: Sequence[Example]) -> None:
        """Compute the states that are missing in the cache."""
        folder, missing = str(cache.folder), cache.missing()
        self.learner.begin_cache()
        checks.check_same_function(self.learner, self.recipe, self.parts.examples)
        with ProgressBar(len(examples), len(examples) - len(missing), "reference") as bar:
            for start in range(0, len(missing), CACHED_AT_A_TIME):
                part = missing[start:start + CACHED_AT_A_TIME]
                self.learner.cache_reference(self.packed([(i, examples[i]) for i in part]), folder)
                for _ in part:
                    bar.advance()
        self.learner.end_cache(folder)
