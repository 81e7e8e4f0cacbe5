"""Sources of the learner's batches: sampled on request, sampled ahead while the learner works, or read from traces."""
from __future__ import annotations

from pathlib import Path
from typing import Protocol

from frpo.data.selection import save_selection
from frpo.loops.ahead import AsyncBatches
from frpo.loops.collect import collect
from frpo.loops.replay import ReplayBatches
from frpo.run.build import RunParts, SamplingParts
from frpo.telemetry.progress import ProgressBar
from frpo.types import RunState, ScoredBatch


class BatchSource(Protocol):
    """A source of one batch per step. A source that samples ahead also saves its waiting batches in a checkpoint."""

    def start(self, state: RunState, checkpoint: Path | None) -> None:
        """Start at `state`. checkpoint: the folder that `save` wrote to, if the run resumes from a checkpoint."""
        ...

    def next(self, state: RunState, bar: ProgressBar) -> ScoredBatch:
        """Return the batch of step `state.step`. The engines serve the policy of that step."""
        ...

    def save(self, checkpoint: Path) -> None: ...

    def close(self) -> None: ...


def batch_source(parts: RunParts) -> BatchSource:
    """Return the batch source that the recipe asks for."""
    section = parts.recipe.rollout
    if section.replay is not None:
        return ReplayBatches(Path(section.replay), section.prompts_per_step)
    return AsyncBatches(parts.sampling, parts.engines) if section.max_staleness > 0 else SyncBatches(parts.sampling)


class SyncBatches:
    """Batches sampled by the policy that learns from them, while the learner waits."""

    def __init__(self, sampling: SamplingParts):
        self.sampling = sampling

    def start(self, state: RunState, checkpoint: Path | None) -> None:
        """Do nothing: a batch is sampled only when `next` is called."""

    def next(self, state: RunState, bar: ProgressBar) -> ScoredBatch:
        return collect(self.sampling, state, bar)

    def save(self, checkpoint: Path) -> None:
        save_selection(checkpoint, self.sampling.stream.state)

    def close(self) -> None:
        """Do nothing: no sampling is under way between two calls of `next`."""
