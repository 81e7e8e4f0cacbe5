"""Choose prompts by their difficulty so far: skip solved and hopeless prompts, but not for ever.

The choice is a pure function of the stream, the running values and the position, with no clock and no hidden
generator. So a run that restores the state continues with the same prompts. This module samples nothing and keeps no
cursor.
"""
from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from frpo.data.prompts import Choice, PromptStream
from frpo.types import Prompt, ScoredGroup

if TYPE_CHECKING:
    from frpo.config.sections import SelectionSection

FILE = "selection.json"

ROUNDING = 1e-9
"""Tolerance of `success`: weighted rewards that sum to a little less still count."""

REVISIT = 1
"""Third word of a decision's seed, which keeps it apart from the stream's own (seed, epoch)."""


def save_selection(checkpoint: Path, state: Mapping[str, Sequence[float]]) -> None:
    """Write the state that `read_selection` reads."""
    (checkpoint / FILE).write_text(json.dumps(state), encoding="utf-8")


def read_selection(checkpoint: Path | None) -> dict[str, list[float]]:
    """Read the state from a checkpoint. Return an empty state if there is no checkpoint or no such file in it."""
    file = checkpoint and checkpoint / FILE
    return json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}


class PromptSelector:
    """Selector that skips prompts whose running value is outside [low, high].

    The value of a group is the mean of its rewards, or the share of its rewards that reaches `success`. The running
    value of a prompt is the value of its first group, then momentum x old + (1 - momentum) x new. Prompts that were
    never scored are drawn.

    state: uid -> [running value, groups scored], as `state` returned it; uids that are not in the stream are kept.
    """

    def __init__(self, stream: PromptStream, section: SelectionSection,
                 state: Mapping[str, Sequence[float]] | None = None) -> None:
        self._stream, self._section = stream, section
        self._state = {uid: (float(value), int(visits)) for uid, (value, visits) in (state or {}).items()}

    @property
    def state(self) -> dict[str, list[float]]:
        """Return a copy in JSON's types. A selector made from this copy continues exactly."""
        return {uid: [value, visits] for uid, (value, visits) in self._state.items()}

    def record(self, groups: Iterable[ScoredGroup]) -> None:
        """Update the running values with groups in the given order. Completions without a reward (NaN) do not count."""
        for group in groups:
            rewards_G = group.rewards_G[~np.isnan(group.rewards_G)]
            if len(rewards_G):
                uid = group.group.prompt.uid
                old, visits = self._state.get(uid, (0.0, 0))
                weight = self._section.momentum if visits else 0.0
                self._state[uid] = (weight * old + (1 - weight) * self._value(rewards_G), visits + 1)

    def choose(self, cursor: int, count: int) -> Choice:
        """Choose the next `count` prompts from position `cursor` on.

        At most one epoch of positions is searched. Prompts that are still missing are then drawn from the next
        positions without a check, so that the search ends even if all prompts are out of bounds.
        """
        prompts: list[Prompt] = []
        revisited = forced = 0
        for position, prompt in enumerate(self._from(cursor), start=cursor):
            if len(prompts) == count:
                break
            inside = self._inside(prompt)
            drawn = not inside and self._revisits(position)
            late = not inside and not drawn and position - cursor >= len(self._stream.prompts)
            revisited, forced = revisited + drawn, forced + late
            if inside or drawn or late:
                prompts.append(prompt)
        return Choice(prompts=tuple(prompts), positions_used=position - cursor, revisited=revisited, forced=forced)

    def _from(self, position: int) -> Iterator[Prompt]:
        """Yield the stream from a position on. Read it in growing pieces: each `take` orders a whole epoch."""
        size = 64
        while True:
            yield from self._stream.take(position, size)
            position, size = position + size, 2 * size

    def _inside(self, prompt: Prompt) -> bool:
        value, visits = self._state.get(prompt.uid, (0.0, 0))
        return visits == 0 or self._section.low <= value <= self._section.high

    def _revisits(self, position: int) -> bool:
        generator = np.random.Generator(np.random.PCG64([self._stream.seed, position, REVISIT]))
        return bool(generator.random() < self._section.revisit)

    def _value(self, rewards: np.ndarray) -> float:
        success = self._section.success
        return float(np.mean(rewards if success is None else rewards >= success - ROUNDING))
