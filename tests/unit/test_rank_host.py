"""The port that a rank offers before anyone connects: nobody else gets it by chance, and the ranks' store gets it."""
import socket
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from frpo.cluster.rank import RankHost
from frpo.weight_sync.addresses import reserved_port
from frpo.weight_sync.group import served_store


def test_an_offered_port_waits_for_the_store_of_the_ranks():
    host = RankHost()
    address, port, _ = host.address()
    others = []
    try:
        for _ in range(500):
            other = socket.socket()
            other.bind(("", 0))
            others.append(other)
        assert port not in {other.getsockname()[1] for other in others}
        store = served_store(host.reserved, address, 10)
        store.set("key", "value")
        assert TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10)).get("key") == b"value"
    finally:
        for other in others:
            other.close()


@pytest.mark.parametrize("host, open_to", [("127.0.0.1", {"127.0.0.1"}), ("localhost", {"127.0.0.1", "::1"}),
                                           ("127.0.1.1", {"0.0.0.0"})])
def test_a_port_on_the_loopback_is_open_to_this_machine_alone(host, open_to):
    """127.0.1.1 is the address that Debian gives to a machine's own name, by which others mean another address."""
    with reserved_port(host) as reserved:
        assert reserved.getsockname()[0] in open_to
