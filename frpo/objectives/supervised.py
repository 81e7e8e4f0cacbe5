"""Define the losses of supervised fine-tuning: their protocol, plain SFT, and SFT with a KL to the reference.

A loss gets the statistics of response tokens from the learner and returns a weighted sum. Other losses have a file
each, such as `csft`.

Shape suffix: N tokens.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

from frpo.objectives.base import LossOutput
from frpo.objectives.ops import keep
from frpo.objectives.registry import Registry
from frpo.types import Metrics

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SupervisedInputs:
    """Flat tensors over N tokens of given responses, in nats; logprobs, kl and margin may require grad.

    weight_N is already divided, and 0 for a token without a loss. position_N counts the tokens with a loss of one
    example from 0; several spans count as one. The other tensors are None if no reference was run: ref_logprobs_N of
    the same tokens; kl_N = KL(pi || pi_ref) over the vocabulary; margin_N = log pi(a) - log pi(b), with a and b the
    likeliest tokens of reference and policy (or its soft form); agree_N, true if a = b.
    """

    logprobs_N: Tensor
    weight_N: Tensor
    position_N: Tensor
    ref_logprobs_N: Tensor | None = None
    kl_N: Tensor | None = None
    margin_N: Tensor | None = None
    agree_N: Tensor | None = None

    def __post_init__(self) -> None:
        tensors = [getattr(self, f.name) for f in dataclasses.fields(self)]
        shapes = {tuple(tensor.shape) for tensor in tensors if tensor is not None}
        assert len(shapes) == 1, f"all tensors of SupervisedInputs must have one shape, given {shapes}"

    @property
    def live_N(self) -> Tensor:
        return self.weight_N != 0


Argmax = Literal["hard", "soft"]


@dataclass(frozen=True, kw_only=True)
class Margin:
    """Margin that a loss needs.

    argmax: hard compares the likeliest tokens, soft compares the distributions at temperature tau.
    """

    argmax: Argmax = "hard"
    tau: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a training, and its whole length, in epochs and fractions of them. A loss may depend on it."""

    epochs_done: float
    num_epochs: float


@runtime_checkable
class SupervisedLoss(Protocol):
    """Sum over tokens of weight * loss. A token of weight 0 adds exactly 0, even if its numbers are NaN.

    A loss is rebuilt from `name` and its dataclass fields. needs_reference: whether the loss needs the inputs'
    reference statistics. A loss may also have an attribute `margin`: the `Margin` that it needs, if not the hard one.
    """

    name: ClassVar[str]
    needs_reference: ClassVar[bool]

    def loss(self, inputs: SupervisedInputs, progress: Progress) -> LossOutput: ...


SUPERVISED = Registry("objective", "loss(inputs, progress)", flags={"needs_reference": (True, False)})
supervised, supervised_losses, build_supervised = SUPERVISED.register, SUPERVISED.classes, SUPERVISED.build
"""Functions for supervised losses: register one under a name, list all by name, build one from a recipe's values."""


@supervised("sft")
@dataclass(frozen=True, kw_only=True)
class SFT:
    """Loss -log pi(y): plain cross-entropy."""

    needs_reference: ClassVar[bool] = False

    def loss(self, inputs: SupervisedInputs, progress: Progress) -> LossOutput:
        return LossOutput(loss_sum=-(inputs.weight_N * keep(inputs.live_N, inputs.logprobs_N)).sum(), metrics={})


@supervised("kl_sft")
@dataclass(frozen=True, kw_only=True)
class KLSFT:
    """Loss -log pi(y) + kl_coef KL(pi || pi_ref), with the exact KL over the vocabulary at every response token.

    Raises ValueError for kl_coef < 0.
    """

    needs_reference: ClassVar[bool] = True
    kl_coef: float = 0.1

    def __post_init__(self) -> None:
        if not self.kl_coef >= 0:
            raise ValueError(f"kl_coef must be >= 0, given {self.kl_coef}")

    def loss(self, inputs: SupervisedInputs, progress: Progress) -> LossOutput:
        assert inputs.kl_N is not None  # needs_reference
        logprobs_N, kl_N = (keep(inputs.live_N, values_N) for values_N in (inputs.logprobs_N, inputs.kl_N))
        return LossOutput(loss_sum=(inputs.weight_N * (self.kl_coef * kl_N - logprobs_N)).sum(), metrics={})


def supervised_metrics(inputs: SupervisedInputs) -> Metrics:
    """Compute the metrics of every loss: mean cross-entropy per token, and the mean KL if there is a reference."""
    live_N, count = inputs.live_N, inputs.live_N.sum()
    metrics: Metrics = {"sft/nll": (-keep(live_N, inputs.logprobs_N.detach()).sum(), count, "mean")}
    if inputs.kl_N is not None:
        metrics["sft/kl"] = (keep(live_N, inputs.kl_N.detach()).sum(), count, "mean")
    return metrics
