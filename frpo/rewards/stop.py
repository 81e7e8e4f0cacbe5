"""A request that calls under way should end, made once and from any thread.

Knows neither workers nor calls: whoever can end something registers how while it lasts.
"""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stop:
    """Set once. Between an action's registration and its removal none is missed: before, it is called on arrival."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._actions: list[Callable[[], None]] = []
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        """Call all registered actions, and at once those that register later."""
        with self._lock:
            self._set = True
            for action in self._actions:
                action()

    @contextmanager
    def calls(self, action: Callable[[], None]) -> Iterator[None]:
        """Have `action` called, from the thread that sets the stop, as long as the context lasts and not after it.

        It must be quick and may not use this stop, whose lock is held.
        """
        with self._lock:
            self._actions.append(action)
            if self._set:
                action()
        try:
            yield
        finally:
            with self._lock:
                self._actions.remove(action)
