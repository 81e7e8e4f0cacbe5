"""Share one vLLM engine between several callers: they take turns between engine steps, and get only their own outputs.

A caller that waits for an output steps the engine for all callers. Weights change between two steps, and unfinished
requests continue with the new weights: pause, push, resume, with no request lost. This module does not interpret
requests.
"""
from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from frpo.errors import EngineError


class SharedEngine:
    """One `LLMEngine` and its callers, each in its own thread.

    limit_s: seconds to wait for a turn; the holder of the engine may have died and would never release it.
    guard: context that surrounds every turn.
    """

    def __init__(self, engine: Any, limit_s: float, guard: Callable[[], AbstractContextManager] = nullcontext):
        self.engine, self.limit_s, self.guard = engine, limit_s, guard
        self.options: dict[str, Any] = {}
        """Options of `LLMEngine.add_request` for every request from now on."""
        self._callers: dict[str, Caller] = {}
        self._numbers = itertools.count()
        self._gate, self._turn = threading.Lock(), threading.Lock()
        self._held = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Take a turn between two steps of the engine. A waiting thread comes before a stepping thread's next step.

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
        """Take a turn for one call of an update. If the update holds the engine, the call needs no new turn."""
        if self._held:
            with self.guard():
                yield
        else:
            with self.turn():
                yield

    def hold(self) -> None:
        """Keep the engine from stepping until `release`, which any thread may call."""
        self._take()
        self._held = True

    def release(self) -> None:
        self._held = False
        self._turn.release()

    @contextmanager
    def caller(self) -> Iterator[Caller]:
        """Provide a caller. Its unfinished requests are aborted when the context ends."""
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
        """Run one step, within a turn. Pass finished outputs to the callers that asked for them."""
        for output in self.engine.step():
            name, _, key = output.request_id.partition("/")
            if output.finished and name in self._callers:
                self._callers[name].arrived.append((key, output))

    def _take(self) -> None:
        # Hold the gate while waiting, so that a thread that steps again and again cannot overtake.
        if not self._gate.acquire(timeout=self.limit_s):
            raise self._late()
        try:
            if not self._turn.acquire(timeout=self.limit_s):
                raise self._late()
        finally:
            self._gate.release()

    def _late(self) -> EngineError:
        return EngineError(f"the engine was not free within {self.limit_s:g} s (weight_sync.timeout_s). A weight "
                           "update began but did not finish, or a step takes longer; for a long step, raise "
                           "weight_sync.timeout_s")


class Caller:
    """The requests of one caller, by keys that the caller chooses."""

    def __init__(self, shared: SharedEngine, name: str):
        self.shared, self.name = shared, name
        self.unfinished: dict[str, None] = {}
        self.arrived: list[tuple[str, Any]] = []

    def add(self, make: Callable[[], dict[str, tuple[Any, Any]]]) -> None:
        """Add the requests of `make`: key -> (vLLM prompt, SamplingParams).

        `make` runs in the same turn, so the weights cannot change between `make` and the adding. Requests are scheduled
        in this order, with no other caller's requests between them.
        """
        with self.shared.turn():
            for key, (prompt, params) in make().items():
                self.shared.engine.add_request(f"{self.name}/{key}", prompt, params, **self.shared.options)
                self.unfinished[key] = None

    def outputs(self) -> list[tuple[str, Any]]:
        """Return (key, vLLM output) of requests that finished since the last call. If there are none, run a step first.
        """
        with self.shared.turn():
            if not self.arrived:
                self.shared.step()
            arrived, self.arrived = self.arrived, []
        for key, _ in arrived:
            del self.unfinished[key]
        return arrived
