"""Suggest the keys to change if a run does not fit, each with the memory needed after the change."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from frpo.config.model import LoraSection
from frpo.config.sections import Recipe
from frpo.plan.gpus import RANK, SHARED, Demand, Run, demands, with_value
from frpo.plan.parts import in_gb, joined

STRATEGIES = ("zero2", "zero3", "zero2_offload", "zero3_offload")
SHOWN = 5
"""Most keys in one line."""


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A change of one key. text: the key and its value. needed: bytes at the fullest turn after the change. fits:
    whether that is little enough.
    """

    text: str
    needed: float
    fits: bool


def explain(run: Run, demand: Demand) -> str:
    """Describe an unmet demand in one line: bytes needed, their parts, bytes available, and the keys to change."""
    found = remedies(run, demand)
    change = ", ".join(f"{remedy.text} ({in_gb(remedy.needed)} GB{'' if remedy.fits else ', still too much'})"
                       for remedy in found[:SHOWN])
    return (f"{demand.role} ({demand.turn}) needs {in_gb(demand.needed)} GB = {joined(demand.parts)}; there are "
            f"{in_gb(demand.available)} GB. Change "
            + (change or "the model, or take GPUs with more memory (--memory)"))


def remedies(run: Run, demand: Demand) -> list[Remedy]:
    """List the remedies that help. Remedies that are enough alone come first, the smallest change first of all."""
    found = []
    for text, changed in _candidates(run, demand):
        after = demands(changed)
        # A change may end the sharing of GPUs: then every GPU counts.
        same = [each for each in after if (each.role, _kind(each)) == (demand.role, _kind(demand))] or after
        needed = max(each.needed for each in same)
        fits = all(each.fits for each in same)
        if fits or needed < 0.99 * demand.needed:
            found.append(Remedy(text=text, needed=needed, fits=fits))
    return sorted(found, key=lambda remedy: (not remedy.fits, -remedy.needed if remedy.fits else remedy.needed))


def _kind(demand: Demand) -> str:
    """Return the turn without its fullest phase, because a remedy may make another phase the fullest."""
    return "" if demand.role == RANK else demand.turn.partition(":")[0]


def _candidates(run: Run, demand: Demand) -> Iterator[tuple[str, Run]]:
    if demand.role in (RANK, SHARED):
        yield from _of_learner(run)
    if demand.role != RANK:
        yield from _of_engine(run)
    if demand.role == SHARED:
        yield from _of_sharing(run)


def _of_learner(run: Run) -> Iterator[tuple[str, Run]]:
    learner = run.recipe.learner
    weaker = STRATEGIES.index(learner.deepspeed) + 1 if learner.deepspeed in STRATEGIES else 0
    for name in STRATEGIES[weaker:]:
        yield f"learner.deepspeed: {name}", with_value(run, "learner", deepspeed=name)
    if not learner.gradient_checkpointing:
        yield "learner.gradient_checkpointing: true", with_value(run, "learner", gradient_checkpointing=True)
    least = _least_tokens(run)
    if least < learner.micro_batch_tokens:
        yield f"learner.micro_batch_tokens: {least}", with_value(run, "learner", micro_batch_tokens=least)
    if run.recipe.model.lora is None and run.shape.adapted:
        yield "model.lora: {}", with_value(run, "model", lora=LoraSection())
    if not run.shares:
        for ranks in (2 * learner.num_ranks, 8 * learner.num_ranks):
            yield f"learner.num_ranks: {ranks}", with_value(run, "learner", num_ranks=ranks)


def _least_tokens(run: Run) -> int:
    """Return the fewest tokens of a micro-batch that the recipe allows."""
    recipe = run.recipe
    if isinstance(recipe, Recipe) and recipe.auxiliary is None:
        return recipe.data.max_prompt_tokens + recipe.rollout.max_new_tokens
    return recipe.model.max_length


def _of_engine(run: Run) -> Iterator[tuple[str, Run]]:
    assert run.sampling is not None and run.worker is not None  # the demand is an engine's
    rollout = run.sampling.rollout
    if not run.shares:
        workers = 2 * rollout.tensor_parallel_size
        yield f"rollout.tensor_parallel_size: {workers}", with_value(run, "rollout", tensor_parallel_size=workers)
    for share in (0.3, 0.5, 0.7, 0.85, 0.9, 0.95):
        yield f"rollout.gpu_memory_utilization: {share}", with_value(run, "rollout", gpu_memory_utilization=share)
    shortest = run.worker.sequence
    if shortest < run.recipe.model.max_length:
        yield f"model.max_length: {shortest}", with_value(run, "model", max_length=shortest)
    if run.worker.staged:
        yield "weight_sync.staged: false", with_value(run, "weight_sync", staged=False)


def _of_sharing(run: Run) -> Iterator[tuple[str, Run]]:
    placement = run.sharing
    assert placement is not None  # the demand is of a shared GPU
    if not placement.sleep:
        yield "placement.sleep: true", with_value(run, "placement", sleep=True)
    if placement.sleep and not placement.offload_optimizer and run.job.strategy.stage == 3:
        yield "placement.offload_optimizer: true", with_value(run, "placement", offload_optimizer=True)
    yield "placement: split", with_value(run, "placement", mode="split", offload_optimizer=False)


def unmet(found: Sequence[Demand]) -> list[Demand]:
    return [demand for demand in found if not demand.fits]
