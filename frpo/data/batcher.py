"""Turn groups or examples into the samples of each optimizer update, with token weights that are already divided.

A sample's weights depend only on the samples of its update, never on how `layout` spreads them over ranks and
micro-batches. This module does not compute advantages, build tensors or call a learner.

Legend: N samples of an update, S tokens of a sample (prompt and completion).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from frpo.data.layout import Layout, lay_out
from frpo.errors import InvariantError
from frpo.objectives.reduction import token_weights
from frpo.types import (
    AdvantagedGroup,
    Example,
    Pair,
    PairSample,
    RankBatches,
    RolloutGroup,
    SupervisedSample,
    TrainingSample,
)

LARGEST_ADVANTAGE = float(np.finfo(np.float32).max)
"""Largest absolute advantage, since the loss is computed in float32."""


def pack(groups: Sequence[AdvantagedGroup], layout: Layout, *, reduction: str, max_length: int,
         old_logprobs: Sequence[tuple[np.ndarray, ...] | None] | None = None, train_truncated: bool = True,
         watched: Callable[[Mapping[str, Any]], bool] = lambda columns: True) -> RankBatches:
    """Build and lay out the samples of one optimizer update.

    reduction, max_length: see `token_weights`; N is the number of samples of these groups.
    old_logprobs: per group and completion, T log-probs under the policy before the first update; None if that policy
    is the policy of this update. train_truncated: if False, completions cut off by the length limit have no loss, but
    still count in N. watched: function of a prompt's columns; if true, the prompt's completions count in the mean KL
    of a sequence. Raises ConfigError for a sample that does not fit, InvariantError for values that are not finite.
    """
    old = [None] * len(groups) if old_logprobs is None else old_logprobs
    lengths_N = np.array([int(completion.loss_mask.sum()) if train_truncated or not completion.truncated else 0
                          for group in groups for completion in group.scored.group.completions])
    weights = iter(token_weights(reduction, lengths_N, max_length).tolist())
    samples = [sample for group, old_G in zip(groups, old, strict=True)
               for sample in _training_samples(group, old_G, train_truncated, weights,
                                               watched(group.scored.group.prompt.columns))]
    assert len({sample.sample_id for sample in samples}) == len(samples), "sample ids repeat within an update"
    return lay_out(samples, layout)


def score_batches(groups: Sequence[RolloutGroup], layout: Layout) -> RankBatches:
    """Lay out all completions as `[rank][i]` micro-batches for a pass without gradients, such as reference log-probs.

    Samples have no advantage and no weight. Skip samples with `is_padding` when reading results.
    """
    return lay_out([_sample(group, index) for group in groups for index in range(len(group.completions))], layout)


def pack_examples(examples: Sequence[tuple[int, Example]], layout: Layout, *, reduction: str) -> RankBatches:
    """Lay out the examples of one supervised update, each given with its index in the data set.

    reduction: see `token_weights`; N is the number of examples. Raises ConfigError for an example that does not fit.
    """
    masks = [np.array(example.loss_mask, dtype=bool) for _, example in examples]
    weights = token_weights(reduction, np.array([mask_S.sum() for mask_S in masks]), 1)
    return lay_out([
        SupervisedSample(sample_id=(0, place, index), token_ids=np.array(example.token_ids, dtype=np.int64),
                         loss_mask=mask_S, weight=np.where(mask_S, weight, 0.0))
        for place, ((index, example), mask_S, weight) in enumerate(zip(examples, masks, weights, strict=True))], layout)


def pack_pairs(pairs: Sequence[tuple[int, Pair]], layout: Layout) -> RankBatches:
    """Lay out the pairs of one update, each given with its index in the data set. Every pair has the same weight.

    Raises ConfigError for a pair that does not fit.
    """
    samples = []
    for place, (index, pair) in enumerate(pairs):
        lengths = (len(pair.first), len(pair.second))
        mask_S = np.zeros(sum(lengths), dtype=bool)
        mask_S[[lengths[0] - 1, -1]] = True
        samples.append(PairSample(
            sample_id=(0, place, index), token_ids=np.array([*pair.first, *pair.second], dtype=np.int64),
            lengths=lengths, loss_mask=mask_S, weight=mask_S / len(pairs), target=pair.target, margin=pair.margin,
            signs=pair.signs))
    return lay_out(samples, layout)


def _training_samples(advantaged: AdvantagedGroup, old_logprobs: tuple[np.ndarray, ...] | None,
                      train_truncated: bool, weights: Iterator[float], watched: bool) -> Iterator[TrainingSample]:
    """Yield the samples of a group with advantage, old and reference log-probs, and the next weight of `weights`."""
    group, ref_logprobs = advantaged.scored.group, advantaged.ref_logprobs
    for index, completion in enumerate(group.completions):
        advantage = float(advantaged.advantages_G[index])
        if not abs(advantage) <= LARGEST_ADVANTAGE:
            raise InvariantError(f"sample {(*group.group_id, index)}: advantage {advantage} is not finite in float32, "
                                 "in which the loss is computed; scale the rewards down. (A completion without a "
                                 "reward must get 0 from the advantage estimator.)")
        yield _sample(group, index, advantage=advantage, weight=next(weights),
                      learns=train_truncated or not completion.truncated, watched=watched,
                      old=None if old_logprobs is None else old_logprobs[index],
                      ref=None if ref_logprobs is None else ref_logprobs[index])


def _sample(group: RolloutGroup, index: int, *, advantage: float = 0.0, weight: float = 0.0, learns: bool = True,
            watched: bool = False, old: np.ndarray | None = None, ref: np.ndarray | None = None) -> TrainingSample:
    """Join prompt and completion to one sequence, with a loss on the completion's own tokens if `learns` is true.

    weight: of each token with a loss; nothing divides it again. old, ref: T log-probs of the completion.
    """
    prompt, completion = group.prompt, group.completions[index]
    sample_id, start = (*group.group_id, index), len(prompt.token_ids)
    assert len(completion.loss_mask) == len(completion.token_ids), f"loss mask of sample {sample_id}"
    token_ids_S = np.concatenate([np.array(prompt.token_ids, dtype=np.int64), completion.token_ids])
    own_S = np.zeros(len(token_ids_S), dtype=bool)
    own_S[start:] = completion.loss_mask
    mask_S = own_S if learns else np.zeros_like(own_S)
    weight_S = np.where(mask_S, weight, 0.0)
    share_S = mask_S * (watched / max(1, mask_S.sum()))

    def aligned(logprobs_T: np.ndarray, kind: str) -> np.ndarray:
        return _aligned(logprobs_T, own_S, start, f"sample {sample_id}: {kind} log-prob")

    return TrainingSample(
        sample_id=sample_id, token_ids=token_ids_S, loss_mask=mask_S, advantage=advantage, policy_weight=weight_S,
        kl_weight=weight_S, kl_metric_weight=share_S, rollout_logprobs=aligned(completion.logprobs, "rollout"),
        old_logprobs=None if old is None else aligned(old, "old"),
        ref_logprobs=None if ref is None else aligned(ref, "reference"))


def _aligned(logprobs_T: np.ndarray, own_S: np.ndarray, start: int, what: str) -> np.ndarray:
    """Return float32 (S): zeros for the prompt, then log-probs of the completion.

    Tokens that are not the completion's own have zero too, since their log-probs may be unknown.
    """
    assert len(logprobs_T) == len(own_S) - start, f"{what}s: {len(logprobs_T)}, tokens: {len(own_S) - start}"
    aligned_S = np.zeros(len(own_S), dtype=np.float32)
    np.copyto(aligned_S[start:], logprobs_T, where=own_S[start:], casting="same_kind")
    if not np.isfinite(aligned_S).all():
        raise InvariantError(f"{what} of completion token {int(np.isfinite(aligned_S).argmin()) - start} is not finite")
    return aligned_S
