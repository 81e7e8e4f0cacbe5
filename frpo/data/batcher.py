"""Groups or examples to the samples of each optimizer update, with token weights that are divided once and for all.

A sample's weights depend on the samples of its update only, never on how `layout` spreads them over ranks and
micro-batches. Does not compute advantages, build tensors or talk to a learner.

Legend: N samples of an update, S tokens of a sample (prompt and completion).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from frpo.data.layout import Layout, lay_out
from frpo.errors import InvariantError
from frpo.objectives.reduction import token_weights
from frpo.types import AdvantagedGroup, Example, RankBatches, RolloutGroup, SupervisedSample, TrainingSample

LARGEST_ADVANTAGE = float(np.finfo(np.float32).max)
"""The loss is computed in float32."""


def pack(groups: Sequence[AdvantagedGroup], layout: Layout, *, reduction: str, max_length: int,
         old_logprobs: Sequence[tuple[np.ndarray, ...] | None] | None = None, train_truncated: bool = True,
         watched: Callable[[Mapping[str, Any]], bool] = lambda columns: True) -> RankBatches:
    """The samples of one optimizer update, laid out.

    reduction, max_length: see `token_weights`; N are the samples of these groups.
    old_logprobs: per group and completion, T log-probs under the policy before the first update; None where that is the
    policy of this update. train_truncated: if False, completions cut off by the length limit have no loss; they still
    count in N. watched: by a prompt's columns, whether its completions count in the mean KL of a sequence.
    Raises ConfigError for a sample that does not fit, InvariantError for values not finite.
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
    """`[rank][i]` micro-batches of all completions for a pass without gradients, such as reference log-probs.

    Samples have no advantage and no weight; skip those with `is_padding` when reading results.
    """
    return lay_out([_sample(group, index) for group in groups for index in range(len(group.completions))], layout)


def pack_examples(examples: Sequence[tuple[int, Example]], layout: Layout, *, reduction: str) -> RankBatches:
    """The examples of one supervised update, each with its index in the data set, laid out.

    reduction: see `token_weights`; N are these examples. Raises ConfigError for one that does not fit.
    """
    masks = [np.array(example.loss_mask, dtype=bool) for _, example in examples]
    weights = token_weights(reduction, np.array([mask_S.sum() for mask_S in masks]), 1)
    return lay_out([
        SupervisedSample(sample_id=(0, place, index), token_ids=np.array(example.token_ids, dtype=np.int64),
                         loss_mask=mask_S, weight=np.where(mask_S, weight, 0.0))
        for place, ((index, example), mask_S, weight) in enumerate(zip(examples, masks, weights, strict=True))], layout)


def _training_samples(advantaged: AdvantagedGroup, old_logprobs: tuple[np.ndarray, ...] | None,
                      train_truncated: bool, weights: Iterator[float], watched: bool) -> Iterator[TrainingSample]:
    """The samples of a group with advantages, old and reference log-probs, and the next of `weights` each."""
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
    """Prompt and completion as one sequence, with a loss on the completion's own tokens if it `learns`.

    weight: of each token with a loss, which nothing divides again. old, ref: T log-probs of the completion.
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
    """float32 (S): log-probs of a completion behind zeros for its prompt; zero in holes, where none may be known."""
    assert len(logprobs_T) == len(own_S) - start, f"{what}s: {len(logprobs_T)}, tokens: {len(own_S) - start}"
    aligned_S = np.zeros(len(own_S), dtype=np.float32)
    np.copyto(aligned_S[start:], logprobs_T, where=own_S[start:], casting="same_kind")
    if not np.isfinite(aligned_S).all():
        raise InvariantError(f"{what} of completion token {int(np.isfinite(aligned_S).argmin()) - start} is not finite")
    return aligned_S
