"""Batches read from the traces of an earlier run, in place of engines and rewards: a learner alone, for debugging it.

The learner sees what it saw then. With the recipe of that run it does the same again; with another it shows what the
change does to one and the same data.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from frpo.builder import Parts
from frpo.errors import DataError
from frpo.telemetry import ProgressBar
from frpo.traces import read_traces, scored_group
from frpo.types import RunState, ScoredBatch


class Replayed:
    """A batch source that samples nothing. Raises DataError where the traces end too early or do not fit the recipe."""

    def __init__(self, parts: Parts, path: Path):
        self.path, self.size = path, parts.recipe.rollout.prompts_per_step

    def start(self, state: RunState, checkpoint: Path | None) -> None:
        self.steps = groupby(read_traces(self.path), key=_step)

    def next(self, state: RunState, bar: ProgressBar) -> ScoredBatch:
        for step, rows in self.steps:
            if step == state.step:
                return self._batch(step, rows)
        raise DataError(f"{self.path} has no groups of step {state.step}; lower run.num_steps (counted from 0), or "
                        "give the traces of a longer run")

    def save(self, checkpoint: Path) -> None:
        """The step in the run's state is all there is."""

    def close(self) -> None:
        self.steps = iter(())

    def _batch(self, step: int, rows: Iterator[tuple[int, Mapping[str, Any]]]) -> ScoredBatch:
        groups: dict[bool, list] = {True: [], False: []}
        for number, row in rows:
            try:
                groups[row["trained"]].append(scored_group(row))
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{self.path}:{number}: no trace of a rollout group: {error!r}") from None
        if len(groups[True]) != self.size:
            raise DataError(f"{self.path}: step {step} learned from {len(groups[True])} groups, "
                            f"rollout.prompts_per_step is {self.size}; set it to what that run had")
        return ScoredBatch(chosen=tuple(groups[True]), replaced=tuple(groups[False]), counts={},
                           positions=len(groups[True]) + len(groups[False]))


def _step(numbered: tuple[int, Mapping[str, Any]]) -> int:
    return numbered[1]["group_id"][0]
