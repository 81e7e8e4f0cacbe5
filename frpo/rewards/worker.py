"""Run a reward function in a process: start it when needed, call it with a time limit, kill it beyond the limit.

A `RewardWorker` is a fresh interpreter that imports `frpo.rewards` and the function's module, nothing else.
`multiprocessing` does not start it: its spawn would run the parent's `__main__` again (a second import of torch, or of
a script without a guard). Also, its daemons may not start processes of their own, as a reward that runs code must.
A call is never retried. For prompts, weights and sums see `suite`.
"""
from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe
from typing import Any

from frpo.errors import RewardError
from frpo.loading import Parameters, path_without_siblings
from frpo.rewards.serving import Loaded, Raised, Returned, packed
from frpo.rewards.stop import Stop
from frpo.rewards.values import Foreign, PortableValue

logger = logging.getLogger(__name__)

STARTUP_TIMEOUT_S = 120.0
"""Least time limit for importing a function's module: the import happens once, and may take longer than a call."""

STOP_TIMEOUT_S = 2.0
"""Most seconds for a worker to run its exit handlers before it is killed."""

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[3]); " \
        "from frpo.rewards.serving import serve; serve(int(sys.argv[1]), sys.argv[2])"


class RewardCallError(RewardError):
    """A call raised, or its worker died. A reward with `on_error: abstain` turns this error into abstentions."""


class RewardTimeoutError(RewardCallError):
    """A call exceeded its limit; its worker was killed."""


class Worker(ABC):
    """One holder of a reward function: a process of its own (`RewardWorker`), or a remote one.

    The function keeps its module's state between calls. After a time-out or the death of the process, the next call
    starts a new process. Calls from several threads take turns. A closed worker may be started again.
    """

    def __init__(
        self, *, name: str, function: str, timeout_s: float, startup_timeout_s: float = STARTUP_TIMEOUT_S,
    ) -> None:
        self.label = f"reward {name!r} ({function})"
        self._function = function
        self._timeout_s = timeout_s
        self._startup_timeout_s = max(startup_timeout_s, timeout_s)
        self._folder = os.getcwd()  # relative paths mean the same at a restart, wherever the run has gone since
        self._turn = threading.RLock()
        self._parameters: Parameters | None = None

    def start(self, stop: Stop | None = None) -> Parameters:
        """Start the process and load the function, unless this is done. Returns the arguments of the function.

        Raises RewardError if the function cannot be loaded, its module does not load in time or `stop` is set.
        """
        with self._turn:
            ending = self._gone()
            if ending is not None:
                logger.warning("%s: its worker %s between calls; starting another", self.label, ending)
                self._discard()
            if self._parameters is None:
                self._spawn()
                self._parameters = self._load(stop or Stop())
            return self._parameters

    def call(self, arguments: Mapping[str, Any], stop: Stop | None = None) -> list[PortableValue] | Foreign:
        """Call the function with `arguments` by name, and start the worker if needed. Returns the function's result.

        Raises RewardCallError with the function's own exception, its message and traceback; or with a description of
        how the worker died; or if `stop` was set, which kills the worker. Raises RewardTimeoutError after `timeout_s`,
        RewardError if the function cannot be loaded.
        """
        return self._call(arguments, self._timeout_s, stop)

    def first_call(self, arguments: Mapping[str, Any], stop: Stop | None = None) -> list[PortableValue] | Foreign:
        """Call as `call` does, with the time limit of loading: many functions load a model at their first call.

        If the call took longer than `timeout_s`, repeat it with the limit `timeout_s` of every later call.
        """
        self.start(stop)
        began = time.monotonic()
        result = self._call(arguments, self._startup_timeout_s, stop)
        return result if time.monotonic() - began <= self._timeout_s else self.call(arguments, stop)

    def _call(self, arguments: Mapping[str, Any], timeout_s: float, stop: Stop | None) -> list[PortableValue] | Foreign:
        with self._turn:
            self.start(stop)
            answer = self._exchange(packed(arguments), timeout_s, "the call", stop or Stop())
            if isinstance(answer, Raised):
                raise RewardCallError(f"{self.label} raised {answer.text}")
            assert isinstance(answer, Returned), answer
            return answer.result

    @abstractmethod
    def kill(self) -> None:
        """Kill the process and all that it started, at once and from any thread. A running call raises."""

    def close(self) -> None:
        """Let the process end by itself if it is idle, else kill it. A second call does nothing."""
        if not self._turn.acquire(blocking=False):
            self.kill()
            self._turn.acquire()
        try:
            self._end()
        finally:
            self._turn.release()

    def _load(self, stop: Stop) -> Parameters:
        try:
            answer = self._exchange(None, self._startup_timeout_s, "loading", stop)
        except RewardCallError as error:  # never an abstention: the run would learn from nothing
            raise RewardError(str(error)) from None
        if isinstance(answer, Raised):
            self._discard()
            raise RewardError(f"{self.label} cannot be loaded: {answer.text}")
        assert isinstance(answer, Loaded), answer
        return answer.parameters

    @abstractmethod
    def _gone(self) -> str | None:
        """Describe how the process of an idle worker ended; None if it has not, or if there is none."""

    @abstractmethod
    def _spawn(self) -> None:
        """Start a process. It need not be ready."""

    @abstractmethod
    def _exchange(self, message: dict[str, Any] | None, timeout_s: float, what: str, stop: Stop) -> Any:
        """Send a call (None: none, but load the function) and receive one answer.

        After a time-out, a stop or a death the process has ended. An answer that arrives together with the stop is
        dropped too: the process has been killed, even if this does not show yet.
        """

    @abstractmethod
    def _end(self) -> None:
        """End the process, if there is one."""

    @abstractmethod
    def _discard(self) -> None:
        """Kill the process and forget it."""

    def _stopped(self, what: str) -> RewardCallError:
        return RewardCallError(f"{self.label}: {what} was stopped from outside and its worker was killed")

    def _too_long(self, what: str, timeout_s: float) -> RewardTimeoutError:
        return RewardTimeoutError(
            f"{self.label}: {what} took longer than {timeout_s:g} s and its worker was killed; "
            "raise timeout_s, score fewer completions per call, or make the function faster")


class RewardWorker(Worker):
    """Reward function in a process of its own on this machine."""

    _process: subprocess.Popen[bytes] | None = None
    _connection: Connection | None = None

    def kill(self) -> None:
        process = self._process
        # Not `poll()`: while a dead leader is unreaped its group can still be killed, and a child that it forked may be
        # what holds the connection open.
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself meanwhile
                os.killpg(process.pid, signal.SIGKILL)

    def _gone(self) -> str | None:
        return self._ending() if self._process is not None and self._process.poll() is not None else None

    def _end(self) -> None:
        if self._process is not None:
            self._ask_to_stop(self._process)
            self._discard()

    def _spawn(self) -> None:
        ours, theirs = Pipe()
        path = json.dumps(path_without_siblings())
        command = [sys.executable, "-P", "-c", _BOOT, str(theirs.fileno()), self._function, path]
        # A session of its own: Ctrl-C reaches only the run, and a kill reaches what the function started.
        self._process = subprocess.Popen(
            command, cwd=self._folder, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), start_new_session=True)
        theirs.close()
        self._connection = ours

    def _exchange(self, message: dict[str, Any] | None, timeout_s: float, what: str, stop: Stop) -> Any:
        assert self._connection is not None
        answer = None
        with self._limit(timeout_s) as expired, stop.calls(self.kill):
            try:
                if message is not None:
                    self._connection.send(message)
                answer = self._connection.recv()
            except (EOFError, OSError):
                pass  # the process is dead, by its own doing, by the limit or by the stop
        if stop.is_set():
            self._discard()
            raise self._stopped(what)
        if expired.is_set():
            self._discard()
            raise self._too_long(what, timeout_s)
        if answer is None:
            ending = self._ending()
            self._discard()
            raise RewardCallError(f"{self.label}: its worker process {ending} during {what}; see its stderr")
        return answer

    @contextmanager
    def _limit(self, seconds: float) -> Iterator[threading.Event]:
        """Kill the process after `seconds`, which ends a blocked send or receive. The yielded event is then set."""
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self.kill()

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            yield expired
        finally:
            timer.cancel()
            timer.join()

    def _ending(self) -> str:
        """Describe in words how the process ended. Wait up to STOP_TIMEOUT_S for its end."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    def _ask_to_stop(self, process: subprocess.Popen[bytes]) -> None:
        assert self._connection is not None
        try:
            self._connection.send(None)
            process.wait(timeout=STOP_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired):
            pass  # dead already, or unwilling: `_discard` kills

    def _discard(self) -> None:
        assert self._process is not None and self._connection is not None
        self.kill()
        self._process.wait()
        self._connection.close()
        self._process = self._connection = self._parameters = None
