"""A process group beside any default group, in which learner rank 0 sends and the engines' workers receive.

Rank 0 holds the store at which all members meet. A group lasts until the first failure. The sender then closes its end
and forms another group.

A transport (`gloo`, `nccl`) reports the death of a member late or never. Every waiting member therefore also watches
the store, which disappears when the sender closes its end.

This module does not depend on what the bytes mean. All members get all bytes.
"""
from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch.distributed import TCPStore

from frpo.weight_sync.addresses import reserved_port

SENDER = 0
BACKLOG = 2048
"""Connections to a store that may wait to be accepted."""

LOOK_S = 0.5
"""Seconds between two checks of a waiting member that the store still exists."""


class Transport(Protocol):
    """Way in which bytes travel from the sender to all members.

    Transports are made and used in the group's own threads.
    device: where the bytes lie. Construction waits until all `size` members have come.
    """

    device: torch.device

    def __init__(self, store: TCPStore, rank: int, size: int, timeout_s: float, meeting: tuple[str, int],
                 device: torch.device): ...

    @staticmethod
    def own_device() -> torch.device:
        """Return the device on which the bytes of this process are to lie."""
        ...

    def broadcast(self, data: torch.Tensor) -> None:
        """Send `data`, (N,) uint8, or fill `data` with the bytes that the sender sends. Return when this is done."""
        ...

    def close(self) -> None:
        """Abort the work in progress, as far as possible."""
        ...


class BroadcastGroup:
    """One member's end of the group.

    Construction waits until all `size` members have come to the store, `timeout_s` at most.
    """

    def __init__(self, transport: type[Transport], host: str, port: int, rank: int, size: int, timeout_s: float):
        limit = timedelta(seconds=timeout_s)
        self.server: TCPStore | None = None
        self._sending: Future | None = None
        self._watched: TCPStore | None
        # Two connections: a check on the watched connection must not wait for a request on the other.
        store, self._watched = (
            TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit) for _ in range(2))
        self.device = transport.own_device()
        self._transport = self._watching(
            begin(transport, store, rank, size, timeout_s, (host, port), self.device))

    def send(self, data: torch.Tensor) -> None:
        """Begin to send (N,) uint8 to all members, which `receive` as many bytes.

        `data` must stay unchanged until `sent` returns.
        """
        self._sending = self._broadcast(data)

    def sent(self) -> None:
        """Wait until everything has left. Raises RuntimeError if a member is gone or late."""
        assert self._sending is not None  # by `send`
        self._sending.result()

    def receive(self, size: int) -> torch.Tensor:
        """Wait for the bytes of the sender, (size,) uint8.

        Raises RuntimeError if the transfer fails or the sender has closed its end.
        """
        data = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._watching(self._broadcast(data))
        return data

    def close(self) -> None:
        """Drop the connections, at once or when work in progress has ended. Do not wait for that work."""
        if self._transport is not None:
            self._transport.close()
        self._transport = self._sending = self._watched = self.server = None

    def _broadcast(self, data: torch.Tensor) -> Future:
        if data.is_cuda:  # the thread uses another stream; finish all work on this memory before
            torch.cuda.current_stream(data.device).synchronize()
        # The thread keeps a reference to the transport, too: releasing a gloo group in the middle of its work blocks
        # the whole process until the work's time limit.
        return begin(lambda transport: transport.broadcast(data), self._transport)

    def _watching(self, work: Future) -> Any:
        while not wait([work], timeout=LOOK_S).done:
            assert self._watched is not None  # no caller closes a group while waiting for it
            self._watched.check(["any key"])
        return work.result()


def served_store(reserved: socket.socket, host: str, timeout_s: float) -> TCPStore:
    """Open a store in this process at a reserved port. host: the address by which this process reaches the store."""
    reserved.listen(BACKLOG)
    port = reserved.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s),
                    master_listen_fd=reserved.detach())


def form_as_sender(transport: type[Transport], host: str, size: int, timeout_s: float,
                   invite: Callable[[int], Callable[[], None]]) -> BroadcastGroup:
    """Form a new group of `size` members with this process as its sender.

    host: an address of this machine that the members reach.
    invite: invite(port) asks the members to join and returns a function that waits for their answers. If that function
    raises, this function raises the same error, and no member goes on waiting.
    """
    server = served_store(reserved_port(host), host, timeout_s)
    joined = invite(server.port)
    own = begin(_join, torch.cuda.current_device() if torch.cuda.is_available() else None, transport, host,
                server.port, size, timeout_s)
    try:
        joined()
    except BaseException:
        del server  # every member that waits at the store fails now, and so does our own thread
        raise
    group = own.result()
    group.server = server
    return group


def _join(gpu: int | None, transport: type[Transport], host: str, port: int, size: int, timeout_s: float
          ) -> BroadcastGroup:
    """Join as the sender, in a thread. Set the GPU here, since a new thread does not inherit the GPU of its starter."""
    if gpu is not None:
        torch.cuda.set_device(gpu)
    return BroadcastGroup(transport, host, port, SENDER, size, timeout_s)


def begin(function: Callable[..., Any], *arguments: Any) -> Future:
    """Start a call in a thread and return its future result.

    A process that ends does not wait for this thread, as it would for an executor's threads.
    """
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            # Drop the traceback, which would keep the arguments alive as long as the error is referenced.
            future.set_exception(error.with_traceback(None))

    threading.Thread(target=run, daemon=True).start()
    return future
