"""The RL loop: sample groups, score them, weigh them, update the policy, push its weights.

It reads like the algorithm. Live objects come from `builder`, metric arithmetic is in `step_metrics` and `telemetry`,
formulas in `objectives`; nothing of Ray, vLLM or DeepSpeed is visible here.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from frpo import invariants
from frpo.builder import Parts
from frpo.config.loader import recipe_digest
from frpo.data.batcher import pack
from frpo.errors import CheckpointError
from frpo.evaluate.heldout import evaluate_heldout
from frpo.objectives.stage import References, advantaged, reweighted, sequence_log_ratios
from frpo.rewards import shuffled
from frpo.rollout.engine import Sampling
from frpo.step_metrics import reweight_metrics, rollout_metrics, trace_rows
from frpo.telemetry import MetricSums, ProgressBar, step_line
from frpo.types import AdvantagedGroup, OptimStepOutput, Prompt, RolloutGroup, RunState


class Trainer:
    """Drives one run from its first or restored step to its last."""

    def __init__(self, parts: Parts):
        self.parts, self.recipe = parts, parts.recipe
        self.parity_unchecked = True
        self.movement = invariants.MovementWatch(self.recipe)

    def fit(self) -> RunState:
        """Train to the last step; save and export. Returns the final state."""
        run, every = self.recipe.run, self.recipe.evaluate.every
        state = self.restore()
        self.parts.learner.push_weights(state.policy_version)
        with ProgressBar(run.num_steps, state.step, run.name) as bar:
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
        parts, phase = self.parts, self.parts.timer.phase
        prompts = parts.stream.take(state.data_cursor, self.recipe.rollout.prompts_per_step)
        with phase("generate"):
            groups = self.generate(prompts, state, bar)
        with phase("reward"):
            report = parts.rewards.score(groups)
            scored = report.groups
            if self.recipe.shuffle_rewards:
                scored = shuffled(scored, seed=self.recipe.run.seed * 1_000_003 + state.step)
        with phase("score"):
            references = self.reference_logprobs(groups, state)
        weighed = advantaged(scored, self.recipe.objective.advantage, references, self.kl_in_reward)
        with phase("learn"):
            learned, stepped = self.learn(weighed)
        with phase("sync"):
            parts.learner.push_weights(stepped.policy_version)
        self.trace(weighed)
        metrics = rollout_metrics(weighed, parts.timer.seconds["generate"]) | report.counts | learned.result()
        metrics |= {"policy/lr": stepped.lr, "policy/version": float(stepped.policy_version)}
        return replace(state, step=state.step + 1, policy_version=stepped.policy_version,
                       data_cursor=state.data_cursor + len(prompts)), metrics

    def generate(self, prompts: Sequence[Prompt], state: RunState, bar: ProgressBar) -> list[RolloutGroup]:
        """P groups of G completions, all from the weights of `state.policy_version`."""
        section = self.recipe.rollout
        sampling = Sampling(
            temperature=section.temperature, top_p=section.top_p, max_new_tokens=section.max_new_tokens)
        return self.parts.sampler.sample(
            prompts, step=state.step, first_sample=state.data_cursor * section.group_size,
            group_size=section.group_size, sampling=sampling, version=state.policy_version,
            on_group=lambda done: bar.note(f"generate {done}/{len(prompts)}"))

    def reference_logprobs(self, groups: Sequence[RolloutGroup], state: RunState) -> References:
        """Log-probabilities under the frozen reference where a KL term asks; before it, once, the parity check."""
        if self.parity_unchecked:
            invariants.check_logprob_gap(self.parts, groups, state.policy_version)
            self.parity_unchecked = False
        if self.recipe.objective.kl_coef == 0:
            return [None] * len(groups)
        return self.parts.learner.score_groups(groups, "reference")

    def learn(self, groups: Sequence[AdvantagedGroup]) -> tuple[MetricSums, OptimStepOutput]:
        """U optimizer updates on disjoint minibatches of whole groups, E times over."""
        section, learner, metrics = self.recipe.learner, self.parts.learner, MetricSums()
        updates, size = section.updates_per_step * section.epochs_per_step, len(groups) // section.updates_per_step
        old: References = [None] * len(groups)
        if updates > 1:
            old = learner.score_groups([group.scored.group for group in groups], "policy")
        for index in range(updates):
            start = index % section.updates_per_step * size
            part, old_part = groups[start:start + size], old[start:start + size]
            if index > 0 and self.recipe.objective.reweight == "current":
                part = self.reweighted(part, old_part, metrics)
            update = pack(part, learner.layout, old_logprobs=old_part, **self.weighting)
            watch = self.movement.due(update)
            learned = learner.forward_backward(update, watch_movement=watch).parts
            # From the second update on the policy is not the one that sampled: its gap to the engine means nothing.
            metrics.update({k: v for k, v in learned.items() if index == 0 or not k.startswith("rollout/")})
            stepped = learner.optim_step(self.recipe.run.num_steps * updates, watch_movement=watch)
            metrics.add("policy/grad_norm", stepped.grad_norm, 1.0)
            if watch:
                invariants.check_movement(learner.movement_report())
        return metrics, stepped

    def reweighted(self, groups: Sequence[AdvantagedGroup], old: References, metrics: MetricSums
                   ) -> list[AdvantagedGroup]:
        """The groups of one update with the advantages at the current policy, for one more forward pass."""
        with self.parts.timer.phase("reweight"):
            current = self.parts.learner.score_groups([group.scored.group for group in groups], "policy")
        log_ratios = sequence_log_ratios(groups, current, old, **self.weighting)
        groups = reweighted(groups, self.recipe.objective.advantage, log_ratios, self.kl_in_reward)
        metrics.update(reweight_metrics(groups))
        return groups

    @property
    def weighting(self) -> dict[str, Any]:
        """How token losses become one number."""
        objective = self.recipe.objective
        return {"reduction": objective.reduction, "max_length": self.recipe.rollout.max_new_tokens,
                "train_truncated": objective.truncated == "train"}

    @property
    def kl_in_reward(self) -> float:
        """beta where the KL is subtracted from rewards, otherwise 0."""
        return self.recipe.objective.kl_coef if self.recipe.objective.kl_estimator == "k1" else 0.0

    def evaluate(self, state: RunState, bar: ProgressBar) -> dict[str, float]:
        """Held-out metrics of the current policy; none without held-out prompts."""
        bar.note("evaluate")
        with self.parts.timer.phase("evaluate"):
            return evaluate_heldout(self.parts, state) if self.parts.prompts.heldout else {}

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
        return state

    def save(self, state: RunState, bar: ProgressBar) -> None:
        """One resumable checkpoint."""
        bar.note("save")
        path = self.parts.checkpoints.begin(state.step)
        self.parts.learner.save(str(path / "learner"))
        offsets = {name: file.offset() for name, file in self.parts.files.items()}
        self.parts.checkpoints.finish(path, replace(state, file_offsets=offsets))

    def trace(self, groups: Sequence[AdvantagedGroup]) -> None:
        if "traces" in self.parts.files:
            for row in trace_rows(groups):
                self.parts.files["traces"].append(row)

    def write(self, step: int, metrics: dict[str, float], bar: ProgressBar) -> None:
        """Metrics of one step to every sink, and its one log line."""
        metrics = metrics | self.parts.timer.collect()
        self.parts.files["metrics"].append({"step": step, **metrics})
        for sink in self.parts.sinks:
            sink.write(step, metrics)
        bar.log(step_line(step, metrics))
