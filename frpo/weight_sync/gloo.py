"""Weights by gloo, over TCP and through CPU memory, to engines on any host."""
from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, cast

import torch
from torch.distributed import ProcessGroupGloo, TCPStore

from frpo.weight_sync.addresses import is_loopback, own_address
from frpo.weight_sync.broadcast import BroadcastSender
from frpo.weight_sync.group import SENDER


class Transport:
    """A gloo process group.

    gloo reports the death of another member only while no part of a message has reached this member.
    """

    def __init__(self, store: TCPStore, rank: int, size: int, timeout_s: float, meeting: tuple[str, int],
                 device: torch.device):
        self.device = device
        options = cast(Any, ProcessGroupGloo)._Options()  # torch's stubs lack `_Options` and `broadcast`
        options._timeout = timedelta(seconds=timeout_s)
        options._devices = _devices_towards(*meeting)
        self.group: Any = ProcessGroupGloo(store, rank, size, options)

    @staticmethod
    def own_device() -> torch.device:
        return torch.device("cpu")

    def broadcast(self, data: torch.Tensor) -> None:
        self.group.broadcast(data, root=SENDER).wait()

    def close(self) -> None:
        """Do nothing: work in progress ends by itself once the connections of the other members are gone."""


class Sender(BroadcastSender):
    transport = Transport


def _devices_towards(host: str, port: int) -> list[Any]:
    """Return the networks that GLOO_SOCKET_IFNAME names, or else the network on which `host` is reached.

    A learner that is alone names the loopback, which does not lead to another machine.
    """
    interfaces, own = os.environ.get("GLOO_SOCKET_IFNAME"), own_address(host, port)
    if interfaces and (interfaces != "lo" or is_loopback(own)):
        return [ProcessGroupGloo.create_device(interface=name) for name in interfaces.split(",")]
    return [ProcessGroupGloo.create_device(hostname=own)]
