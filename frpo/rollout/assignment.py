"""Assign groups to engines, and decide when each engine gets them.

An assignment depends on the number of groups, not on their content. The same assignment gives the same batches inside
an engine, so runs repeat to the bit. Balancing by load keeps engines busy instead, and runs no longer repeat to the
bit.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from frpo.rollout.engine import GroupRequest


class Assignment:
    """Shares that engines get at once, and a rest. For every group that an engine ends, it gets one of the rest."""

    def __init__(self, shares: dict[int, list[GroupRequest]], rest: Iterable[GroupRequest] = ()):
        self.shares, self.rest = {engine: share for engine, share in shares.items() if share}, deque(rest)

    def after_one(self, engine: int) -> list[GroupRequest]:
        """Return the next requests for an engine that has ended one group: one request, or [] if the rest is empty."""
        if not self.rest:
            return []
        request = self.rest.popleft()
        self.shares[engine].append(request)
        return [request]

    def again(self, engines: Sequence[int]) -> Assignment:
        """Assign all earlier requests of these engines again, at once. Use this for new engines that replace dead ones.
        """
        return Assignment({engine: self.shares[engine] for engine in engines if engine in self.shares}, self.rest)


def static(requests: Sequence[GroupRequest], num_engines: int) -> Assignment:
    """Assign group i to engine i mod N."""
    return Assignment({engine: list(requests[engine::num_engines]) for engine in range(num_engines)})


def by_load(requests: Sequence[GroupRequest], num_engines: int) -> Assignment:
    """Assign the first half of the groups as `static` does, and each other group to the engine that ends one first."""
    half = (len(requests) + 1) // 2
    return Assignment(static(requests[:half], num_engines).shares, requests[half:])


ASSIGNMENTS = {"static": static, "load": by_load}
