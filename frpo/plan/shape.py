"""The numbers of a model on which its memory depends. `counting` finds them; a test can write them down."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """parameters: of the whole model, a tied one once. layers: parameters of every decoder layer.

    largest: parameters of the largest tensor. largest_module: of the largest module, without those inside it.
    width: of hidden states. inner: width of the MLP, of all experts that a token goes through. gated: whether the MLP
    multiplies two of them. head_norms: whether queries and keys are normalised. adapted: inputs + outputs of every
    linear layer that has an adapter, or would have one.
    """

    parameters: int
    largest: int
    largest_module: int
    layers: tuple[int, ...]
    vocabulary: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    gated: bool
    head_norms: bool
    adapted: tuple[int, ...]

    @property
    def queries(self) -> int:
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_size
