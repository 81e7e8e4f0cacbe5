"""Build all live objects of a run from its recipe, and end them again. No other module starts them.

Everything that needs no engine (recipe, model, tokenizer, data, rewards, checkpoint) is checked first.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from frpo.cluster.actor_logs import FOLDER
from frpo.cluster.device import check_packages
from frpo.cluster.engine_pool import EnginePool
from frpo.cluster.learner_group import LearnerGroup
from frpo.cluster.node_check import check_nodes
from frpo.cluster.placement import Places, SharedGpus, reserved
from frpo.cluster.rank import Ranks
from frpo.cluster.ray_ranks import RayRanks
from frpo.cluster.recovery import RecoveringEngines
from frpo.cluster.runtime import choose_device, ray_session
from frpo.cluster.scorers import check_actors, workers_of
from frpo.cluster.team import TeamRanks, device_here, in_team
from frpo.config.loader import AnyRecipe
from frpo.config.memory import memory_strategy
from frpo.config.model import ModelSection
from frpo.config.sections import Recipe
from frpo.data.examples import ExampleSet, load_examples
from frpo.data.prompts import PromptSet, PromptStream, load_prompts
from frpo.data.selection import PromptSelector, read_selection
from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.errors import ConfigError, ModelError, RewardError
from frpo.held import held_folder
from frpo.learner.export import check_export
from frpo.learner.lora import check_targets
from frpo.learner.model import (
    check_family,
    check_model_path,
    check_weights,
    embedding_count,
    hollow_network,
    lacking_weights,
    load_tokenizer,
    unstopped_turn,
)
from frpo.learner.router import balance_coefficient
from frpo.learner.tiny import tiny_model
from frpo.rewards import RewardSpec, RewardSuite, ScoreReport
from frpo.rewards.pool import WorkersOf, processes_of
from frpo.rewards.protocol import ActorSpec
from frpo.rewards.trial import constant_rewards
from frpo.rollout.episodes import load_hook
from frpo.rollout.sampler import Sampler
from frpo.run.checkpoint import CheckpointStore
from frpo.run.journal import Journal, open_journal
from frpo.run.manifest import write_manifest
from frpo.run.sinks import check_login
from frpo.telemetry.progress import phase, remark
from frpo.telemetry.timer import PhaseTimer
from frpo.types import Prompt, RunState, matches


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Running engines and empty learner ranks. Several runs can use them, one after another."""

    pool: EnginePool
    ranks: Ranks
    device: str


@dataclass(frozen=True, kw_only=True)
class SamplingParts:
    """The parts that draw prompts, sample completions and score them."""

    recipe: Recipe
    prompts: PromptSet
    stream: PromptStream | PromptSelector
    rewards: RewardSuite
    pool: EnginePool
    sampler: Sampler
    timer: PhaseTimer = field(default_factory=PhaseTimer)


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """All parts of a training run: those that sample, those that learn, and the run's files."""

    sampling: SamplingParts
    engines: RecoveringEngines
    learner: LearnerGroup
    auxiliary: ExampleSet | None
    journal: Journal

    @property
    def recipe(self) -> Recipe:
        """Return the recipe of the run."""
        return self.sampling.recipe

    @property
    def run_dir(self) -> Path:
        """Return the folder of the run."""
        return Path(self.recipe.run.dir)

    @property
    def timer(self) -> PhaseTimer:
        """Return the clock of the run's phases."""
        return self.sampling.timer


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """Results of the checks before anything of a run is made or started."""

    notes: list[str]
    prompts: PromptSet
    auxiliary: ExampleSet | None
    checkpoints: CheckpointStore
    resume: tuple[Path, RunState] | None


def check(recipe: Recipe) -> Preflight:
    """Check everything that can fail without a loaded model, an engine or a reward process. Writes nothing.

    Raises an FrpoError whose message names the change that is needed.
    """
    check_packages(recipe)
    check_login(recipe)
    memory_strategy(recipe.learner.deepspeed)
    if recipe.rollout.hook is not None:
        load_hook(recipe.rollout.hook)
    checkpoints = CheckpointStore(Path(recipe.run.dir), recipe)
    resume = checkpoints.select()
    tokenizer = tokenizer_of(recipe.model)
    check_export(recipe.model, tokenizer, Path(recipe.run.dir))
    prompts = _prompts(recipe, tokenizer)
    check_watched(recipe, prompts)
    return Preflight(notes=tried_objective(recipe), prompts=prompts, auxiliary=_auxiliary(recipe, tokenizer),
                     checkpoints=checkpoints, resume=resume)


def check_watched(recipe: Recipe, prompts: PromptSet) -> None:
    """Raise ConfigError if a `where` selects none of the training prompts, or if a constraint watches prompts to which
    its cost does not apply.
    """
    routes = {reward.name: reward.where for reward in recipe.rewards}
    for name, where in routes.items():
        if not any(matches(prompt.columns, where) for prompt in prompts.train):
            raise ConfigError(f"where = {where} of reward {name!r} selects none of {len(prompts.train)} training "
                              f"prompts, whose columns are: {_columns(prompts)}; change where")
    constraint = recipe.objective.constraint
    if constraint is not None and not any(constraint.watches(prompt.columns) for prompt in prompts.train):
        raise ConfigError(f"objective.constraint.where = {constraint.where} selects none of {len(prompts.train)} "
                          f"training prompts, whose columns are: {_columns(prompts)}; change where")
    if constraint is not None:
        route = routes[constraint.cost]
        uncosted = sum(constraint.watches(prompt.columns) and not matches(prompt.columns, route)
                       for prompt in prompts.train)
        if uncosted:
            raise ConfigError(f"objective.constraint watches {uncosted} training prompts on which its cost "
                              f"{constraint.cost!r} abstains (where = {route}); set objective.constraint.where to the "
                              "same")


def _columns(prompts: PromptSet) -> str:
    return ", ".join(prompts.train[0].columns) or "none"


def tried_objective(recipe: Recipe) -> list[str]:
    """Try the recipe's advantage estimators and return notes. Raises ConfigError if an estimator fails."""
    try:
        return recipe.objective.notes(recipe.rollout.group_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_prompts(recipe: Recipe) -> PromptSet:
    """Check that model and tokenizer fit the recipe, then return the prompts."""
    return _prompts(recipe, tokenizer_of(recipe.model))


def _prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    prompts = load_prompts(recipe.data, tokenizer, recipe.run.seed, embedding_count(recipe.model))
    endless = unstopped_turn(recipe.model, tokenizer) if recipe.data.format == "chat" else None
    if endless:
        raise ModelError(endless)
    return prompts


def _auxiliary(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> ExampleSet | None:
    """Load the examples of the recipe's supervised term; None if the recipe has no such term."""
    if recipe.auxiliary is None:
        return None
    return load_examples(recipe.auxiliary.data, tokenizer, recipe.model.max_length, recipe.run.seed,
                         embedding_count(recipe.model))


def check_whole(model: ModelSection) -> None:
    """Raise ModelError if the model has no weights. A check of the recipe alone does not need them."""
    if lacking := lacking_weights(model):
        raise ModelError(lacking)


def tokenizer_of(model: ModelSection) -> PreTrainedTokenizerBase:
    """Check that the model exists and fits the recipe, then return its tokenizer."""
    if model.tiny is not None:
        return build_tokenizer()
    path = model.path
    assert path is not None  # required without a tiny model
    check_model_path(model, path)
    check_weights(path)
    check_family(model, path)
    if model.router_aux_loss_coef:
        balance_coefficient(model, hollow_network(model, path))
    if model.lora is not None:
        check_targets(model, path)
    return load_tokenizer(path, model.trust_remote_code)


@contextmanager
def build(recipe: Recipe) -> Iterator[RunParts]:
    """Hold the run's folder, start rewards, Ray, engines and learner ranks.

    All of them end with the context, also after an error.
    """
    run_dir = Path(recipe.run.dir)
    with held_folder(run_dir):
        with phase("reading model, prompts and rewards"):
            checked = check(recipe)
            check_whole(recipe.model)
        remark([*checked.prompts.summary("prompts", recipe.data),
                *recipe.learner.notes(recipe.updates, recipe.model.lora is not None), *checked.notes])
        with tried_rewards(recipe, checked.prompts) as rewards:
            model_path = recipe.model.path or tiny_model(recipe, run_dir / "model")
            with build_stack(recipe, model_path, run_dir) as stack, \
                    parts_on(stack, recipe, checked, rewards, model_path) as parts:
                yield parts


@contextmanager
def build_stack(recipe: Recipe, model_path: str, run_dir: Path) -> Iterator[Processes]:
    """Start Ray, engines that begin to load the model, and learner ranks without a model; end all with the context.

    run_dir: the folder in which their output goes to files.
    """
    with ExitStack() as stack:
        stack.enter_context(ray_session())
        team, samples = in_team(recipe), recipe.rollout.replay is None
        ranks_device = device_here(recipe) if team else None
        if ranks_device is not None and not samples:
            device = ranks_device
        else:
            device = choose_device(recipe, learner=not team, engines=samples)
        if ranks_device not in (None, device):
            raise ConfigError(f"the launcher's ranks are on {ranks_device} and leave no GPU to rollout engines; start "
                              "fewer ranks (--num_gpus), or set run.device to cpu")
        if team and samples and device == "cuda" and recipe.placement.mode == "colocate":
            raise ConfigError("placement: colocate needs ranks that Ray has started; run the recipe without a launcher "
                              "and with learner.ranks: ray, or set placement to split")
        places = stack.enter_context(reserved(recipe, device, ranks=not team, engines=samples))
        check_nodes(places.nodes(), run_dir, model_path)
        logs = run_dir / FOLDER
        if isinstance(places, SharedGpus):  # engines follow the ranks to their GPUs
            ranks = stack.enter_context(learner_ranks(recipe, device, places, logs))
            pool = stack.enter_context(engine_pool(recipe, model_path, device, places, logs))
        else:  # engines take longer to load, so they start first
            pool = stack.enter_context(engine_pool(recipe, model_path, device, places, logs))
            ranks = stack.enter_context(learner_ranks(recipe, device, places, logs))
        yield Processes(pool=pool, ranks=ranks, device=device)


@contextmanager
def parts_on(stack: Processes, recipe: Recipe, checked: Preflight, rewards: RewardSuite, model_path: str
             ) -> Iterator[RunParts]:
    """Load a learner of this recipe in the stack's ranks and open a journal, which is closed with the context."""
    run_dir, pool = Path(recipe.run.dir), stack.pool
    write_manifest(run_dir, recipe, checked.prompts.digest, stack.device)
    pool.give_way()
    with phase(f"loading the learner: {recipe.learner.num_ranks} rank(s) of DeepSpeed {recipe.learner.deepspeed} on "
               f"{stack.device}"):
        learner = LearnerGroup(recipe, model_path, stack.device, stack.ranks)
    with phase(f"waiting for {len(pool.starting)} rollout engine(s) to load the model"):
        pool.wait_until_ready()
    learner.connect_engines(pool.client(), pool.recipe.weight_sync)
    pool.share(learner)
    engines = RecoveringEngines(pool, learner, recipe.rollout.max_restarts)
    names = ("metrics", "samples", "traces") if recipe.telemetry.traces else ("metrics", "samples")
    with open_journal(recipe, checked.checkpoints, checked.resume, names) as journal:
        sampling = SamplingParts(
            recipe=recipe, prompts=checked.prompts, rewards=rewards, pool=pool,
            stream=prompt_stream(recipe, checked.prompts, checked.resume and checked.resume[0]),
            sampler=Sampler(engines, recipe.rollout.num_engines, recipe.run.seed, recipe.rollout.assignment))
        yield RunParts(sampling=sampling, engines=engines, learner=learner, auxiliary=checked.auxiliary,
                       journal=journal)


@contextmanager
def build_engines(recipe: Recipe, prompts: PromptSet) -> Iterator[SamplingParts]:
    """Start rewards, Ray and engines on the recipe's model; end them with the context.

    The engines serve the weights on disk as version 0. There is no learner, so `rollout.replay` and
    `rollout.max_staleness` of the recipe are ignored.
    """
    if recipe.rollout.hook is not None:
        load_hook(recipe.rollout.hook)
    alone = recipe.rollout.model_copy(update={"replay": None, "max_staleness": 0})
    recipe = recipe.model_copy(update={"rollout": alone})
    check_whole(recipe.model)
    with ExitStack() as stack:
        rewards = stack.enter_context(tried_rewards(recipe, prompts))
        model_path = recipe.model.path or tiny_model(recipe, Path(recipe.run.dir) / "model")
        stack.enter_context(ray_session())
        device = choose_device(recipe, learner=False)
        places = stack.enter_context(reserved(recipe, device, ranks=False))
        check_nodes(places.nodes(), Path(recipe.run.dir), model_path)
        pool = stack.enter_context(engine_pool(recipe, model_path, device, places))
        with phase(f"waiting for {len(pool.starting)} rollout engine(s) to load the model"):
            pool.wait_until_ready()
        pool.serve_loaded(version=0)
        yield SamplingParts(
            recipe=recipe, prompts=prompts, rewards=rewards, pool=pool, stream=prompt_stream(recipe, prompts, None),
            sampler=Sampler(pool, recipe.rollout.num_engines, recipe.run.seed, recipe.rollout.assignment))


@contextmanager
def learner_ranks(recipe: AnyRecipe, device: str, places: Places, logs: Path | None = None) -> Iterator[Ranks]:
    """Start processes for a learner, without a model yet: a team or Ray actors. They end with the context.

    logs: folder for the output of actors; None: Ray's own.
    """
    ranks = TeamRanks(recipe, device) if in_team(recipe) else RayRanks(recipe, device, places, logs)
    try:
        yield ranks
    finally:
        ranks.close()


@contextmanager
def engine_pool(recipe: Recipe, model_path: str, device: str, places: Places, logs: Path | None = None
                ) -> Iterator[EnginePool]:
    """Start rollout engines, which begin to load the model; none if traces are replayed. End them with the context.

    logs: folder for their output; None: Ray's own.
    """
    count = 0 if recipe.rollout.replay else recipe.rollout.num_engines
    pool = EnginePool(recipe, model_path, device, count, places, logs)
    try:
        yield pool
    finally:
        pool.close()


def reward_suite(recipe: Recipe, prompts: PromptSet, workers: WorkersOf = processes_of) -> RewardSuite:
    """Make the suite of the recipe's reward functions. By default each runs in its own process on this machine."""
    specs = [RewardSpec(**reward.model_dump(exclude={"actor"}),
                        actor=None if reward.actor is None else ActorSpec(**reward.actor.model_dump()))
             for reward in recipe.rewards]
    columns = sorted({name for prompt in prompts.train + prompts.heldout for name in prompt.columns})
    return RewardSuite(specs, columns=columns, workers=workers)


@contextmanager
def tried_rewards(recipe: Recipe, prompts: PromptSet, actors: bool = True) -> Iterator[RewardSuite]:
    """Start the reward functions and try them; end them with the context.

    If a reward has actors, Ray is started too. actors: False puts all functions into processes on this machine.
    """
    with ExitStack() as stack:
        workers: WorkersOf = processes_of
        if actors and any(reward.actor is not None for reward in recipe.rewards):
            stack.enter_context(ray_session())
            check_actors(recipe)
            workers = workers_of
        rewards = stack.enter_context(reward_suite(recipe, prompts, workers))
        try_rewards(rewards, recipe, prompts)
        yield rewards


def try_rewards(rewards: RewardSuite, recipe: Recipe, prompts: PromptSet) -> ScoreReport:
    """Call the rewards on made-up groups of the run's size, with at most one step's number of groups at a time.

    Raises RewardError. Calls nothing if `checks.rewards` is false.
    """
    if not recipe.checks.rewards:
        return ScoreReport(groups=[], counts={})
    for what, some in (("training", prompts.train), ("held-out", prompts.heldout)):
        remark(_lacking_columns(rewards, what, some))
    report = rewards.try_out(prompts.train + prompts.heldout, group_size=recipe.rollout.group_size,
                             most=recipe.rollout.prompts_per_step)
    remark(constant_rewards(report.groups))
    return report


def _lacking_columns(rewards: RewardSuite, what: str, prompts: Sequence[Prompt]) -> Iterator[str]:
    """Yield a note for each column that a reward needs and some prompts lack. Raises RewardError if all lack it."""
    for (reward, column), without in rewards.lacking(prompts).items():
        where = without[0].origin or without[0].uid
        if len(without) == len(prompts):
            raise RewardError(f"reward {reward!r} needs the column {column!r}, but none of the {len(prompts)} {what} "
                              f"prompts has it (the first: {where}); add the column to the rows, or give the parameter "
                              "a default")
        yield (f"note: reward {reward!r} needs the column {column!r}, but {len(without)} of {len(prompts)} {what} "
               f"prompts lack it (the first: {where}); the reward gets None for them")


def prompt_stream(recipe: Recipe, prompts: PromptSet, checkpoint: Path | None) -> PromptStream | PromptSelector:
    """Return the source of training prompts. A selection continues from its state in the checkpoint."""
    stream = PromptStream(prompts.train, recipe.run.seed, recipe.data.shuffle)
    if recipe.data.selection is None:
        return stream
    return PromptSelector(stream, recipe.data.selection, read_selection(checkpoint))
