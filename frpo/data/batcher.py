"""Advantaged groups to the samples of each optimizer update, with token weights that are divided once and for all.

A sample's weights depend on the samples of its update only, never on how `layout` spreads them over ranks and
micro-batches. Does not compute advantages, build tensors or talk to a learner.

Legend: N samples of an update, S tokens of a sample (prompt and completion).
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from frpo.data.layout import Layout, lay_out
from frpo.errors import InvariantError
from frpo.objectives.reduction import token_weights
from frpo.types import (
    AdvantagedGroup,
    Completion,
    Prompt,
    RankBatches,
    RolloutGroup,
    SampleId,
    TrainingSample,
)


def pack(groups: Sequence[AdvantagedGroup], layout: Layout, *, reduction: str, max_length: int,
         old_logprobs: Sequence[tuple[np.ndarray, ...] | None] | None = None, train_truncated: bool = True
         ) -> RankBatches:
    """The samples of one optimizer update, laid out.

    reduction, max_length: see `token_weights`; N are the samples of these groups.
    old_logprobs: per group and completion, T log-probs under the policy before the first update; None where that is the
    policy of this update. train_truncated: if False, completions cut off by the length limit have no loss; they still
    count in N.
    Raises ConfigError for a sample that does not fit, InvariantError for values not finite.
    """
    old = [None] * len(groups) if old_logprobs is None else old_logprobs
    samples = [sample for group, old_G in zip(groups, old, strict=True)
               for sample in _training_samples(group, old_G, train_truncated)]
    assert len({sample.sample_id for sample in samples}) == len(samples), "sample ids repeat within an update"
    return lay_out(_weighted(samples, reduction, max_length), layout)


def score_batches(groups: Sequence[RolloutGroup], layout: Layout) -> RankBatches:
    """`[rank][i]` micro-batches of all completions for a pass without gradients, such as reference log-probs.

    Samples have no advantage and no weight; skip those with `is_padding` when reading results.
    """
    return lay_out([_sample(group, index) for group in groups for index in range(len(group.completions))], layout)


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
