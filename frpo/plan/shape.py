"""Define the numbers of a model on which its memory depends. `counting` computes them; a test can set them by hand."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """parameters: number in the whole model; a tied tensor counts once. layers: parameters of every decoder layer.

    largest: parameters of the largest tensor. largest_module: parameters of the largest module, without its submodules.
    width: width of hidden states. inner: width of the MLP, for all experts of a token. gated: whether the MLP
    multiplies two inner states. head_norms: whether queries and keys are normalised. adapted: inputs + outputs of every
    linear layer that has an adapter, or would have an adapter with LoRA.
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
