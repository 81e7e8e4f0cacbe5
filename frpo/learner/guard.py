"""Comparison of a model in the learner with the same model in plain transformers: packed, padded, repeated.

"Plain" means the network's own logits of one sequence at a time, by its own eager attention. The controller chooses the
sequences and refuses models (`frpo.run.checks`).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from frpo.errors import FrpoError
from frpo.kernels import linear_logprobs
from frpo.learner.attention import arrangement
from frpo.learner.collate import TokenBatch
from frpo.learner.collective import is_of_a_collective
from frpo.learner.losses import head_options
from frpo.learner.network import ScoreHead, TokenModel, scores_of, token_model
from frpo.types import Comparison, Gap, SupervisedSample


def compare(name: str, network: torch.nn.Module, sequences: Sequence[Sequence[int]],
            collate: Callable[[Sequence[SupervisedSample]], TokenBatch]) -> Comparison:
    """Compare log-probs of `sequences` under `network`, a TokenModel or DeepSpeed's engine around one. Collective.

    Of a reward model, compare the scores of all tokens, in units of their standard deviation.
    sequences: token ids, at least two each. collate: lays samples out as in training.
    """
    model = token_model(network)
    samples = [_sample(index, ids) for index, ids in enumerate(sequences)]
    batch = collate(samples)
    scores = isinstance(model.head, ScoreHead)
    facts = {"model": name, "values": "scores" if scores else "log-probabilities", "packed": batch.bounds is not None,
             "layers": model.network.config.get_text_config().num_hidden_layers}
    fails_alone = True
    with torch.no_grad():
        try:
            with _eager_attention(model.network):
                plain = [_plain_logprobs(network, collate([sample])) for sample in samples]
                other = _plain_logprobs(network, collate([_sample(0, _with_another_end(model, sequences[-1]))]))
            alone = np.concatenate([_logprobs(network, model, collate([sample])) for sample in samples])
            fails_alone = False
            together = _logprobs(network, model, batch)
            arranged = arrangement()
            assert arranged is not None  # set by the pass before
            apart = len(arranged.layers)
            repeated = _logprobs(network, model, batch)
        except (FrpoError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # any error of the model's own code on inputs that it cannot take
            if is_of_a_collective(error):
                raise
            return Comparison(**facts, failure=f"{type(error).__name__}: {error}".splitlines()[0],
                              fails_alone=fails_alone)
    last, plain = plain[-1], np.concatenate(plain)
    unit = plain.std() if scores else 1.0
    return Comparison(**facts, layers_apart=apart, together=_gap(together, plain, unit), alone=_gap(alone, plain, unit),
                      repeated=_gap(repeated, together, unit), before=_gap(other[:-1], last[:-1], unit))


def _sample(index: int, token_ids: Sequence[int]) -> SupervisedSample:
    """Make a sample in which all tokens but the first are predicted."""
    learned = np.arange(len(token_ids)) > 0
    return SupervisedSample(sample_id=(0, 0, index), token_ids=np.array(token_ids), loss_mask=learned,
                            weight=learned.astype(np.float64))


def _with_another_end(model: TokenModel, token_ids: Sequence[int]) -> list[int]:
    """Change the last token. A causal model gives the same log-probs to all tokens but the last."""
    return [*token_ids[:-1], (token_ids[-1] + 1) % model.network.config.get_text_config().vocab_size]


def _logprobs(network: torch.nn.Module, model: TokenModel, batch: TokenBatch) -> np.ndarray:
    head = model.head

    def of_head(hidden_ND: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
        if isinstance(head, ScoreHead):
            return scores_of(hidden_ND, head_VD)
        return linear_logprobs(hidden_ND, head_VD, batch.target_N, **head_options(head.scale))[0]

    return network(batch, of_head).double().cpu().numpy()


def _plain_logprobs(network: torch.nn.Module, batch: TokenBatch) -> np.ndarray:
    """Return log-probs of a batch that holds one sequence, from the network's own logits; or its own scores."""
    logits_LV = network(batch, None)[0, :-1].double()
    if isinstance(token_model(network).head, ScoreHead):
        return logits_LV[:, 0].cpu().numpy()
    return logits_LV.log_softmax(-1).gather(1, batch.target_N[:, None])[:, 0].cpu().numpy()


@contextmanager
def _eager_attention(network: PreTrainedModel) -> Iterator[None]:
    """Use the family's own eager attention within the context, if the family lets attention be chosen."""
    if not network._can_set_attn_implementation():
        yield
        return
    chosen = network.config._attn_implementation
    network.set_attn_implementation("eager")
    try:
        yield
    finally:
        network.set_attn_implementation(chosen)


def _gap(one: np.ndarray, other: np.ndarray, unit: float = 1.0) -> Gap:
    """Return mean and maximum of the absolute difference, in `unit`s. NaN counts as an infinite difference."""
    difference = np.nan_to_num(np.abs(one - other) / unit, nan=np.inf)
    return (float(difference.mean()), float(difference.max())) if difference.size else (0.0, 0.0)
