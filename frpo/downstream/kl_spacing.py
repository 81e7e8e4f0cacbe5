"""How far apart in KL two neighbouring probes of a fork may lie, and after which updates it is probed.

Between two probes that lie close, a reward is read off the straight line through them. Between two others nothing is
known, and nothing is told. Nothing is measured here.

Shape suffix: R probes of a fork that reached a KL first.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CLOSE = 0.75
"""Nats: the probe after one at k nats is close up to 2 k + CLOSE.

Reward is expected to fall with the square root of the KL (Pinsker's inequality has that form). On such a curve the line
from 0 to 0.75 nats is wrong by 18 % of the loss at 0.5 nats, and the line from k to 2 k nats by 1.5 % of it at most.
"""

EVENLY = 8
"""Times that a fork is probed at equal distances, the last update besides, where nobody says when."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Two neighbouring probes that lie too far apart: their updates, and their KLs in nats."""

    updates: tuple[int, int]
    kl: tuple[float, float]


def far_apart(kl_R: np.ndarray) -> np.ndarray:
    """(R - 1) whether the next probe is not close; kl_R: nats, rising."""
    return kl_R[1:] > 2 * kl_R[:-1] + CLOSE


class ProbeSchedule:
    """The updates of one fork after which it is probed; the first and the last always are."""

    def __init__(self, at: Sequence[int] | None, until: float, earlier: Callable[[], Mapping[int, float]]):
        """at: the updates. None: EVENLY times at equal distances, where forks can be compared, and between them as the
        KL grows, up to `until` nats.

        earlier: reads the KL (nats) of all probes before a resume, by update.
        """
        self.at, self.until, self.earlier = at, until, earlier
        self.probed: dict[int, float] | None = None

    def due(self, step: int, total: int) -> bool:
        """Whether the fork is probed after this update. A resumed run decides as if it had never stopped."""
        if step in (0, total):
            return True
        if self.at is not None:
            return step in self.at
        return step % -(-total // EVENLY) == 0 or step >= next_update(self._before(step), self.until)

    def note(self, step: int, kl: float) -> None:
        """Remember the KL that the probe after this update found."""
        self.probed = {**(self._before(step) if step > 0 else {}), step: kl}

    def _before(self, step: int) -> dict[int, float]:
        """Update -> KL of the probes so far; of a resumed run those that it made before it stopped."""
        if self.probed is None:
            self.probed = {update: kl for update, kl in self.earlier().items() if update < step}
        return self.probed


def next_update(probed: Mapping[int, float], until: float) -> float:
    """The update after which the next probe is due, so that it lies close to the last one; infinity from `until` nats.

    probed: update -> KL in nats of all probes so far, in order. It is aimed at half of how far a close probe may lie.
    The KL is expected to grow with the square of the updates, as at first it does, or exponentially as between the last
    two probes if that is faster. The probe is never later than at twice the updates of the last one.
    """
    (step, kl), reached = list(probed.items())[-1], max((each for each in probed.values() if each > 0), default=0.0)
    if reached >= until:
        return math.inf
    if not kl > 0:
        return max(1, 2 * step)
    growth = (reached + (reached + CLOSE) / 2) / kl
    update = step * min(2.0, math.sqrt(growth))
    before, kl_before = list(probed.items())[-2] if len(probed) > 1 else (0, 0.0)
    if 0 < kl_before < kl:
        update = min(update, step + (step - before) * math.log(growth) / math.log(kl / kl_before))
    return max(step + 1, int(update))


def updates_within(gap: Gap) -> list[int]:
    """Updates at which probes would probably fill the gap: as many as it needs, in geometric sequence; none are left
    between two consecutive updates.
    """
    (first, last), (kl, high) = gap.updates, gap.kl
    pieces = 1
    while 2 * kl + CLOSE < high:
        kl, pieces = 2 * kl + CLOSE, pieces + 1
    between = {round(each) for each in np.geomspace(max(first, 1), last, pieces + 1)}
    return sorted(between - {first, last})
