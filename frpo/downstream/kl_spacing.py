"""Decide how far apart in KL two neighbouring probes of a fork may lie, and after which updates the fork is probed.

Between two close probes, a reward is read off the straight line through them. Between two probes that are not close,
the reward is unknown and left blank. This module measures nothing.

Shape suffix: R probes of a fork that reached a KL first.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CLOSE = 0.75
"""Nats: the next probe after a probe at k nats is close if its KL is at most 2 k + CLOSE.

Reward is expected to fall with the square root of the KL (Pinsker's inequality has that form). On such a curve, the
line from 0 to 0.75 nats is wrong by 18 % of the loss at 0.5 nats. The line from k to 2 k nats is wrong by 1.5 % of the
loss at most.
"""

EVENLY = 8
"""Number of probes of a fork at equal distances if `at` is not given. The last update is always probed."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Gap between two neighbouring probes that lie too far apart: their updates, and their KLs in nats."""

    updates: tuple[int, int]
    kl: tuple[float, float]


def far_apart(kl_R: np.ndarray) -> np.ndarray:
    """Return (R - 1) flags: True if the next probe is not close. kl_R: nats, rising."""
    return kl_R[1:] > 2 * kl_R[:-1] + CLOSE


class ProbeSchedule:
    """Schedule of the updates after which one fork is probed. The start and the last update are always probed."""

    def __init__(self, at: Sequence[int] | None, until: float, earlier: Callable[[], Mapping[int, float]]):
        """Set the schedule. at: the updates. None: probe EVENLY times at equal distances, where forks can be compared.
        Between these updates, probe as the KL grows, up to `until` nats.

        earlier: reads the KL (nats) of all probes before a resume, by update.
        """
        self.at, self.until, self.earlier = at, until, earlier
        self.probed: dict[int, float] | None = None

    def due(self, step: int, total: int) -> bool:
        """Return whether to probe the fork after this update. A resumed run decides as if it had never stopped."""
        if step in (0, total):
            return True
        if self.at is not None:
            return step in self.at
        return step % -(-total // EVENLY) == 0 or step >= next_update(self._before(step), self.until)

    def note(self, step: int, kl: float) -> None:
        """Store the KL that the probe after this update found."""
        self.probed = {**(self._before(step) if step > 0 else {}), step: kl}

    def _before(self, step: int) -> dict[int, float]:
        """Return update -> KL of the probes so far. A resumed run reads the probes that it made before it stopped."""
        if self.probed is None:
            self.probed = {update: kl for update, kl in self.earlier().items() if update < step}
        return self.probed


def next_update(probed: Mapping[int, float], until: float) -> float:
    """Return the update after which the next probe is due, close to the last probe; infinity from `until` nats on.

    probed: update -> KL in nats of all probes so far, in order. The aim is half the largest distance of a close probe.
    The KL is expected to grow with the square of the updates, as in the beginning of a training. If exponential growth
    at the rate between the last two probes is faster, that growth is expected instead. The next probe is due at twice
    the updates of the last probe at the latest.
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
    """Return updates at which probes would probably fill the gap: as many as needed, in a geometric sequence. Between
    two consecutive updates there are none.
    """
    (first, last), (kl, high) = gap.updates, gap.kl
    pieces = 1
    while 2 * kl + CLOSE < high:
        kl, pieces = 2 * kl + CLOSE, pieces + 1
    between = {round(each) for each in np.geomspace(max(first, 1), last, pieces + 1)}
    return sorted(between - {first, last})
