"""Lay out samples over ranks and micro-batches: balanced by cost, packed or padded, equally many on every rank.

The layout moves whole samples and does not depend on weights, so every layout gives the same gradient.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import Any

import numpy as np

from frpo.errors import ConfigError
from frpo.types import AnySample, MicroBatch, RankBatches, Sample, sequence_lengths

PADDING_INDEX = -1
"""Sample index, within its group, of a sample that only keeps ranks in step."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Layout that a learner needs for its samples.

    micro_batch_tokens: most tokens of a micro-batch; a padded micro-batch counts samples x longest.
    packed: the samples of a micro-batch are laid end to end without padding.
    attention_length: sequence length at which attention costs as much as everything else. A layer of width D spends
        24 D^2 FLOP a token on its matrices and 2 L D on causal attention over L tokens, so about 12 D.
    """

    num_ranks: int
    micro_batch_tokens: int
    packed: bool
    attention_length: float = 12 * 4096

    def cost(self, sample: AnySample) -> float:
        """Return the work of a sample, in units of one token without attention."""
        return sum(length * (1 + length / self.attention_length) for length in sequence_lengths(sample))

    def size(self, sample: AnySample) -> int:
        """Return the tokens of a sample in a micro-batch. Its sequences have one width where they are padded."""
        lengths = sequence_lengths(sample)
        return sum(lengths) if self.packed else len(lengths) * max(lengths)


def lay_out(samples: Sequence[Sample], layout: Layout) -> RankBatches:
    """Return `[rank][i]` micro-batches that hold each sample once, equally many on every rank.

    Longest first, each sample goes to the rank with the least work so far, and there into the first micro-batch with
    room for it. Ranks with fewer micro-batches split theirs. If these are single samples, such a rank adds padding: the
    shortest sample without loss and weight. Padding has real tokens, because a model may return NaN for made-up tokens
    and NaN x 0 is NaN. The order of `samples` does not matter.
    Ranks wait for each other at every micro-batch, so each rank runs its costliest micro-batch first.
    Raises ConfigError for a sample longer than `micro_batch_tokens`.
    """
    assert samples and layout.num_ranks >= 1
    ordered = sorted(samples, key=lambda sample: (-layout.size(sample), sample.sample_id))
    longest = ordered[0]
    if layout.size(longest) > layout.micro_batch_tokens:
        raise ConfigError(f"sample {longest.sample_id} has {layout.size(longest)} tokens, learner.micro_batch_tokens "
                          f"allows {layout.micro_batch_tokens}; raise it or lower rollout.max_new_tokens")
    ranks = [_fill(rank, layout) for rank in _balance(ordered, layout)]
    count = max(map(len, ranks))
    padding = (_without_loss(ordered[-1]),)
    return tuple(tuple(sorted(_extend(rank, count, padding), key=lambda batch: -sum(map(layout.cost, batch))))
                 for rank in ranks)


def is_padding(sample: AnySample) -> bool:
    """Check whether the sample only keeps ranks in step; no result of such a sample counts."""
    return sample.sample_id[2] == PADDING_INDEX


def _balance(ordered: Sequence[Sample], layout: Layout) -> list[list[Sample]]:
    """Assign each sample to the rank with the least work, the lowest of several. Keep the order within a rank."""
    ranks: list[list[Sample]] = [[] for _ in range(layout.num_ranks)]
    loads = [0.0] * layout.num_ranks
    for sample in ordered:
        rank = loads.index(min(loads))
        ranks[rank].append(sample)
        loads[rank] += layout.cost(sample)
    return ranks


def _fill(ordered: Sequence[Sample], layout: Layout) -> list[MicroBatch]:
    """Put samples into micro-batches by first fit, longest first. The first sample of a padded one sets its width.

    Lengths only decrease. So a micro-batch without room leaves the search until a sample is as short as its room.
    """
    batches: list[list[Sample]] = []
    room: list[int] = []
    fitting: list[int] = []  # heap of the micro-batches with room for the next sample, which the first one gets
    waiting: list[tuple[int, int]] = []  # heap of (-room, micro-batch) of packed ones without it
    for sample in ordered:
        length = layout.size(sample)
        while waiting and -waiting[0][0] >= length:
            heappush(fitting, heappop(waiting)[1])
        if not fitting:
            fitting.append(len(batches))
            batches.append([])
            room.append(layout.micro_batch_tokens)
        index = fitting[0]
        batches[index].append(sample)
        width = length if layout.packed else layout.size(batches[index][0])
        room[index] -= width
        if room[index] < width:
            heappop(fitting)
            if layout.packed:
                heappush(waiting, (-room[index], index))
    return [tuple(batch) for batch in batches]


def _extend(batches: list[MicroBatch], count: int, padding: MicroBatch) -> list[MicroBatch]:
    """Return `count` micro-batches: halve the fullest as long as it has two samples, then add padding."""
    batches = list(batches)
    while len(batches) < count:
        fullest = max(range(len(batches)), key=lambda i: len(batches[i]), default=None)
        if fullest is None or len(batches[fullest]) == 1:
            batches.append(padding)
        else:
            batch, half = batches[fullest], len(batches[fullest]) // 2
            batches[fullest:fullest + 1] = [batch[:half], batch[half:]]
    return batches


def _without_loss(sample: Sample) -> Sample:
    zeros_S = np.zeros(len(sample.token_ids))
    first, second, _ = sample.sample_id
    weights: dict[str, Any] = dict.fromkeys(sample.WEIGHTS, zeros_S)
    return replace(sample, sample_id=(first, second, PADDING_INDEX), loss_mask=zeros_S.astype(bool), **weights)
