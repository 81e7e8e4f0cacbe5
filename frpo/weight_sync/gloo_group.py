"""A gloo process group of its own, beside any default group: learner rank 0 sends, the engines' workers receive.

Rank 0 holds the store at which all meet. A group lasts until the first failure; the sender then closes its end and
forms another. Gloo tells a member of another's death only while nothing of the message under way has reached it, and
otherwise lets it wait until the time limit. So whoever waits watches the store too: the sender takes it away with its
end. This knows nothing of weights; bytes go to everyone.
"""
from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, TCPStore

SENDER = 0
LOOK_S = 0.5
"""How often a waiting member looks whether the store is still there."""


class GlooGroup:
    """One member's end. Construction waits, `timeout_s` at most, until all `size` members have come to the store."""

    def __init__(self, host: str, port: int, rank: int, size: int, timeout_s: float):
        limit = timedelta(seconds=timeout_s)
        options = ProcessGroupGloo._Options()
        options._timeout = limit
        options._devices = _devices_towards(host, port)
        self.server: TCPStore | None = None
        self._sending: Future | None = None
        # Two connections: the one that is watched must not wait for what the other is asked.
        store, self._watched = (
            TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit) for _ in range(2))
        self._group = self._watching(_begin(ProcessGroupGloo, store, rank, size, options))

    def send(self, data: bytes) -> None:
        """Begin to send to all members; they take it by `receive` of as many bytes. `sent` waits for the end."""
        self._sending = self._broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def sent(self) -> None:
        """Wait until everything has left. Raises RuntimeError if a member is gone or late."""
        self._sending.result()

    def receive(self, size: int) -> bytes:
        """Wait for what the sender sends. Raises RuntimeError if that fails, or the sender has closed its end."""
        data = torch.empty(size, dtype=torch.uint8)
        self._watching(self._broadcast(data))
        return data.numpy().tobytes()

    def close(self) -> None:
        """Drop the connections: at once, or when work under way has ended, which is not waited for."""
        self._group = self._sending = self._watched = self.server = None

    def _broadcast(self, data: torch.Tensor) -> Future:
        # The thread holds the group, too: to let go of a group in the middle of its work stops the whole process until
        # the work's time limit.
        return _begin(lambda group: group.broadcast(data, root=SENDER).wait(), self._group)

    def _watching(self, work: Future) -> Any:
        while not wait([work], timeout=LOOK_S).done:
            self._watched.check(["any key"])
        return work.result()


def form_as_sender(host: str, size: int, timeout_s: float, invite: Callable[[int], Callable[[], None]]) -> GlooGroup:
    """A new group of `size` members with this process as its sender.

    host: an address of this machine that the members reach. invite(port) asks them to join and returns what waits for
    their answers; if that raises, so does this, and no member goes on waiting.
    """
    server = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    joined = invite(server.port)
    own = _begin(GlooGroup, host, server.port, SENDER, size, timeout_s)
    try:
        joined()
    except BaseException:
        del server  # whoever waits there, our own thread too, fails now
        raise
    group = own.result()
    group.server = server
    return group


def _devices_towards(host: str, port: int) -> list[Any]:
    """The networks that GLOO_SOCKET_IFNAME names, or else the one on which `host` is reached.

    Gloo itself would take the address of this machine's name, which is often the loopback.
    """
    if interfaces := os.environ.get("GLOO_SOCKET_IFNAME"):
        return [ProcessGroupGloo.create_device(interface=name) for name in interfaces.split(",")]
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # sends nothing
        return [ProcessGroupGloo.create_device(hostname=probe.getsockname()[0])]


def _begin(function: Callable[..., Any], *arguments: Any) -> Future:
    """The result of a call in a thread that no process waits for at its end, as an executor's threads are."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            # Without its traceback, which would keep the arguments alive as long as somebody holds the error.
            future.set_exception(error.with_traceback(None))

    threading.Thread(target=run, daemon=True).start()
    return future
