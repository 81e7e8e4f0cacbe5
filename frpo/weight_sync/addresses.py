"""Addresses and ports of this machine, as other processes reach them. Imports no torch."""
from __future__ import annotations

import ipaddress
import socket

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach the address. Systems give their own name one of 127.0.0.0/8."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def own_address(host: str, port: int) -> str:
    """Return the address of this machine from which `host` is reached. Sends nothing. Raises OSError if there is none.

    The address of a machine's own name is often the loopback, which other machines do not reach.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def reserved_port(host: str, port: int = 0) -> socket.socket:
    """Bind a port of this machine; 0: a free one. Nobody else gets the port while the socket is open.

    On a loopback address only this machine can reach the port. Else all networks can, since a machine may be known to
    others by an address that it does not have itself.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    reserved = socket.socket(family, kind)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(address if host in LOOPBACK else ("", port))
    return reserved
