"""Run the stages of a plan, one after the other, on one set of engines and learner ranks.

A policy is trained as by its own command. A fork is trained in the same way, with a probe that measures the reward it
keeps. The fork's weights are pushed into engines that run already. The failure of a stage is recorded, and the other
stages continue. After the death of an engine or a rank, all processes start again and the stage continues from its
newest checkpoint.
"""
from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from string import Template
from typing import Any, TypeVar

import yaml

from frpo.cluster.learner_group import LearnerGroup
from frpo.cluster.recovery import RecoveringEngines
from frpo.config.finetune import FinetuneRecipe
from frpo.config.sections import Recipe
from frpo.downstream.before import START, complete, missing, write_distance, write_samples
from frpo.downstream.checks import check_seed, record_heldout, tasks_of
from frpo.downstream.kl_spacing import ProbeSchedule
from frpo.downstream.plan import Plan, SeedPlan, Stage
from frpo.downstream.probe import Exact, Task, TaskProbe, check_agreement, sampled, task_metrics
from frpo.errors import ConfigError, EngineError, FrpoError
from frpo.evaluation.model import of_model
from frpo.held import held_folder
from frpo.learner.tiny import tiny_model
from frpo.loading import load_function
from frpo.loops.rl import Trainer
from frpo.loops.sft import FineTuner
from frpo.report.curve import read_metrics
from frpo.run.build import Processes, RunParts, build_stack, check, parts_on, tried_rewards
from frpo.run.build_finetune import FinetuneParts, check_finetune, finetune_on
from frpo.run.stop_request import stop_if_asked
from frpo.telemetry.jsonl import JsonlFile
from frpo.telemetry.progress import ProgressBar
from frpo.types import RunState

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

STARTS = "starts.jsonl"
KL = "kept/kl"
"""Metric of a probe: KL in nats from the policy from which the fork began."""


def run_plan(plan: Plan, stack: Processes | None = None) -> None:
    """Run all stages and measurements that are not done yet, on running processes if given.

    A stage's own failure is recorded. Raises errors that would also stop every other stage.
    """
    done = [stage.done is not None for stage in plan.stages]
    with Matrix(plan, stack) as matrix, ProgressBar(len(done), sum(done), plan.recipe.run.name) as bar:
        for seed in plan.seeds:
            if not complete(plan.recipe, seed):
                with held_folder(seed.folder):  # several processes may run, each with seeds of its own
                    matrix.run_seed(seed, bar)


class Matrix:
    """Processes of a matrix, started when the first stage needs them, and the work that runs on them."""

    def __init__(self, plan: Plan, stack: Processes | None = None):
        """Prepare the matrix; start nothing. stack: processes that run already. Their owner ends them."""
        self.plan, self.recipe = plan, plan.recipe
        self.running = ExitStack()
        self.stack = stack
        self.restarts_left = self.recipe.run.restarts
        self.shared_s = 0.0
        """Seconds spent on parts that all stages share: a tiny model, engines and ranks."""

    def __enter__(self) -> Matrix:
        return self

    def __exit__(self, *error: object) -> None:
        self.running.close()

    def run_seed(self, seed: SeedPlan, bar: ProgressBar) -> None:
        self.set_up(seed)
        check_seed(self.recipe, seed)
        with tasks_of(seed) as tasks:
            record_heldout(seed, tasks[0].prompts, self.recipe.measure.overlap)
            for stage in seed.policies.values():
                self.attempt(stage, tasks, bar)
            for name in self.recipe.shown:
                bar.note(f"{name}, seed {seed.seed}: before any fork")
                self.surviving(name, partial(self.measure_policy, seed, name, tasks[0]))
            for stage in seed.forks:
                self.attempt(stage, tasks, bar)

    def set_up(self, seed: SeedPlan) -> None:
        """Run the recipe's setup, which makes models and files, once per seed."""
        if self.recipe.setup is not None and not seed.setup_done.is_file():
            load_function(self.recipe.setup, "setup", ConfigError)(seed.setup, seed.seed)
            seed.setup_done.touch()

    def attempt(self, stage: Stage, tasks: Sequence[Task], bar: ProgressBar) -> None:
        """Run a stage that is not done; record its failure."""
        if stage.done:
            return
        stop_if_asked(f"before {stage.name}")
        bar.note(stage.name)
        if stage.origin and not stage.origin.done:
            return stage.fail(f"its start, the policy {stage.origin.policy}, is missing")
        started, shared = time.perf_counter(), self.shared_s
        try:
            with held_folder(stage.run_dir):
                state = self.surviving(stage.name, lambda: self.run(stage, tasks))
        except EngineError:
            raise
        except FrpoError as error:
            stage.fail(f"{type(error).__name__}: {error}")
            return bar.log(f"{stage.name}: failed: {error}")
        shared = self.shared_s - shared
        seconds = time.perf_counter() - started - shared
        stage.finish(steps=state.step, seconds=seconds)
        bar.advance()
        before = f", after {shared:.0f} s for a start that all stages share" if shared >= 1 else ""
        return bar.log(f"{stage.name}: {state.step} updates, {seconds:.0f} s{before}")

    def surviving(self, name: str, work: Callable[[], Result]) -> Result:
        """Return the result of `work`. If an engine or a rank dies, repeat the work on new processes, at most
        `run.restarts` times in the whole matrix.
        """
        while True:
            try:
                return work()
            except EngineError as error:
                self.close_processes()
                if self.restarts_left == 0:
                    raise
                self.restarts_left -= 1
                logger.warning("%s: %s; starting engines and ranks again, %d more times allowed (run.restarts)", name,
                               error, self.restarts_left)

    def run(self, stage: Stage, tasks: Sequence[Task]) -> RunState:
        recipe = stage.recipe
        model = self.start_of(stage)
        stack = self.processes(tasks[0].recipe, model)
        if isinstance(recipe, FinetuneRecipe):
            return self.finetune(stage, recipe, tasks, stack, model)
        checked = check(recipe)
        with tried_rewards(recipe, checked.prompts) as rewards, \
                parts_on(stack, recipe, checked, rewards, model) as parts:
            probe = self.probe(stage, tasks, parts.engines, parts) if stage.regime else None
            return Trainer(parts, probe).fit()

    def finetune(self, stage: Stage, recipe: FinetuneRecipe, tasks: Sequence[Task], stack: Processes, model: str
                 ) -> RunState:
        checked = check_finetune(recipe)
        with finetune_on(stack.ranks, stack.device, recipe, checked, model, samples=bool(stage.regime)) as parts:
            probe = None
            if stage.regime:
                engines = self.connected(parts.learner, tasks[0].recipe)
                probe = self.probe(stage, tasks, engines, parts)
            return FineTuner(parts, probe).fit()

    def probe(self, stage: Stage, tasks: Sequence[Task], engines: RecoveringEngines, parts: RunParts | FinetuneParts
              ) -> TaskProbe:
        """Make the probe that measures the tasks after some updates of a stage. parts: the parts of its training."""
        parts.learner.keep_initial_policy()
        measure = self.recipe.measure
        schedule = ProbeSchedule(measure.at, measure.pictured_kl, partial(probed_kl, stage))
        return TaskProbe(schedule=schedule, tasks=tasks, exact=self.exact(stage.seed), engines=engines,
                         learner=parts.learner, journal=parts.journal, timer=parts.timer)

    def exact(self, seed: int) -> Exact | None:
        measure = self.recipe.measure
        if measure.exact is None:
            return None
        return partial(load_function(measure.exact, "measure.exact", ConfigError),
                       **{name: _with_seed(value, seed) for name, value in measure.exact_kwargs.items()})

    def measure_policy(self, seed: SeedPlan, name: str, task: Task) -> None:
        """Make the missing measurements of a policy before any fork."""
        wanted = missing(self.recipe, seed, name)
        if not wanted or not seed.has(name):
            return
        model = seed.model_of(name)
        recipe = of_model(task.recipe, model)
        stack = self.processes(recipe, model)
        learner = LearnerGroup(recipe, model, stack.device, stack.ranks)
        engines = self.connected(learner, recipe)
        engines.push(0)
        if wanted.samples:
            scored = sampled(task, engines, step=0, version=0, samples=wanted.samples)
            check_agreement(task, engines, learner, scored, version=0)
            write_samples(seed, name, scored)
        if wanted.reference and (wanted.reference == START or seed.has(wanted.reference)):
            if (apart := wanted.reference != name):
                start = wanted.reference == START
                learner.keep_initial_policy(
                    self.start_of(seed.policies[name]) if start else seed.model_of(wanted.reference))
            scored = sampled(task, engines, step=0, version=0)
            kl = learner.kl_groups([each.group for each in scored], to="start") if apart else None
            write_distance(seed, name, wanted.reference, task_metrics(task, scored, kl))

    def connected(self, learner: LearnerGroup, recipe: Recipe) -> RecoveringEngines:
        """Connect a learner to the running engines. From now on this learner's weights are pushed to them."""
        assert self.stack is not None, "a learner is made in running processes"
        pool = self.stack.pool
        pool.wait_until_ready()
        learner.connect_engines(pool.client(), pool.recipe.weight_sync)
        pool.share(learner)
        return RecoveringEngines(pool, learner, recipe.rollout.max_restarts)

    def processes(self, recipe: Recipe, model: str) -> Processes:
        """Return the running processes, or start new processes. model: the model that engines load first; all models of
        a matrix have the same shape.
        """
        if self.stack is None:
            started = time.perf_counter()
            with self.sharing():
                self.stack = self.running.enter_context(
                    build_stack(of_model(recipe, model), model, Path(self.recipe.run.dir)))
                self.stack.pool.wait_until_ready()
            starts = JsonlFile(Path(self.recipe.run.dir) / STARTS)
            starts.append({"seconds": time.perf_counter() - started})
            starts.close()
        self.stack.pool.give_way()
        return self.stack

    def start_of(self, stage: Stage) -> str:
        """Return the model that a stage begins with. Without one, make a tiny model, the same for all policies."""
        with self.sharing():
            return stage.start or tiny_model(stage.recipe, stage.run_dir.parents[1] / "model")

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Count the seconds within the block as shared by all stages."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.shared_s += time.perf_counter() - started

    def close_processes(self) -> None:
        self.running.close()
        self.running, self.stack = ExitStack(), None


def probed_kl(stage: Stage) -> dict[int, float]:
    """Return update -> KL in nats of the probes in a fork's metrics."""
    rows = read_metrics(stage.run_dir / "metrics.jsonl")
    return {int(row["step"]): row[KL] for row in rows if KL in row}


def _with_seed(value: Any, seed: int) -> Any:
    """Replace "$seed" in a text by the seed, and read the result as YAML: "$seed" alone becomes a number."""
    if not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(Template(value).substitute(seed=seed))
    except (KeyError, ValueError) as error:
        raise ConfigError(f"measure.exact_kwargs: {value!r} has an unknown $ word ({error}); allowed: $seed") from None
