"""One vLLM engine for several callers: they take turns between its steps, and each gets the outputs of its requests.

Whoever waits for an output steps the engine for everybody. Weights change between two steps, so that requests which are
under way go on with the new ones: pause, push, resume, with no request lost. It does not know what is asked or why.
"""
from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from frpo.errors import EngineError


class SharedEngine:
    """Callers of one `LLMEngine`, each in a thread of its own.

    limit_s: how long a turn is waited for. Whoever holds the engine may have died, and it would never be released.
    guard: a context in which every turn is taken.
    """

    def __init__(self, engine: Any, limit_s: float, guard: Callable[[], AbstractContextManager] = nullcontext):
        self.engine, self.limit_s, self.guard = engine, limit_s, guard
        self.options: dict[str, Any] = {}
        """Of `LLMEngine.add_request`, for every request from now on."""
        self._callers: dict[str, Caller] = {}
        self._numbers = itertools.count()
        self._gate, self._turn = threading.Lock(), threading.Lock()
        self._held = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Between two steps of the engine. Whoever waits comes before the next step of whoever is stepping.

        Raises EngineError if the turn does not come within the limit.
        """
        self._take()
        try:
            with self.guard():
                yield
        finally:
            self._turn.release()

    @contextmanager
    def turn_of_update(self) -> Iterator[None]:
        """A turn for one call of an update, which has it already if the update holds the engine."""
        if self._held:
            with self.guard():
                yield
        else:
            with self.turn():
                yield

    def hold(self) -> None:
        """Keep the engine from stepping until `release`, from whatever thread that comes."""
        self._take()
        self._held = True

    def release(self) -> None:
        self._held = False
        self._turn.release()

    @contextmanager
    def caller(self) -> Iterator[Caller]:
        """A caller, whose unfinished requests are aborted when the context ends."""
        caller = Caller(self, str(next(self._numbers)))
        with self.turn():
            self._callers[caller.name] = caller
        try:
            yield caller
        finally:
            with self.turn():
                del self._callers[caller.name]
                if caller.unfinished:
                    self.engine.abort_request([f"{caller.name}/{key}" for key in caller.unfinished], internal=False)

    def step(self) -> None:
        """One step, within a turn; finished outputs go to whoever asked."""
        for output in self.engine.step():
            name, _, key = output.request_id.partition("/")
            if output.finished and name in self._callers:
                self._callers[name].arrived.append((key, output))

    def _take(self) -> None:
        # The gate is held while waiting, so that a thread which steps again and again cannot overtake.
        if not self._gate.acquire(timeout=self.limit_s):
            raise self._late()
        try:
            if not self._turn.acquire(timeout=self.limit_s):
                raise self._late()
        finally:
            self._gate.release()

    def _late(self) -> EngineError:
        return EngineError(f"the engine was not to be had within {self.limit_s:g} s (weight_sync.timeout_s): an update "
                           "of its weights was begun and not finished, or a step takes longer")


class Caller:
    """One caller's requests, by keys of its own."""

    def __init__(self, shared: SharedEngine, name: str):
        self.shared, self.name = shared, name
        self.unfinished: dict[str, None] = {}
        self.arrived: list[tuple[str, Any]] = []

    def add(self, make: Callable[[], dict[str, tuple[Any, Any]]]) -> None:
        """Requests by key, (vLLM prompt, SamplingParams), made within the turn: the weights are still those at `make`.

        They are scheduled in this order, with nobody's between.
        """
        with self.shared.turn():
            for key, (prompt, params) in make().items():
                self.shared.engine.add_request(f"{self.name}/{key}", prompt, params, **self.shared.options)
                self.unfinished[key] = None

    def outputs(self) -> list[tuple[str, Any]]:
        """What has finished since the last call, as (key, vLLM output), after a step if nothing has."""
        with self.shared.turn():
            if not self.arrived:
                self.shared.step()
            arrived, self.arrived = self.arrived, []
        for key, _ in arrived:
            del self.unfinished[key]
        return arrived
