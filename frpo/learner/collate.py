"""Training samples into the padded tensors of one micro-batch.

Weights arrive divided already; nothing here normalises, and padding never enters a loss: loss positions are picked out
as flat indices.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from frpo.types import MicroBatch


@dataclass(frozen=True, kw_only=True)
class PaddedBatch:
    """B sequences padded on the right to L; the N loss positions of all of them as flat arrays.

    row_N, column_N: logits at [row, column] predict token target_N (the token at column + 1).
    """

    token_ids_BL: torch.Tensor
    attention_mask_BL: torch.Tensor
    row_N: torch.Tensor
    column_N: torch.Tensor
    target_N: torch.Tensor


def collate(samples: MicroBatch, pad_id: int, device: torch.device) -> PaddedBatch:
    """Pad the token ids of `samples` and index their loss positions, in order of sample, then position."""
    lengths = [len(sample.token_ids) for sample in samples]
    token_ids = np.full((len(samples), max(lengths)), pad_id, dtype=np.int64)
    attention = np.zeros(token_ids.shape, dtype=np.int64)
    for row, (sample, length) in enumerate(zip(samples, lengths)):
        token_ids[row, :length] = sample.token_ids
        attention[row, :length] = 1
    rows = np.concatenate([np.full(int(s.loss_mask.sum()), row) for row, s in enumerate(samples)])
    positions = np.concatenate([np.flatnonzero(sample.loss_mask) for sample in samples])

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(array, dtype=torch.int64, device=device)

    return PaddedBatch(
        token_ids_BL=tensor(token_ids), attention_mask_BL=tensor(attention), row_N=tensor(rows),
        column_N=tensor(positions - 1), target_N=tensor(token_ids[rows, positions]))


def loss_positions(samples: MicroBatch, name: str, device: torch.device) -> torch.Tensor:
    """float32 (N): the per-token array `name` of all samples at their loss positions, in the order of `collate`."""
    values = [getattr(sample, name)[sample.loss_mask] for sample in samples]
    return torch.as_tensor(np.concatenate(values), dtype=torch.float32, device=device)


def per_sample(samples: MicroBatch, value: np.ndarray, dtype: type = np.float64) -> list[np.ndarray]:
    """Scatter flat loss-position values back: one array over all tokens a sample, zero outside its loss positions."""
    result, start = [], 0
    for sample in samples:
        count = int(sample.loss_mask.sum())
        full = np.zeros(len(sample.token_ids), dtype=dtype)
        full[sample.loss_mask] = value[start:start + count]
        result.append(full)
        start += count
    return result
