"""Samples to micro-batches: weights divided once, then any layout over updates, ranks and micro-batches.

A sample's weights depend on the samples of its optimizer update only, never on the layout, so every split gives the
same gradient. Does not compute advantages, pad, build tensors or talk to a learner.

Legend: N samples of an update, S tokens of a sample (prompt and completion).
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from frpo.errors import ConfigError, InvariantError
from frpo.objectives.reduction import token_weights
from frpo.types import (
    AdvantagedGroup,
    Completion,
    LearnerBatch,
    MicroBatch,
    Prompt,
    RolloutGroup,
    SampleId,
    TrainingSample,
)

PADDING_INDEX = -1
"""Sample index, within its group, of a sample that only keeps ranks in step."""


def pack(groups: Sequence[AdvantagedGroup], *, num_ranks: int, updates: int, micro_batch_tokens: int, reduction: str,
         max_length: int, old_logprobs: Sequence[tuple[np.ndarray, ...]] | None = None,
         train_truncated: bool = True) -> LearnerBatch:
    """The batch of one step: samples by id, cut into `updates` equal runs, each laid out by `lay_out`.

    micro_batch_tokens: samples x longest of a micro-batch, at most. reduction, max_length: see `token_weights`.
    old_logprobs: per group and completion, T log-probs under the policy before the first update; None if that is the
    policy of the only update. train_truncated: if False, completions cut off by the length limit have no loss; they
    still count in N.
    Raises ConfigError for samples that do not divide by `updates` or do not fit, InvariantError for values not finite.
    """
    old = [None] * len(groups) if old_logprobs is None else old_logprobs
    samples = [sample for group, old_G in zip(groups, old, strict=True)
               for sample in _training_samples(group, old_G, train_truncated)]
    samples.sort(key=lambda sample: sample.sample_id)
    assert len({sample.sample_id for sample in samples}) == len(samples), "sample ids repeat within a step"
    if not samples or len(samples) % updates:
        raise ConfigError(f"{len(samples)} samples cannot be split into {updates} equal updates; choose "
                          "learner.updates_per_step as a divisor of rollout.prompts_per_step x group_size")
    size = len(samples) // updates
    minibatches = [samples[start:start + size] for start in range(0, len(samples), size)]
    return LearnerBatch(updates=tuple(
        lay_out(_weighted(minibatch, reduction, max_length), num_ranks=num_ranks, micro_batch_tokens=micro_batch_tokens)
        for minibatch in minibatches))


def score_batches(groups: Sequence[RolloutGroup], *, num_ranks: int,
                  micro_batch_tokens: int) -> tuple[tuple[MicroBatch, ...], ...]:
    """`[rank][i]` micro-batches of all completions for a pass without gradients, such as reference log-probs.

    Samples have no advantage and no weight; skip those with `is_padding` when reading results.
    """
    samples = [_sample(group, index) for group in groups for index in range(len(group.completions))]
    return lay_out(samples, num_ranks=num_ranks, micro_batch_tokens=micro_batch_tokens)


def lay_out(samples: Sequence[TrainingSample], *, num_ranks: int,
            micro_batch_tokens: int) -> tuple[tuple[MicroBatch, ...], ...]:
    """`[rank][i]` micro-batches holding each sample once, equally many on every rank.

    Longest first, each sample goes to the rank with the fewest tokens so far; a rank fills its micro-batches in the
    same order, so that neighbours have similar lengths. Ranks with fewer micro-batches split theirs, and only when
    these are single samples add padding: the shortest sample without loss and weight. Its tokens are real, because a
    model may return NaN for made-up ones and NaN x 0 is NaN. The order of `samples` does not matter.
    Raises ConfigError for a sample longer than `micro_batch_tokens`.
    """
    assert samples and num_ranks >= 1
    ordered = sorted(samples, key=lambda sample: (-len(sample.token_ids), sample.sample_id))
    longest = ordered[0]
    if len(longest.token_ids) > micro_batch_tokens:
        raise ConfigError(f"sample {longest.sample_id} has {len(longest.token_ids)} tokens, learner.micro_batch_tokens "
                          f"allows {micro_batch_tokens}; raise it or lower rollout.max_new_tokens")
    ranks = [_fill(rank, micro_batch_tokens) for rank in _balance(ordered, num_ranks)]
    count = max(map(len, ranks))
    padding = (_without_loss(ordered[-1]),)
    return tuple(tuple(_extend(rank, count, padding)) for rank in ranks)


def is_padding(sample: TrainingSample) -> bool:
    """Whether the sample only keeps ranks in step: no result of it counts."""
    return sample.sample_id[2] == PADDING_INDEX


def _training_samples(advantaged: AdvantagedGroup, old_logprobs: tuple[np.ndarray, ...] | None,
                      train_truncated: bool) -> Iterable[TrainingSample]:
    """The samples of a group with advantages, old and reference log-probs, without weights yet."""
    group = advantaged.scored.group
    for index, completion in enumerate(group.completions):
        sample = _sample(group, index)
        advantage = float(advantaged.advantages_G[index])
        if not np.isfinite(advantage):
            raise InvariantError(f"sample {sample.sample_id}: advantage {advantage} is not finite; a completion "
                                 "without a reward must get 0 from the advantage estimator")
        ref = None
        if advantaged.ref_logprobs is not None:
            ref = _aligned(advantaged.ref_logprobs[index], group.prompt, completion, sample.sample_id, "reference")
        old = None
        if old_logprobs is not None:
            old = _aligned(old_logprobs[index], group.prompt, completion, sample.sample_id, "old")
        learns = train_truncated or not completion.truncated
        yield replace(sample, advantage=advantage, old_logprobs=old, ref_logprobs=ref,
                      loss_mask=sample.loss_mask & learns)


def _sample(group: RolloutGroup, index: int) -> TrainingSample:
    """Prompt and completion as one sequence, with a loss on the completion's own tokens but no weight."""
    prompt, completion = group.prompt, group.completions[index]
    sample_id = (*group.group_id, index)
    token_ids_S = np.array(prompt.token_ids + completion.token_ids, dtype=np.int64)
    mask_S = np.zeros(len(token_ids_S), dtype=bool)
    mask_S[len(prompt.token_ids):] = completion.loss_mask
    zeros_S = np.zeros(len(token_ids_S))
    return TrainingSample(
        sample_id=sample_id, token_ids=token_ids_S, loss_mask=mask_S, advantage=0.0, policy_weight=zeros_S,
        kl_weight=zeros_S, rollout_logprobs=_aligned(completion.logprobs, prompt, completion, sample_id, "rollout"))


def _aligned(logprobs: Sequence[float] | np.ndarray, prompt: Prompt, completion: Completion, sample_id: SampleId,
             kind: str) -> np.ndarray:
    """float32 (S): log-probs of a completion behind zeros for its prompt; zero in holes, where none may be known."""
    values = np.asarray(logprobs, dtype=np.float32)
    assert len(values) == len(completion.token_ids) == len(completion.loss_mask), f"{kind} log-probs of {sample_id}"
    values = np.where(np.array(completion.loss_mask, dtype=bool), values, np.float32(0))
    if not np.isfinite(values).all():
        raise InvariantError(f"sample {sample_id}: {kind} log-prob of completion token "
                             f"{int(np.flatnonzero(~np.isfinite(values))[0])} is not finite")
    return np.concatenate([np.zeros(len(prompt.token_ids), dtype=np.float32), values])


def _weighted(samples: Sequence[TrainingSample], reduction: str, max_length: int) -> list[TrainingSample]:
    """The N samples of one update with their final weights (float64), which nothing divides again."""
    lengths_N = np.array([int(sample.loss_mask.sum()) for sample in samples])
    weights_N = token_weights(reduction, lengths_N, max_length)
    # where, not a product: the weight of an empty sequence need not be a number.
    weights = [np.where(sample.loss_mask, weight, 0.0) for sample, weight in zip(samples, weights_N, strict=True)]
    return [replace(sample, policy_weight=weight_S, kl_weight=weight_S)
            for sample, weight_S in zip(samples, weights, strict=True)]


def _balance(ordered: Sequence[TrainingSample], num_ranks: int) -> list[list[TrainingSample]]:
    """Each sample to the rank with the fewest tokens, the lowest of several; keeps the order within a rank."""
    ranks: list[list[TrainingSample]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for sample in ordered:
        rank = loads.index(min(loads))
        ranks[rank].append(sample)
        loads[rank] += len(sample.token_ids)
    return ranks


def _fill(ordered: Sequence[TrainingSample], micro_batch_tokens: int) -> list[MicroBatch]:
    """Micro-batches of consecutive samples, longest first: the first sample of one decides how many fit."""
    batches: list[MicroBatch] = []
    start = 0
    while start < len(ordered):
        count = micro_batch_tokens // len(ordered[start].token_ids)
        batches.append(tuple(ordered[start:start + count]))
        start += count
    return batches


def _extend(batches: list[MicroBatch], count: int, padding: MicroBatch) -> list[MicroBatch]:
    """`count` micro-batches: the fullest is halved as long as it can be, then padding follows."""
    batches = list(batches)
    while len(batches) < count:
        fullest = max(range(len(batches)), key=lambda i: len(batches[i]), default=None)
        if fullest is None or len(batches[fullest]) == 1:
            batches.append(padding)
        else:
            batch, half = batches[fullest], len(batches[fullest]) // 2
            batches[fullest:fullest + 1] = [batch[:half], batch[half:]]
    return batches


def _without_loss(sample: TrainingSample) -> TrainingSample:
    zeros_S = np.zeros(len(sample.token_ids))
    step, draw, _ = sample.sample_id
    return replace(sample, sample_id=(step, draw, PADDING_INDEX), loss_mask=np.zeros(len(zeros_S), dtype=bool),
                   advantage=0.0, policy_weight=zeros_S, kl_weight=zeros_S)
