"""The port that a rank offers before anyone connects: nobody else gets it by chance, and the ranks' store gets it."""
import socket
from datetime import timedelta

from torch.distributed import TCPStore

from frpo.cluster.rank import RankHost


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
        store = TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
        store.set("key", "value")
        assert TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10)).get("key") == b"value"
    finally:
        for other in others:
            other.close()
