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
from frpo.cluster.runtime import choose_device, ray_session
from frpo.config.loader import dump_recipe
from frpo.config.memory import memory_strategy
from frpo.config.sections import Recipe
from frpo.data.chat import check_tokenizer
from frpo.data.prompts import PromptSet, PromptStream, load_prompts
from frpo.learner.model import check_model_path, load_tokenizer
from frpo.learner.tiny import tiny_model
from frpo.manifest import write_manifest
from frpo.rewards import RewardSpec, RewardSuite
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
    model_path: str
    prompts: PromptSet
    stream: PromptStream
    rewards: RewardSuite
    pool: EnginePool
    sampler: Sampler
    learner: LearnerGroup
    checkpoints: CheckpointStore
    resume: tuple[Path, RunState] | None
    files: Mapping[str, JsonlFile]
    sinks: tuple[Sink, ...]
    timer: PhaseTimer


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What is known of a run before any engine starts."""

    model_path: str
    prompts: PromptSet
    checkpoints: CheckpointStore
    resume: tuple[Path, RunState] | None


def check(recipe: Recipe) -> Checked:
    """Everything that can fail without an engine. Raises the FrpoError that says what to change."""
    run_dir = Path(recipe.run.dir)
    memory_strategy(recipe.learner.deepspeed)
    checkpoints = CheckpointStore(run_dir, recipe)
    resume = checkpoints.select()
    if recipe.model.tiny is not None:
        model_path = tiny_model(recipe, run_dir / "model")
    else:
        model_path = recipe.model.path
    check_model_path(recipe.model, model_path)
    tokenizer = load_tokenizer(model_path, recipe.model.trust_remote_code)
    check_tokenizer(tokenizer, needs_chat=recipe.data.format == "chat")
    prompts = load_prompts(recipe.data, tokenizer, recipe.run.seed)
    return Checked(model_path=model_path, prompts=prompts, checkpoints=checkpoints, resume=resume)


@contextmanager
def build(recipe: Recipe) -> Iterator[Parts]:
    """Start rewards, Ray, engines and learner ranks; end them all with the context, also after an error."""
    checked = check(recipe)
    run_dir = Path(recipe.run.dir)
    with ExitStack() as stack:
        rewards = stack.enter_context(reward_suite(recipe, checked.prompts))
        stack.enter_context(ray_session())
        device = choose_device(recipe)
        write_manifest(run_dir, recipe, checked.prompts.digest, device)
        pool = EnginePool(recipe, checked.model_path, device)
        stack.callback(pool.close)
        learner = LearnerGroup(recipe, checked.model_path, device)
        stack.callback(learner.close)
        pool.wait_until_ready()
        learner.connect_engines(pool.client())
        files = open_files(recipe, run_dir)
        for file in files.values():
            stack.callback(file.close)
        sinks = _sinks(recipe, run_dir)
        for sink in sinks:
            stack.callback(sink.close)
        yield Parts(
            recipe=recipe, run_dir=run_dir, model_path=checked.model_path, prompts=checked.prompts,
            stream=PromptStream(checked.prompts.train, recipe.run.seed, recipe.data.shuffle), rewards=rewards, pool=pool,
            sampler=Sampler(pool, recipe.rollout.num_engines, recipe.run.seed), learner=learner,
            checkpoints=checked.checkpoints, resume=checked.resume, files=files, sinks=sinks, timer=PhaseTimer())


def reward_suite(recipe: Recipe, prompts: PromptSet) -> RewardSuite:
    """The recipe's reward functions, each in its own process."""
    specs = [RewardSpec(**reward.model_dump()) for reward in recipe.rewards]
    columns = sorted({name for prompt in prompts.train + prompts.heldout for name in prompt.columns})
    return RewardSuite(specs, chat=recipe.data.format == "chat", columns=columns)


def open_files(recipe: Recipe, run_dir: Path) -> dict[str, JsonlFile]:
    """The append-only files of a run, by name."""
    names = ("metrics", "traces") if recipe.telemetry.traces else ("metrics",)
    return {name: JsonlFile(run_dir / f"{name}.jsonl") for name in names}


def _sinks(recipe: Recipe, run_dir: Path) -> tuple[Sink, ...]:
    sinks: list[Sink] = []
    if recipe.telemetry.tensorboard:
        sinks.append(TensorBoardSink(run_dir / "tensorboard"))
    if recipe.telemetry.wandb:
        sinks.append(WandbSink(recipe.run.name, run_dir, dump_recipe(recipe)))
    return tuple(sinks)
