"""Serve one reward function in a worker process: load the function and answer calls until the run sends None.

`worker.RewardWorker` starts this module in a fresh interpreter. The module uses no reward specification, weight or
time-out, and does not import torch. Messages from the run: a call's arguments by name, or None to stop. Answers:
`Loaded`, `Returned`, `Raised`.
"""
from __future__ import annotations

import faulthandler
import inspect
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from frpo.errors import RewardError
from frpo.loading import Parameters, load_function, parameters_of
from frpo.rewards.values import Foreign, PortableValue, portable


@dataclass(frozen=True)
class TokenLists:
    """N lists of token ids as they are sent to the worker: one int32 array, and the end of each list in this array.

    Sending millions of ints one by one takes several times as long.
    """

    flat: np.ndarray
    ends_N: np.ndarray

    def lists(self) -> list[list[int]]:
        flat = self.flat
        if flat.size and flat.max() < flat.size:  # one int object for each id of the vocabulary, not for each token
            flat = np.arange(flat.max() + 1).astype(object).take(flat)
        return [flat[start:end].tolist() for start, end in pairwise([0, *self.ends_N.tolist()])]


def packed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Pack a call's arguments for sending. N arrays of token ids arrive at the function as N lists of ints."""
    ids = arguments.get("completion_ids")
    if ids is None:
        return dict(arguments)
    flat = np.concatenate([np.empty(0, dtype=np.int32), *ids], dtype=np.int32, casting="same_kind")
    return {**arguments, "completion_ids": TokenLists(flat, np.cumsum([len(row) for row in ids], dtype=np.int64))}


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Answer after loading: the arguments that the function takes."""

    parameters: Parameters


@dataclass(frozen=True, kw_only=True)
class Returned:
    """Answer with a call's return value."""

    result: list[PortableValue] | Foreign


@dataclass(frozen=True, kw_only=True)
class Raised:
    """Answer if loading or a call failed. text: type, message and the user's part of the traceback."""

    text: str


def serve(descriptor: int, function: str) -> None:
    """Load `function`, then answer calls on the connection with this file descriptor until the run sends None."""
    faulthandler.enable()  # a crash in native code leaves its stack on stderr
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    calls: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, calls), daemon=True).start()
    try:
        loaded = load_function(function)
    except RewardError as error:
        connection.send(Raised(text=str(error)))
        return
    connection.send(Loaded(parameters=parameters_of(loaded)))
    # The function runs on the main thread: signal-based limits (math-verify's) work nowhere else.
    while (answer := answer_to(loaded, calls.get())) is not None:
        connection.send(answer)


def _receive(connection: Connection, calls: queue.SimpleQueue[bytes]) -> None:
    """Pass calls on. Read all the time, so that the end of the run is noticed even while the function is busy."""
    while True:
        try:
            calls.put(connection.recv_bytes())
        except (EOFError, OSError):
            os.killpg(0, signal.SIGKILL)  # the run is gone: leave no process behind, nor one that the function started


@cache
def _loop() -> Any:
    """Return one event loop for all calls: a client kept between calls belongs to the loop in which it was made."""
    import asyncio  # takes a quarter of the worker's start-up time, and few functions need it

    return asyncio.new_event_loop()


def _apart(values: Any) -> Any:
    """Copy repeated objects among the N values of an argument, so that a function may change one value alone."""
    seen: set[int] = set()
    if not isinstance(values, list):
        return values
    apart = []
    for value in values:
        again = isinstance(value, list | dict) and id(value) in seen
        seen.add(id(value))
        apart.append(pickle.loads(pickle.dumps(value)) if again else value)
    return apart


def answer_to(function: Callable[..., Any], message: bytes) -> Returned | Raised | None:
    """Call the function with the pickled arguments of `packed`. Returns None if there are none: the run is over."""
    try:
        arguments = pickle.loads(message)  # here, so that a value whose class cannot be imported is reported too
        if arguments is None:
            return None
        if "completion_ids" in arguments:
            arguments["completion_ids"] = arguments["completion_ids"].lists()
        result = function(**{name: _apart(values) for name, values in arguments.items()})
        if inspect.iscoroutine(result):
            result = _loop().run_until_complete(result)
        return Returned(result=portable(result))
    except (Exception, SystemExit) as error:  # the user's code: whatever it raises is reported by name
        # The first frame is this function's own.
        own = error.__traceback__
        frames = traceback.format_exception(type(error), error, own.tb_next if own else None)
        return Raised(text=f"{type(error).__name__}: {error}\n{''.join(frames).rstrip()}")
