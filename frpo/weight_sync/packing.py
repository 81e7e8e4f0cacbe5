"""Packing of a bucket of tensors into one run of bytes, so that one message carries the whole bucket.

A sender packs the bucket; the receiving end unpacks it.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from frpo.weight_sync.protocol import Bucket

ALIGNMENT = 16
"""Alignment in bytes: every tensor begins at a multiple of it, so that the tensor can be viewed in any dtype."""

Layout = list[tuple[str, str, list[int]]]
"""(name, dtype as in "bfloat16", shape) of every tensor, in the order of their bytes. These are plain values for a
message.
"""


def as_layout(tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> Layout:
    """Convert (name, dtype, shape) of every tensor to a Layout."""
    return [(name, str(dtype).removeprefix("torch."), list(shape)) for name, dtype, shape in tensors]


def layout_of(bucket: Bucket) -> Layout:
    return as_layout((name, tensor.dtype, tensor.shape) for name, tensor in bucket)


def packed_size(layout: Layout) -> int:
    """Return the number of bytes of the whole run."""
    return sum(math.ceil(size / ALIGNMENT) * ALIGNMENT for size in map(_size, layout))


def pack(bucket: Bucket, into: torch.Tensor) -> None:
    """Copy the bucket's tensors into (N,) uint8 on any device, N >= packed_size."""
    for (_, tensor), place in zip(bucket, _places(layout_of(bucket), into)):
        place.copy_(tensor.detach().reshape(place.shape))


def unpack(packed: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """Return the tensors by name, as views of (N,) uint8."""
    return {name: place for (name, _, _), place in zip(layout, _places(layout, packed))}


def _places(layout: Layout, packed: torch.Tensor) -> Iterator[torch.Tensor]:
    begin = 0
    for entry in layout:
        _, dtype, shape = entry
        size = _size(entry)
        yield packed[begin:begin + size].view(getattr(torch, dtype)).view(shape)
        begin += math.ceil(size / ALIGNMENT) * ALIGNMENT


def _size(entry: tuple[str, str, Sequence[int]]) -> int:
    _, dtype, shape = entry
    return math.prod(shape) * getattr(torch, dtype).itemsize
