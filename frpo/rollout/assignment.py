"""Which engine is asked for which groups, and when.

It counts groups and knows nothing of their content. The same assignment gives the same batches inside an engine, which
is what makes runs repeat to the bit; balancing by load gives that up for engines that are never idle.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from frpo.rollout.engine import GroupRequest


class Assignment:
    """Shares that engines are asked for at once, and a rest of which an engine gets one for every one that it ends."""

    def __init__(self, shares: dict[int, list[GroupRequest]], rest: Iterable[GroupRequest] = ()):
        self.shares, self.rest = {engine: share for engine, share in shares.items() if share}, deque(rest)

    def after_one(self, engine: int) -> list[GroupRequest]:
        """What else to ask of an engine that has ended one group."""
        if not self.rest:
            return []
        request = self.rest.popleft()
        self.shares[engine].append(request)
        return [request]

    def again(self, engines: Sequence[int]) -> Assignment:
        """All that these engines were ever asked for, at once: for new engines in the place of dead ones."""
        return Assignment({engine: self.shares[engine] for engine in engines if engine in self.shares}, self.rest)


def static(requests: Sequence[GroupRequest], num_engines: int) -> Assignment:
    """Group i to engine i mod N."""
    return Assignment({engine: list(requests[engine::num_engines]) for engine in range(num_engines)})


def by_load(requests: Sequence[GroupRequest], num_engines: int) -> Assignment:
    """Half of the groups as `static` has them, the others to whoever ends one."""
    half = (len(requests) + 1) // 2
    return Assignment(static(requests[:half], num_engines).shares, requests[half:])


ASSIGNMENTS = {"static": static, "load": by_load}
