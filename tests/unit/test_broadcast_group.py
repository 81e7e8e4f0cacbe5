"""The group of backends that broadcast, its members as threads: bytes arrive, and nobody waits for the dead."""
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from frpo.weight_sync.gloo import Transport
from frpo.weight_sync.group import BroadcastGroup, form_as_sender

HOST, LIMIT_S, SIZE = "127.0.0.1", 30.0, 20_000_000
AT_ONCE_S = 5.0


def formed(size, absent=()):
    """(sender, receivers) of a new group of `size`; those in `absent` never come."""
    with ThreadPoolExecutor(size) as pool:
        def invite(port):
            joins = [pool.submit(BroadcastGroup, Transport, HOST, port, rank, size, LIMIT_S) for rank in range(1, size)
                     if rank not in absent]

            def wait():
                if absent:
                    time.sleep(0.2)  # the others are waiting by now
                    raise RuntimeError(f"{absent} did not come")
                return joins

            asked.append(joins)
            return wait

        asked = []
        sender = form_as_sender(Transport, HOST, size, LIMIT_S, invite)
        return sender, [join.result() for join in asked[0]]


@pytest.mark.timeout(60)
def test_bytes_reach_everyone_in_order():
    sender, receivers = formed(4)
    sent = [bytes(range(256)) * 3, b"\x00", b"x" * 1_000_001]
    with ThreadPoolExecutor(len(receivers)) as pool:
        arrivals = [pool.submit(lambda end: [bytes(end.receive(len(data)).tolist()) for data in sent], end)
                    for end in receivers]
        for data in sent:
            sender.send(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            sender.sent()
        assert [arrival.result() for arrival in arrivals] == [sent] * 3


@pytest.mark.timeout(60)
def test_a_group_that_does_not_come_together_keeps_nobody_waiting():
    began = time.perf_counter()
    with pytest.raises(RuntimeError, match="did not come"):
        formed(4, absent=(2,))  # returns when the others' attempts have ended, too
    assert time.perf_counter() - began < AT_ONCE_S


@pytest.mark.timeout(60)
@pytest.mark.parametrize("absent", [None, 1, 2, 3, 4])
def test_nobody_waits_for_a_sender_that_has_closed_its_end(absent):
    """Also in the middle of a message: parts of it have arrived, and one member does not pass on its share."""
    sender, receivers = formed(5)
    ended = []

    def receive(end):
        try:
            end.receive(SIZE)
        except RuntimeError:
            end.close()
        ended.append(end)

    waiting = [threading.Thread(target=receive, args=(end,), daemon=True)
               for rank, end in enumerate(receivers, start=1) if rank != absent]
    for thread in waiting:
        thread.start()
    if absent is not None:
        sender.send(torch.zeros(SIZE, dtype=torch.uint8))
    time.sleep(0.5)
    assert absent or not ended
    began = time.perf_counter()
    sender.close()
    assert time.perf_counter() - began < 1
    for thread in waiting:
        thread.join(LIMIT_S)
    assert time.perf_counter() - began < AT_ONCE_S
    assert len(ended) == len(waiting)
    for end in receivers:
        end.close()
