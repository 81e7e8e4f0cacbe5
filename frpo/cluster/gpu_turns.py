"""Whose turn it is where engines and learner share GPUs: who samples, learns, pushes and sleeps, and in which order.

    SAMPLING --learn--> LEARNING --push--> PUSHING --(pushed)--> SAMPLING
    LEARNING --sample-> a push of the same version, since the engines' weights are gone after a sleep

Nothing is pushed while engines sleep, nothing is sampled before a push is complete, and the cache of an engine wakes
only after its weights, when the learner's work has left the GPU.
"""
from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Protocol

from frpo.errors import EngineError


class Turn(Enum):
    SAMPLING = "sampling"
    LEARNING = "learning"
    PUSHING = "pushing"


class Engines(Protocol):
    """What engines do for it, all of them at once."""

    def sleep(self) -> None:
        """Give up weights and cache."""
        ...

    def wake(self, tag: str) -> None:
        """Take memory again for the "weights" (whose values are lost), or for the "kv_cache"."""
        ...


class Learner(Protocol):
    """What the learner does for it, on all ranks."""

    def make_room(self, offload: bool) -> None:
        """Give free memory to others. offload: move what can wait elsewhere, too."""
        ...

    def take_room(self, offload: bool) -> None:
        """Bring back what `make_room` moved."""
        ...


class NoTurns:
    """Engines and learner have memory of their own: anything goes at any time."""

    def sample(self) -> None:
        pass

    def learn(self) -> None:
        pass

    def push(self, send: Callable[[], object]) -> None:
        send()


class GpuTurns:
    """Begins with the learner at work and the engines asleep. Not for several threads: nobody samples ahead.

    offload: whether the learner moves what can wait to the CPU while engines sample.
    """

    def __init__(self, engines: Engines, learner: Learner, offload: bool = False):
        self.engines, self.learner, self.offload = engines, learner, offload
        self.turn = Turn.LEARNING
        self._again: Callable[[], object] | None = None

    def sample(self) -> None:
        """From here on engines may sample: the weights that were pushed last."""
        if self.turn is Turn.LEARNING:
            if self._again is None:
                raise EngineError("engines are to sample before any push: their weights were given up to the learner")
            self.push(self._again)
        elif self.turn is Turn.PUSHING:
            raise EngineError("engines are to sample while a push is under way or after it broke off; push again first")

    def learn(self) -> None:
        """From here on the learner may work, while engines sleep."""
        if self.turn is Turn.PUSHING:
            raise EngineError("the learner is to work while a push is under way or after it broke off; push again "
                              "first")
        if self.turn is Turn.SAMPLING:
            self.engines.sleep()
            self.learner.take_room(self.offload)
            self.turn = Turn.LEARNING

    def push(self, send: Callable[[], object]) -> None:
        """Send weights to engines that are awake, then let them sample. Where `send` raises it may be tried again."""
        if self.turn is Turn.LEARNING:
            self.learner.make_room(self.offload)
            self.engines.wake("weights")
            self.turn = Turn.PUSHING
        send()
        self._again = send
        if self.turn is Turn.PUSHING:
            self.engines.wake("kv_cache")
            self.turn = Turn.SAMPLING
