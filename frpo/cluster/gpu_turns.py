"""Order the turns of engines and learner on shared GPUs: sampling, learning, pushing and sleeping.

    SAMPLING --learn--> LEARNING --push--> PUSHING --(pushed)--> SAMPLING
    LEARNING --sample-> a push of the same version, because sleeping engines lose their weights

No weights are pushed while engines sleep. No completion is sampled before a push is complete. An engine's KV cache
wakes after its weights, once the learner has freed its memory on the GPU.
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
    """The calls that `GpuTurns` makes on all engines at once."""

    def sleep(self) -> None:
        """Free the memory of weights and KV cache."""
        ...

    def wake(self, tag: str) -> None:
        """Allocate memory again for the "weights", whose values are lost, or for the "kv_cache"."""
        ...


class Learner(Protocol):
    """The calls that `GpuTurns` makes on all learner ranks."""

    def make_room(self, offload: bool) -> None:
        """Release free memory to other processes. offload: also move data that is not needed now to the CPU."""
        ...

    def take_room(self, offload: bool) -> None:
        """Bring back the data that `make_room` moved."""
        ...


class NoTurns:
    """Turns that allow every call at any time, because engines and learner do not share memory."""

    def sample(self) -> None:
        pass

    def learn(self) -> None:
        pass

    def push(self, send: Callable[[], object]) -> None:
        send()


class GpuTurns:
    """The turns of engines and learner on shared GPUs. At first the learner works and the engines sleep.

    Use it from one thread only; sampling ahead of the learner is not supported.
    offload: whether the learner moves data that is not needed to the CPU while engines sample.
    """

    def __init__(self, engines: Engines, learner: Learner, offload: bool = False):
        self.engines, self.learner, self.offload = engines, learner, offload
        self.turn = Turn.LEARNING
        self._again: Callable[[], object] | None = None

    def sample(self) -> None:
        """Let engines sample from now on, with the weights that were pushed last."""
        if self.turn is Turn.LEARNING:
            if self._again is None:
                raise EngineError("engines cannot sample before the first push: they hold no weights; push first")
            self.push(self._again)
        elif self.turn is Turn.PUSHING:
            raise EngineError("engines cannot sample while a push is under way or after it broke off; push again first")

    def learn(self) -> None:
        """Let the learner work from now on, while engines sleep."""
        if self.turn is Turn.PUSHING:
            raise EngineError("the learner cannot work while a push is under way or after it broke off; push again "
                              "first")
        if self.turn is Turn.SAMPLING:
            self.engines.sleep()
            self.learner.take_room(self.offload)
            self.turn = Turn.LEARNING

    def push(self, send: Callable[[], object]) -> None:
        """Wake the engines, send the weights, then let the engines sample. If `send` raises, the push may be repeated.
        """
        if self.turn is Turn.LEARNING:
            self.learner.make_room(self.offload)
            self.engines.wake("weights")
            self.turn = Turn.PUSHING
        send()
        self._again = send
        if self.turn is Turn.PUSHING:
            self.engines.wake("kv_cache")
            self.turn = Turn.SAMPLING
