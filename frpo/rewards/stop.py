"""Request, once and from any thread, that running calls end.

This module does not import workers or calls. Code that runs a call registers an action that ends the call.
"""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stop:
    """Request to stop, set once.

    An action is called if the stop is set before the action's removal. If the stop is already set, registration calls
    the action at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._actions: list[Callable[[], None]] = []
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        """Call all registered actions. Actions that register later are called at once."""
        with self._lock:
            self._set = True
            for action in self._actions:
                action()

    @contextmanager
    def calls(self, action: Callable[[], None]) -> Iterator[None]:
        """Register `action` while the context lasts: the thread that sets the stop calls it.

        If the stop is already set, the action is called at once. The action must be quick and must not use this stop,
        whose lock is held.
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
