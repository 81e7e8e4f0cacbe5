"""Read batches from the traces of an earlier run, without engines and rewards, to debug the learner alone.

The learner gets the same data as in the earlier run. With the same recipe the learner repeats that run. With another
recipe the result shows the effect of the change on the same data.
"""
from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from frpo.errors import DataError
from frpo.run.traces import Traced, read_groups
from frpo.telemetry.progress import ProgressBar
from frpo.types import RunState, ScoredBatch, ScoredGroup


class ReplayBatches:
    """A batch source that samples nothing. Raises DataError where the traces end too early or do not fit the recipe."""

    def __init__(self, path: Path, prompts_per_step: int):
        self.path, self.size = path, prompts_per_step

    def start(self, state: RunState, checkpoint: Path | None) -> None:
        groups = groupby(read_groups(self.path), key=lambda traced: traced.step)
        self.steps: Iterator[tuple[int, Iterator[Traced]]] = groups

    def next(self, state: RunState, bar: ProgressBar) -> ScoredBatch:
        for step, groups in self.steps:
            if step == state.step:
                return self._batch(step, groups)
        raise DataError(f"{self.path} has no groups of step {state.step} (steps are counted from 0); lower "
                        "run.num_steps, or give the traces of a longer run")

    def save(self, checkpoint: Path) -> None:
        """Do nothing: a resume needs only the step, which is in the run's state."""

    def close(self) -> None:
        self.steps = iter(())

    def _batch(self, step: int, groups: Iterator[Traced]) -> ScoredBatch:
        parts: dict[bool, list[ScoredGroup]] = {True: [], False: []}
        for traced in groups:
            parts[traced.trained].append(traced.scored)
        if len(parts[True]) != self.size:
            raise DataError(f"{self.path}: step {step} has {len(parts[True])} groups, but rollout.prompts_per_step is "
                            f"{self.size}; set it to the value of the run that wrote the traces")
        return ScoredBatch(chosen=tuple(parts[True]), replaced=tuple(parts[False]), counts={},
                           positions=len(parts[True]) + len(parts[False]))
