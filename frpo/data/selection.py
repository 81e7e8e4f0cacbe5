"""Prompts chosen by how hard they have been so far: the solved and the hopeless are passed over, but never for ever.

A pure function of the stream, the running values and the position: no clock and no hidden generator, so that a resume
which restores the state goes on with the same prompts. Samples nothing and keeps no cursor.
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
"""Weighted rewards that add up to a little less than `success` still count."""

REVISIT = 1
"""Third word of a decision's seed, which keeps it apart from the stream's own (seed, epoch)."""


def save_selection(checkpoint: Path, state: Mapping[str, Sequence[float]]) -> None:
    """Write what `read_selection` reads."""
    (checkpoint / FILE).write_text(json.dumps(state), encoding="utf-8")


def read_selection(checkpoint: Path | None) -> dict[str, list[float]]:
    """The state that a checkpoint keeps; empty without one."""
    file = checkpoint and checkpoint / FILE
    return json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}


class PromptSelector:
    """Passes over prompts whose running value is outside [low, high].

    The value of a group is the mean of its rewards, or the share of them that reaches `success`; the running value of a
    prompt is its first group's, then momentum x old + (1 - momentum) x new. Prompts that were never scored are drawn.

    state: uid -> [running value, groups scored], as `state` gave it; uids that the stream has not are kept.
    """

    def __init__(self, stream: PromptStream, section: SelectionSection,
                 state: Mapping[str, Sequence[float]] | None = None) -> None:
        self._stream, self._section = stream, section
        self._state = {uid: (float(value), int(visits)) for uid, (value, visits) in (state or {}).items()}

    @property
    def state(self) -> dict[str, list[float]]:
        """A copy in JSON's types, from which another selector goes on exactly."""
        return {uid: [value, visits] for uid, (value, visits) in self._state.items()}

    def record(self, groups: Iterable[ScoredGroup]) -> None:
        """Count groups in, in the order given. Completions without a reward (NaN) say nothing about their prompt."""
        for group in groups:
            rewards_G = group.rewards_G[~np.isnan(group.rewards_G)]
            if len(rewards_G):
                uid = group.group.prompt.uid
                old, visits = self._state.get(uid, (0.0, 0))
                weight = self._section.momentum if visits else 0.0
                self._state[uid] = (weight * old + (1 - weight) * self._value(rewards_G), visits + 1)

    def choose(self, cursor: int, count: int) -> Choice:
        """The next `count` prompts from position `cursor` on.

        Looks at one epoch of positions at most; what is missing then is drawn from the next ones as they come, so that
        it ends also where all prompts are out of bounds.
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
        """The stream from a position on. In growing pieces, because `take` orders a whole epoch each time."""
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
