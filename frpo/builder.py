"""The only constructor of live objects: a recipe becomes everything that a loop drives, and is taken down again.

What can be known without an engine (recipe, model, tokenizer, data, rewards, checkpoint) is checked first.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from frpo.checkpoint import CheckpointStore
from frpo.cluster.engine_pool import EnginePool
from frpo.cluster.learner_group import LearnerGroup
from frpo.cluster.recovery import RecoveringEngines
from frpo.cluster.runtime import choose_device, ray_session
from frpo.config.loader import dump_recipe
from frpo.config.memory import memory_strategy
from frpo.config.sections import Recipe
from frpo.data.chat import check_tokenizer
from frpo.data.prompts import PromptSet, PromptStream, load_prompts
from frpo.data.selection import PromptSelector, read_selection
from frpo.data.tiny_tokenizer import build_tokenizer
from frpo.learner.lora import check_targets
from frpo.learner.model import check_model_path, load_tokenizer
from frpo.learner.tiny import tiny_model
from frpo.manifest import write_manifest
from frpo.rewards import RewardSpec, RewardSuite
from frpo.rollout.episodes import load_hook
from frpo.rollout.sampler import Sampler
from frpo.telemetry import JsonlFile, PhaseTimer, Sink, TensorBoardSink, WandbSink
from frpo.types import RunState


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything a training run is made of. `resume` is where to go on, if anywhere.

    files: the append-only files by name; their sizes are part of a checkpoint.
    """

    recipe: Recipe
    run_dir: Path
    prompts: PromptSet
    stream: PromptStream | PromptSelector
    rewards: RewardSuite
    pool: EnginePool
    engines: RecoveringEngines
    sampler: Sampler
    learner: LearnerGroup
    checkpoints: CheckpointStore
    resume: tuple[Path, RunState] | None
    files: Mapping[str, JsonlFile]
    sinks: tuple[Sink, ...]
    timer: PhaseTimer


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What it takes to sample a model that is only served, and to score what it says; as in `Parts`, but no learner."""

    recipe: Recipe
    prompts: PromptSet
    stream: PromptStream | PromptSelector
    rewards: RewardSuite
    pool: EnginePool
    sampler: Sampler
    timer: PhaseTimer


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What is known of a run before anything is made or started."""

    prompts: PromptSet
    checkpoints: CheckpointStore
    resume: tuple[Path, RunState] | None


def check(recipe: Recipe) -> Checked:
    """Everything that can fail without a model, an engine or a reward process; writes nothing.

    Raises the FrpoError that says what to change.
    """
    memory_strategy(recipe.learner.deepspeed)
    if recipe.rollout.hook is not None:
        load_hook(recipe.rollout.hook)
    checkpoints = CheckpointStore(Path(recipe.run.dir), recipe)
    resume = checkpoints.select()
    return Checked(prompts=check_prompts(recipe), checkpoints=checkpoints, resume=resume)


def check_prompts(recipe: Recipe) -> PromptSet:
    """The prompts, once model and tokenizer have been found to fit the recipe."""
    if recipe.model.tiny is not None:
        tokenizer = build_tokenizer()
    else:
        check_model_path(recipe.model, recipe.model.path)
        if recipe.model.lora is not None:
            check_targets(recipe.model, recipe.model.path)
        tokenizer = load_tokenizer(recipe.model.path, recipe.model.trust_remote_code)
    check_tokenizer(tokenizer, needs_chat=recipe.data.format == "chat")
    return load_prompts(recipe.data, tokenizer, recipe.run.seed)


@contextmanager
def build(recipe: Recipe) -> Iterator[Parts]:
    """Start rewards, Ray, engines and learner ranks; end them all with the context, also after an error."""
    checked = check(recipe)
    run_dir = Path(recipe.run.dir)
    with ExitStack() as stack:
        rewards = stack.enter_context(reward_suite(recipe, checked.prompts))
        model_path = recipe.model.path or tiny_model(recipe, run_dir / "model")
        stack.enter_context(ray_session())
        device = choose_device(recipe, engines=recipe.rollout.replay is None)
        write_manifest(run_dir, recipe, checked.prompts.digest, device)
        pool = stack.enter_context(engine_pool(recipe, model_path, device))
        learner = LearnerGroup(recipe, model_path, device)
        stack.callback(learner.close)
        pool.wait_until_ready()
        learner.connect_engines(pool.client())
        engines = RecoveringEngines(pool, learner, recipe.rollout.max_restarts)
        files = open_files(recipe, run_dir, going_on=checked.resume is not None)
        for file in files.values():
            stack.callback(file.close)
        sinks = _sinks(recipe, run_dir)
        for sink in sinks:
            stack.callback(sink.close)
        yield Parts(
            recipe=recipe, run_dir=run_dir, prompts=checked.prompts, rewards=rewards, pool=pool, engines=engines,
            learner=learner, stream=prompt_stream(recipe, checked.prompts, checked.resume and checked.resume[0]),
            sampler=Sampler(engines, recipe.rollout.num_engines, recipe.run.seed, recipe.rollout.assignment),
            checkpoints=checked.checkpoints, resume=checked.resume, files=files, sinks=sinks, timer=PhaseTimer())


@contextmanager
def build_engines(recipe: Recipe, prompts: PromptSet) -> Iterator[Serving]:
    """Start rewards, Ray and engines on the recipe's model; end them with the context.

    The engines serve the weights that lie there, as version 0. Without a learner nothing is replayed to it and nothing
    sampled ahead of it, whatever the recipe says.
    """
    if recipe.rollout.hook is not None:
        load_hook(recipe.rollout.hook)
    alone = recipe.rollout.model_copy(update={"replay": None, "max_staleness": 0})
    recipe = recipe.model_copy(update={"rollout": alone})
    with ExitStack() as stack:
        rewards = stack.enter_context(reward_suite(recipe, prompts))
        model_path = recipe.model.path or tiny_model(recipe, Path(recipe.run.dir) / "model")
        stack.enter_context(ray_session())
        pool = stack.enter_context(engine_pool(recipe, model_path, choose_device(recipe, learner=False)))
        pool.wait_until_ready()
        pool.serve_loaded(version=0)
        yield Serving(
            recipe=recipe, prompts=prompts, rewards=rewards, pool=pool, stream=prompt_stream(recipe, prompts, None),
            sampler=Sampler(pool, recipe.rollout.num_engines, recipe.run.seed, recipe.rollout.assignment),
            timer=PhaseTimer())


@contextmanager
def engine_pool(recipe: Recipe, model_path: str, device: str) -> Iterator[EnginePool]:
    """Rollout engines that have begun to load, none where traces are replayed; ended with the context."""
    pool = EnginePool(recipe, model_path, device, 0 if recipe.rollout.replay else recipe.rollout.num_engines)
    try:
        yield pool
    finally:
        pool.close()


def reward_suite(recipe: Recipe, prompts: PromptSet) -> RewardSuite:
    """The recipe's reward functions, each in its own process."""
    specs = [RewardSpec(**reward.model_dump()) for reward in recipe.rewards]
    columns = sorted({name for prompt in prompts.train + prompts.heldout for name in prompt.columns})
    return RewardSuite(specs, chat=recipe.data.format == "chat", columns=columns)


def prompt_stream(recipe: Recipe, prompts: PromptSet, checkpoint: Path | None) -> PromptStream | PromptSelector:
    """Where training prompts are drawn from; a selection goes on from what the checkpoint knows."""
    stream = PromptStream(prompts.train, recipe.run.seed, recipe.data.shuffle)
    if recipe.data.selection is None:
        return stream
    return PromptSelector(stream, recipe.data.selection, read_selection(checkpoint))


def open_files(recipe: Recipe, run_dir: Path, *, going_on: bool) -> dict[str, JsonlFile]:
    """The append-only files of a run, by name. A run that starts anew moves an earlier one's files aside first."""
    names = ("metrics", "traces") if recipe.telemetry.traces else ("metrics",)
    paths = {name: run_dir / f"{name}.jsonl" for name in names}
    for name, path in paths.items():
        if not going_on and path.is_file() and path.stat().st_size > 0:
            number = 1 + sum(1 for _ in run_dir.glob(f"{name}.earlier-*.jsonl"))
            path.rename(run_dir / f"{name}.earlier-{number}.jsonl")
    return {name: JsonlFile(path) for name, path in paths.items()}


def _sinks(recipe: Recipe, run_dir: Path) -> tuple[Sink, ...]:
    sinks: list[Sink] = []
    if recipe.telemetry.tensorboard:
        sinks.append(TensorBoardSink(run_dir / "tensorboard"))
    if recipe.telemetry.wandb:
        sinks.append(WandbSink(recipe.run.name, run_dir, dump_recipe(recipe)))
    return tuple(sinks)
