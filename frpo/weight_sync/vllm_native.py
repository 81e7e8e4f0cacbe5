"""What the CUDA backends `nccl` and `ipc` share: vLLM's own trainer-side engines behind frpo's sender.

NEVER EXECUTED: written against vLLM 0.32's interface on a machine without a GPU. Weights land in place, so a push that
breaks off leaves a mixture; the engine then refuses to serve until it is rebuilt and synced (see
`frpo.rollout.engine.RolloutEngine.start_weight_update`).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from frpo.errors import EngineError
from frpo.weight_sync.protocol import WeightStream, WeightSyncClient, drained


class VersionedClient:
    """A client whose pushes end under the version that is being sent: vLLM's trainer side knows no versions."""

    def __init__(self, client: WeightSyncClient):
        self.client = client
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.client.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self.client.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self.client.update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.client.finish_weight_update(str(self.version))


class NativeSender:
    """One rank's end of a vLLM trainer engine, built at the first push, when the parameters are known.

    build: (client, weight source) -> vLLM trainer engine; called once on every rank.
    """

    def __init__(self, rank: int, client: WeightSyncClient | None, build: Callable[[Any, Any], Any]):
        self.client = VersionedClient(client) if rank == 0 else None
        self.build = build
        self.engine: Any = None
        self.source: Any = None

    def send(self, weights: WeightStream, version: int) -> None:
        if self.engine is None:
            self.source = _source_class()(weights)
            self.engine = self.build(self.client, self.source)
        self.source.weights = weights
        if self.client is not None:
            self.client.version = version
        try:
            self.engine.send_weights()
        except RuntimeError as error:
            drained(self.source.running)
            raise EngineError(f"push of version {version} failed while weights were landing in place: {error}; "
                              "the engines must be rebuilt") from error


def _source_class() -> type:
    """vLLM's weight source over a gathered stream; a function, because only CUDA machines may import vLLM here."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class GatheredSource(WeightSource):
        def __init__(self, weights: WeightStream):
            self.weights = weights
            self.running: Iterator[tuple[str, torch.Tensor]] = iter(())

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, dtype, shape) for name, dtype, shape in self.weights.metadata()]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            self.running = self._tensors()
            return self.running

        def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
            for bucket in self.weights:
                for name, tensor in bucket:
                    # A packed transfer holds tensors until its buffer is full; the gathered memory is gone by then.
                    yield name, tensor.clone()

    return GatheredSource
