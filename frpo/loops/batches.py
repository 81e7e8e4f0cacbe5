"""Where the learner's batches come from: drawn when asked for, sampled ahead while it works, or read from traces."""
from __future__ import annotations

from pathlib import Path
from typing import Protocol

from frpo.data.selection import save_selection
from frpo.loops.ahead import AsyncBatches
from frpo.loops.collect import collect
from frpo.loops.replay import ReplayBatches
from frpo.run.build import RunParts
from frpo.telemetry.progress import ProgressBar
from frpo.types import RunState, ScoredBatch


class BatchSource(Protocol):
    """One batch a step. A source that runs on by itself has its own share in a checkpoint."""

    def start(self, state: RunState, checkpoint: Path | None) -> None:
        """The run begins at `state`; checkpoint: the folder that `save` once wrote to, if it goes on from one."""
        ...

    def next(self, state: RunState, bar: ProgressBar) -> ScoredBatch:
        """The batch of step `state.step`, whose policy the engines serve."""
        ...

    def save(self, checkpoint: Path) -> None: ...

    def close(self) -> None: ...


def batch_source(parts: RunParts) -> BatchSource:
    """The one that the recipe asks for."""
    if parts.recipe.rollout.replay is not None:
        return ReplayBatches(parts, Path(parts.recipe.rollout.replay))
    return AsyncBatches(parts) if parts.recipe.rollout.max_staleness > 0 else SyncBatches(parts)


class SyncBatches:
    """Batches sampled by the policy that learns from them, while the learner waits."""

    def __init__(self, parts: RunParts):
        self.parts = parts

    def start(self, state: RunState, checkpoint: Path | None) -> None:
        """Nothing is sampled before it is asked for."""

    def next(self, state: RunState, bar: ProgressBar) -> ScoredBatch:
        return collect(self.parts, state, bar)

    def save(self, checkpoint: Path) -> None:
        save_selection(checkpoint, self.parts.stream.state)

    def close(self) -> None:
        """Nothing runs on."""
