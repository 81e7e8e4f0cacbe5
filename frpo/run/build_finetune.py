"""Build the live objects of a training on given answers, as `build` does for reinforcement learning."""
from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from frpo.cluster.actor_logs import FOLDER
from frpo.cluster.device import check_packages
from frpo.cluster.learner_group import LearnerGroup
from frpo.cluster.node_check import check_nodes
from frpo.cluster.placement import OnCpu, Places, reserved
from frpo.cluster.rank import Ranks
from frpo.cluster.runtime import choose_device, ray_session
from frpo.cluster.team import device_here, in_team
from frpo.config.finetune import FinetuneRecipe
from frpo.config.memory import memory_strategy
from frpo.config.preference import RewardModelRecipe
from frpo.data.examples import load_examples
from frpo.data.heldout import Split
from frpo.data.order import updates_of_epoch
from frpo.data.preferences import load_pairs
from frpo.held import held_folder
from frpo.learner.export import check_export
from frpo.learner.model import check_reference, check_scores, embedding_count, unstopped_turn
from frpo.learner.score_export import pad_apart
from frpo.learner.tiny import tiny_model
from frpo.run.build import check_whole, learner_ranks, tokenizer_of
from frpo.run.checkpoint import CheckpointStore
from frpo.run.journal import Journal, open_journal
from frpo.run.manifest import write_manifest
from frpo.run.sinks import check_login
from frpo.telemetry.progress import phase, remark
from frpo.telemetry.timer import PhaseTimer
from frpo.types import RunState

logger = logging.getLogger(__name__)

GivenRecipe = FinetuneRecipe | RewardModelRecipe
"""Recipe of a training on given answers."""


@dataclass(frozen=True, kw_only=True)
class FinetuneParts:
    """All parts of a fine-tuning, or of the training of a reward model.

    model_path: folder of the model to fine-tune. The same model is the reference if the recipe names no other.
    examples: `Example`s, or `Pair`s for a reward model.
    """

    recipe: Any
    run_dir: Path
    model_path: str
    examples: Split[Any]
    learner: LearnerGroup
    journal: Journal
    timer: PhaseTimer = field(default_factory=PhaseTimer)


@dataclass(frozen=True, kw_only=True)
class FinetunePreflight:
    """Results of the checks before anything of a run is made or started.

    per_epoch: optimizer updates of one pass over the examples. updates: optimizer updates of the whole run.
    """

    examples: Split[Any]
    per_epoch: int
    updates: int
    checkpoints: CheckpointStore
    resume: tuple[Path, RunState] | None


def check_finetune(recipe: GivenRecipe) -> FinetunePreflight:
    """Check everything that can fail without a loaded model. Writes nothing.

    Raises an FrpoError whose message names the change that is needed.
    """
    check_packages(recipe)
    check_login(recipe)
    memory_strategy(recipe.learner.deepspeed)
    checkpoints = CheckpointStore(Path(recipe.run.dir), recipe)
    resume = checkpoints.select()
    tokenizer = tokenizer_of(recipe.model)
    check_export(recipe.model, tokenizer, Path(recipe.run.dir))
    examples = _pairs(recipe, tokenizer) if isinstance(recipe, RewardModelRecipe) else _examples(recipe, tokenizer)
    per_epoch = updates_of_epoch(len(examples.train), recipe.data.batch_size)
    return FinetunePreflight(examples=examples, per_epoch=per_epoch, updates=recipe.run.updates(per_epoch),
                           checkpoints=checkpoints, resume=resume)


def _examples(recipe: FinetuneRecipe, tokenizer: PreTrainedTokenizerBase) -> Split[Any]:
    """Check the reference, and load the examples of a fine-tuning."""
    if recipe.reference.path is not None and recipe.objective.needs_reference:
        check_reference(recipe.model, recipe.reference.path, tokenizer)
    examples = load_examples(recipe.data, tokenizer, recipe.model.max_length, recipe.run.seed,
                             embedding_count(recipe.model))
    endless = unstopped_turn(recipe.model, tokenizer) if recipe.data.format == "chat" else None
    if endless:
        logger.warning("%s and in the export", endless)
    return examples


def _pairs(recipe: RewardModelRecipe, tokenizer: PreTrainedTokenizerBase) -> Split[Any]:
    """Check that the model can become a reward model, and load the pairs."""
    if recipe.model.path is not None:
        check_scores(recipe.model, recipe.model.path)
    pad_apart(deepcopy(tokenizer))
    return load_pairs(recipe.data, tokenizer, recipe.model.max_length, recipe.objective.compares, recipe.run.seed,
                      embedding_count(recipe.model))


@contextmanager
def build_finetune(recipe: GivenRecipe) -> Iterator[FinetuneParts]:
    """Hold the run's folder, make the model if the recipe has no model.path, start the learner's ranks.

    The ranks are the launcher's processes, or this process if one rank is enough, or Ray actors. They end with the
    context, also after an error.
    """
    with ExitStack() as stack:
        stack.enter_context(held_folder(Path(recipe.run.dir)))
        with phase("reading model and examples"):
            checked = check_finetune(recipe)
            check_whole(recipe.model)
        remark([*checked.examples.summary(recipe.ITEMS, recipe.data), *recipe.run.notes(),
                *recipe.learner.notes(checked.updates, recipe.model.lora is not None)])
        model_path = recipe.model.path or tiny_model(recipe, Path(recipe.run.dir) / "model")
        places: Places = OnCpu()
        if in_team(recipe):
            device = device_here(recipe)
        else:
            stack.enter_context(ray_session())
            device = choose_device(recipe, engines=False)
            places = stack.enter_context(reserved(recipe, device, engines=False))
            check_nodes(places.nodes(), Path(recipe.run.dir), model_path)
        ranks = stack.enter_context(learner_ranks(recipe, device, places, Path(recipe.run.dir) / FOLDER))
        yield stack.enter_context(finetune_on(ranks, device, recipe, checked, model_path))


@contextmanager
def finetune_on(ranks: Ranks, device: str, recipe: GivenRecipe, checked: FinetunePreflight, model_path: str,
                samples: bool = False) -> Iterator[FinetuneParts]:
    """Load a learner of this recipe in running ranks and open a journal, which is closed with the context.

    samples: whether the journal keeps completions, which a probe will draw.
    """
    run_dir = Path(recipe.run.dir)
    write_manifest(run_dir, recipe, checked.examples.digest, device)
    with phase(f"loading the learner: {recipe.learner.num_ranks} rank(s) of DeepSpeed {recipe.learner.deepspeed} on "
               f"{device}"):
        learner = LearnerGroup(recipe, model_path, device, ranks)
    names = ("metrics", "samples") if samples else ("metrics",)
    with open_journal(recipe, checked.checkpoints, checked.resume, names) as journal:
        yield FinetuneParts(recipe=recipe, run_dir=run_dir, model_path=model_path, examples=checked.examples,
                            learner=learner, journal=journal)
