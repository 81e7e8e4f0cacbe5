"""A group of processes beside any default group, in which learner rank 0 sends and the engines' workers receive.

Rank 0 holds the store at which all meet. A group lasts until the first failure; the sender then closes its end and
forms another. A transport (`gloo`, `nccl`) tells a member of another's death late or never. So whoever waits watches
the store too: the sender takes it away with its end. This knows nothing of weights; bytes go to everyone.
"""
from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch.distributed import TCPStore

SENDER = 0
LOOK_S = 0.5
"""How often a waiting member looks whether the store is still there."""


class Transport(Protocol):
    """How bytes travel from the sender to all members. Made and used in threads of the group's own.

    device: where the bytes lie. Construction waits until all `size` members have come.
    """

    device: torch.device

    def __init__(self, store: TCPStore, rank: int, size: int, timeout_s: float, meeting: tuple[str, int],
                 device: torch.device): ...

    @staticmethod
    def own_device() -> torch.device:
        """Where the bytes of this process are to lie."""
        ...

    def broadcast(self, data: torch.Tensor) -> None:
        """Send (N,) uint8, or fill it with what is sent; returns when that has happened."""
        ...

    def close(self) -> None:
        """Break off what is under way, as far as that can be done."""
        ...


class BroadcastGroup:
    """One member's end. Construction waits, `timeout_s` at most, until all `size` members have come to the store."""

    def __init__(self, transport: type[Transport], host: str, port: int, rank: int, size: int, timeout_s: float):
        limit = timedelta(seconds=timeout_s)
        self.server: TCPStore | None = None
        self._sending: Future | None = None
        self._watched: TCPStore | None
        # Two connections: the one that is watched must not wait for what the other is asked.
        store, self._watched = (
            TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit) for _ in range(2))
        self.device = transport.own_device()
        self._transport = self._watching(
            begin(transport, store, rank, size, timeout_s, (host, port), self.device))

    def send(self, data: torch.Tensor) -> None:
        """Begin to send (N,) uint8, which stays as it is until `sent`, to all members, which `receive` as many bytes.
        """
        self._sending = self._broadcast(data)

    def sent(self) -> None:
        """Wait until everything has left. Raises RuntimeError if a member is gone or late."""
        assert self._sending is not None  # by `send`
        self._sending.result()

    def receive(self, size: int) -> torch.Tensor:
        """Wait for what the sender sends, (size,) uint8. Raises RuntimeError if that fails, or the sender has closed
        its end.
        """
        data = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._watching(self._broadcast(data))
        return data

    def close(self) -> None:
        """Drop the connections: at once, or when work under way has ended, which is not waited for."""
        if self._transport is not None:
            self._transport.close()
        self._transport = self._sending = self._watched = self.server = None

    def _broadcast(self, data: torch.Tensor) -> Future:
        if data.is_cuda:  # the thread has a stream of its own, for which nothing must be left to do with this memory
            torch.cuda.current_stream(data.device).synchronize()
        # The thread holds the transport, too: to let go of a gloo group in the middle of its work stops the whole
        # process until the work's time limit.
        return begin(lambda transport: transport.broadcast(data), self._transport)

    def _watching(self, work: Future) -> Any:
        while not wait([work], timeout=LOOK_S).done:
            assert self._watched is not None  # nobody closes what he waits for
            self._watched.check(["any key"])
        return work.result()


def form_as_sender(transport: type[Transport], host: str, size: int, timeout_s: float,
                   invite: Callable[[int], Callable[[], None]]) -> BroadcastGroup:
    """A new group of `size` members with this process as its sender.

    host: an address of this machine that the members reach. invite(port) asks them to join and returns what waits for
    their answers; if that raises, so does this, and no member goes on waiting.
    """
    server = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    joined = invite(server.port)
    own = begin(_join, torch.cuda.current_device() if torch.cuda.is_available() else None, transport, host,
                server.port, size, timeout_s)
    try:
        joined()
    except BaseException:
        del server  # whoever waits there, our own thread too, fails now
        raise
    group = own.result()
    group.server = server
    return group


def _join(gpu: int | None, transport: type[Transport], host: str, port: int, size: int, timeout_s: float
          ) -> BroadcastGroup:
    """The sender's end, in a thread, which begins without the GPU of the one that started it."""
    if gpu is not None:
        torch.cuda.set_device(gpu)
    return BroadcastGroup(transport, host, port, SENDER, size, timeout_s)


def begin(function: Callable[..., Any], *arguments: Any) -> Future:
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
