"""Conversion of training samples into the tensors of one micro-batch, packed or padded.

Weights arrive divided already; this module does not normalise. Loss positions are selected by flat indices. Padding and
other sequences of the pack therefore never enter a loss.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from frpo.types import AnySample, MicroBatch, PairSample, sequence_lengths


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """B rows of L tokens and the N loss positions among them.

    Packed: one row without padding. Position ids restart at every sequence. `bounds` holds the start of each sequence,
    and L, for variable-length attention. The mask is all ones; otherwise transformers would look for sequences itself.
    Padded: one row per sequence, padded on the right, with a mask.
    lengths: tokens of each sequence.
    row_N, column_N: the hidden state at [row, column] predicts token target_N (the token at column + 1). For the
    answers of a pair it is the hidden state of their last token, whose score is read.
    sequence_N: the sequence of the micro-batch to which a loss position belongs.
    """

    token_ids_BL: torch.Tensor
    attention_mask_BL: torch.Tensor
    position_ids_BL: torch.Tensor | None
    bounds: torch.Tensor | None
    lengths: tuple[int, ...]
    row_N: torch.Tensor
    column_N: torch.Tensor
    target_N: torch.Tensor
    sequence_N: torch.Tensor


def collate(samples: Sequence[AnySample], pad_id: int, device: torch.device, *, packed: bool) -> TokenBatch:
    """Lay out the token ids of `samples` and index their loss positions, in order of sample, then position."""
    tokens, masks = (_sequences(samples, name) for name in ("token_ids", "loss_mask"))
    lengths = np.array([len(sequence) for sequence in tokens])
    positions = [np.flatnonzero(mask) for mask in masks]
    before = 0 if isinstance(samples[0], PairSample) else 1
    assert not before or all(not mask[0] for mask in masks), "nothing predicts the first token of a sequence"
    sequences = np.repeat(np.arange(len(tokens)), [len(found) for found in positions])
    if packed:
        token_ids = np.concatenate(tokens)[None]
        position_ids = np.concatenate([np.arange(length) for length in lengths])[None]
        starts = np.cumsum(lengths) - lengths
        rows, columns = np.zeros_like(sequences), np.concatenate(positions) + starts[sequences]
        attention = np.ones_like(token_ids)
        bounds = torch.as_tensor(np.append(starts, lengths.sum()), dtype=torch.int32, device=device)
    else:
        token_ids = np.full((len(tokens), lengths.max()), pad_id, dtype=np.int64)
        for row, sequence in enumerate(tokens):
            token_ids[row, :lengths[row]] = sequence
        rows, columns = sequences, np.concatenate(positions)
        attention, position_ids, bounds = np.arange(lengths.max()) < lengths[:, None], None, None

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(array, dtype=torch.int64, device=device)

    return TokenBatch(
        token_ids_BL=tensor(token_ids), attention_mask_BL=tensor(attention),
        position_ids_BL=None if position_ids is None else tensor(position_ids), bounds=bounds,
        lengths=tuple(lengths.tolist()), row_N=tensor(rows), column_N=tensor(columns - before),
        target_N=tensor(token_ids[rows, columns]), sequence_N=tensor(sequences))


def _sequences(samples: Sequence[AnySample], name: str) -> list[np.ndarray]:
    """Return the per-token array `name` of every sequence of the samples."""
    return [part for sample in samples
            for part in np.split(getattr(sample, name), np.cumsum(sequence_lengths(sample))[:-1])]


def loss_positions(samples: Sequence[AnySample], name: str, device: torch.device) -> torch.Tensor | None:
    """Return float32 (N): the per-token array `name` of all samples at their loss positions, in the order of `collate`.

    None where the samples have no such array.
    """
    if getattr(samples[0], name) is None:
        return None
    values = [getattr(sample, name)[sample.loss_mask] for sample in samples]
    return torch.as_tensor(np.concatenate(values), dtype=torch.float32, device=device)


def per_sample(samples: MicroBatch, value: np.ndarray, dtype: type = np.float64) -> list[np.ndarray]:
    """Scatter flat values of loss positions back. Returns one array over all tokens per sample.

    The arrays are zero outside the loss positions.
    """
    result: list[np.ndarray] = []
    start = 0
    for sample in samples:
        count = int(sample.loss_mask.sum())
        full: np.ndarray = np.zeros(len(sample.token_ids), dtype=dtype)
        full[sample.loss_mask] = value[start:start + count]
        result.append(full)
        start += count
    return result
