"""Weights by gloo broadcast from learner rank 0 to the workers of all engines, which may be on other hosts.

Workers stage the buckets in their memory and swap them in at the end, so an interrupted push changes nothing. Any
failure ends the process group; the next push forms a new one with all engines. The receiving end is
`frpo.rollout.gloo_receiver`.
"""
from __future__ import annotations

import os
from collections.abc import Callable

from safetensors.torch import save

from frpo.weight_sync.gloo_group import GlooGroup, form_as_sender
from frpo.weight_sync.protocol import Bucket, WeightStream, WeightSyncClient, drained


class Sender:
    """Sends buckets from rank 0; the other ranks take part in the gathers and send nothing."""

    def __init__(self, rank: int, client: WeightSyncClient | None):
        self.rank = rank
        self.client = client
        self.group: GlooGroup | None = None

    def send(self, weights: WeightStream, version: int) -> None:
        if self.rank != 0:
            drained(weights)
            return
        remaining = iter(weights)
        try:
            if self.group is None:
                self.group = self._form()
            self.client.start_weight_update()
            for bucket in remaining:
                self._send(bucket)
            self.client.finish_weight_update(str(version))
        except BaseException:
            self._drop()
            raise
        finally:
            drained(remaining)

    def _form(self) -> GlooGroup:
        host, size, limit = os.environ["MASTER_ADDR"], 1 + self.client.num_workers(), self.client.timeout_s

        def invite(port: int) -> Callable[[], None]:
            return self.client.begin_init_weight_transfer_engine(
                {"host": host, "port": port, "rank_offset": 1, "size": size, "timeout_s": limit})

        return form_as_sender(host, size, limit, invite)

    def _send(self, bucket: Bucket) -> None:
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in bucket})
        received = self.client.begin_update_weights({"size": len(data)})
        self.group.send(data)
        received()  # before `sent`: an engine that fails or dies is known here at once, and by its name
        self.group.sent()

    def _drop(self) -> None:
        """Close the group first of all, so that engines that wait for a bucket fail now and can be called again."""
        if self.group is not None:
            self.group.close()
            self.group = None
