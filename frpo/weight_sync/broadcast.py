"""Shared code of the backends that broadcast: learner rank 0 sends every bucket to the workers of all engines at once.

Any failure ends the group. The next push forms a new group with all engines. The receiving end is
`frpo.rollout.broadcast_receiver`.
"""
from __future__ import annotations

from collections.abc import Callable

import torch

from frpo.config.rollout import WeightSyncSection
from frpo.weight_sync.group import BroadcastGroup, Transport, form_as_sender
from frpo.weight_sync.packing import layout_of, pack, packed_size
from frpo.weight_sync.protocol import Bucket, WeightStream, WeightSyncClient, drained


class BroadcastSender:
    """Sender of buckets from rank 0. The other ranks take part in the gathers and send nothing."""

    transport: type[Transport]

    def __init__(self, rank: int, client: WeightSyncClient | None, section: WeightSyncSection):
        self.rank, self.client, self.section = rank, client, section
        self.group: BroadcastGroup | None = None

    def send(self, weights: WeightStream, version: int) -> None:
        if self.rank != 0:
            drained(weights)
            return
        assert self.client is not None  # rank 0 has one
        remaining = iter(weights)
        try:
            if self.group is None:
                self.group = self._form(self.client)
            self.client.start_weight_update()
            for bucket in remaining:
                self._send(bucket, self.client, self.group)
            self.client.finish_weight_update(str(version))
        except BaseException:
            self._drop()
            raise
        finally:
            drained(remaining)

    def _form(self, client: WeightSyncClient) -> BroadcastGroup:
        host, size, limit = client.host(), 1 + client.num_workers(), client.timeout_s

        def invite(port: int) -> Callable[[], None]:
            return client.begin_init_weight_transfer_engine(
                {**self.section.for_engines, "host": host, "port": port, "rank_offset": 1, "size": size,
                 "timeout_s": limit})

        return form_as_sender(self.transport, host, size, limit, invite)

    @staticmethod
    def _send(bucket: Bucket, client: WeightSyncClient, group: BroadcastGroup) -> None:
        layout = layout_of(bucket)
        data = torch.empty(packed_size(layout), dtype=torch.uint8, device=group.device)
        pack(bucket, data)
        received = client.begin_update_weights({"layout": layout})
        group.send(data)
        received()  # before `sent`: this call raises at once, with the engine's name, if an engine fails or dies
        group.sent()

    def _drop(self) -> None:
        """Close the group before anything else: engines that wait for a bucket then fail at once and can be called
        again.
        """
        if self.group is not None:
            self.group.close()
            self.group = None
