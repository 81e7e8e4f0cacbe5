"""Sources of the frozen reference's distribution.

The sources are a copy beside the policy, the policy without its adapters, or final hidden states on disk. All sources
give the reference's final hidden states at a micro-batch's loss positions, and the output head that makes logits from
them. `losses` uses these.

Legend: N loss positions, V vocabulary, E the reference's hidden width.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import deepspeed
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from frpo.data.layout import is_padding
from frpo.kernels import LogitScale
from frpo.learner.collate import TokenBatch
from frpo.learner.lora import adapters_off
from frpo.learner.network import TokenHead, token_model
from frpo.learner.state_cache import HEAD, StateCache
from frpo.types import MicroBatch

BITS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16}
"""Type in which a tensor is handed to numpy, which has no bfloat16."""


@dataclass(frozen=True, kw_only=True)
class ReferenceStates:
    """hidden_NE and head_VE, of one type; head_VE is None where the head is the policy's own, which is frozen.

    scale: how their product becomes logits.
    """

    hidden_NE: torch.Tensor
    head_VE: torch.Tensor | None
    scale: LogitScale


class Reference(Protocol):
    """Interface of a source of the reference's states of a micro-batch."""

    def states(self, samples: MicroBatch, batch: TokenBatch) -> AbstractContextManager[ReferenceStates]:
        """Give the states, valid within the context. Collective."""
        ...


def head_of(network: torch.nn.Module) -> TokenHead:
    """Return the head of a TokenModel, or of DeepSpeed's engine around one."""
    return cast(TokenHead, token_model(network).head)


class FrozenModel:
    """A model that computes the states: a copy, partitioned like the policy, or the policy without its adapters.

    network: a TokenModel, or DeepSpeed's engine around one. is_policy: the network is the policy's own, and has
    adapters.
    """

    def __init__(self, network: torch.nn.Module, *, is_policy: bool):
        self.network, self.is_policy = network, is_policy
        self.head = head_of(network)

    @contextmanager
    def active(self) -> Iterator[torch.nn.Module]:
        """Give the network in the role of the reference. The network may have this role only within the context."""
        if not self.is_policy:
            yield self.network
            return
        with adapters_off(token_model(self.network).network):
            yield self.network

    @contextmanager
    def states(self, samples: MicroBatch, batch: TokenBatch) -> Iterator[ReferenceStates]:
        with torch.no_grad(), self.active() as network:
            hidden_NE = network(batch, _hidden)
        if self.is_policy:
            yield ReferenceStates(hidden_NE=hidden_NE, head_VE=None, scale=self.head.scale)
            return
        with whole(self.head.weight) as head_VE:
            yield ReferenceStates(hidden_NE=hidden_NE, head_VE=head_VE, scale=self.head.scale)


class CachedStates:
    """States from a complete `StateCache`. The head is whole on every rank."""

    def __init__(self, folder: str, device: torch.device):
        self.cache, self.device = StateCache.complete(Path(folder)), device
        self.head_VE = load_file(self.cache.folder / HEAD, device=str(device))["head"]

    @contextmanager
    def states(self, samples: MicroBatch, batch: TokenBatch) -> Iterator[ReferenceStates]:
        stored_NE = np.concatenate([self.cache.hidden[:0], *(
            self.cache.read(sample.sample_id[2]) for sample in samples if not is_padding(sample))])
        hidden_NE = torch.from_numpy(stored_NE).view(self.head_VE.dtype).to(self.device)
        yield ReferenceStates(hidden_NE=hidden_NE, head_VE=self.head_VE, scale=LogitScale(**self.cache.facts["scale"]))


def fill_cache(reference: FrozenModel, folder: str, samples: MicroBatch, batch: TokenBatch) -> None:
    """Write the states of one micro-batch, whose samples are numbered as the cache's examples. Collective."""
    cache, start = StateCache.begun(Path(folder)), 0
    with reference.states(samples, batch) as states:
        stored_NE = states.hidden_NE.cpu().contiguous().view(BITS[states.hidden_NE.dtype]).numpy()
    for sample in samples:
        if not is_padding(sample):
            count = int(sample.loss_mask.sum())
            cache.write(sample.sample_id[2], stored_NE[start:start + count])
            start += count


def finish_cache(reference: FrozenModel, folder: str, rank: int) -> None:
    """Write the reference's head and mark the cache complete. Collective; rank 0 writes."""
    with whole(reference.head.weight) as head_VE:
        if rank == 0:
            cache = StateCache.begun(Path(folder))
            save_file({"head": head_VE.cpu().contiguous()}, cache.folder / HEAD)
            cache.finish()


@contextmanager
def whole(parameter: torch.nn.Parameter) -> Iterator[torch.Tensor]:
    """Give the parameter as a plain tensor, gathered if it is partitioned. Collective."""
    with deepspeed.zero.GatheredParameters([parameter]):
        yield parameter.detach()


def _hidden(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    return hidden_ND
