"""The tensors of a model's checkpoint, by name. They are not always the parameters that transformers has in memory.

transformers renames, splits and fuses weights when it loads them (all experts of a layer become one tensor), and undoes
this when it saves. Rollout engines read the tensors of a checkpoint, so a push needs the same tensors, a few weights at
a time. This module gathers, sends and writes nothing.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from frpo.errors import ModelError
from frpo.learner.lora import Weight

Layout = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor in a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Tensors of a checkpoint and the weights that they come from; one weight and one tensor in most cases.

    skeleton: the model without storage, whose conversions are undone; None where a weight is stored as it is.
    """

    weights: tuple[Weight, ...]
    layout: tuple[Layout, ...]
    skeleton: PreTrainedModel | None

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Return (name, tensor) in the order of `layout`. All parameters of `weights` must be whole."""
        values = {weight.name: weight.value() for weight in self.weights}
        if self.skeleton is not None:
            values = revert_weight_conversion(self.skeleton, values)
        return [(name, values[name]) for name, _, _ in self.layout]


def as_they_are(weights: Sequence[Weight]) -> list[Stored]:
    """Return each weight as one tensor of its own name and shape."""
    return [Stored(weights=(weight,), layout=((weight.name, weight.parameter.dtype, weight.shape),), skeleton=None)
            for weight in weights]


class CheckpointForm:
    """Layout of a model's weights in the checkpoint from which the model was loaded.

    Construction is short and needs no values. It raises ModelError where weights cannot be converted in parts.
    """

    def __init__(self, network: PreTrainedModel, weights: Sequence[Weight]):
        with torch.device("meta"):
            self.skeleton = type(network)(deepcopy(network.config))
        if hasattr(network, "_weight_conversions"):
            self.skeleton._weight_conversions = network._weight_conversions
        empty = {weight.name: torch.empty(weight.shape, dtype=weight.parameter.dtype, device="meta")
                 for weight in weights}
        self.groups = _groups(self.skeleton, empty)

    def stored(self, weights: Sequence[Weight]) -> list[Stored]:
        """Return the whole checkpoint, in a fixed order. weights: the same as those of construction."""
        by_name = {weight.name: weight for weight in weights}
        return [Stored(weights=tuple(by_name[name] for name in names), layout=layout,
                       skeleton=None if [name for name, _, _ in layout] == list(names) else self.skeleton)
                for names, layout in self.groups]


def _groups(skeleton: PreTrainedModel, empty: Mapping[str, torch.Tensor]
            ) -> list[tuple[tuple[str, ...], tuple[Layout, ...]]]:
    """Find the smallest sets of weights that become tensors of the checkpoint together. Returns sets and tensors."""
    groups: list[tuple[list[str], set[str]]] = []
    for name, tensor in empty.items():
        names, made = [name], set(revert_weight_conversion(skeleton, {name: tensor}))
        others = []
        for group in groups:
            if group[1] & made:
                names, made = group[0] + names, group[1] | made
            else:
                others.append(group)
        groups = [*others, (names, made)]
    found = [(tuple(names), _layout(skeleton, {name: empty[name] for name in names})) for names, _ in groups]
    together, apart = _layout(skeleton, empty), [entry for _, layout in found for entry in layout]
    if sorted(apart, key=lambda entry: entry[0]) != sorted(together, key=lambda entry: entry[0]):
        raise ModelError(f"{type(skeleton).__name__}: transformers converts its weights to the checkpoint's form only "
                         "all at once; frpo sends them in parts, so it cannot train this model family")
    return found


def _layout(skeleton: PreTrainedModel, empty: Mapping[str, torch.Tensor]) -> tuple[Layout, ...]:
    return tuple((name, tensor.dtype, tuple(tensor.shape))
                 for name, tensor in revert_weight_conversion(skeleton, dict(empty)).items())
