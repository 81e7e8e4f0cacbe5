"""Define the losses of reward and cost models on pairs of answers: their protocol, Bradley-Terry, and the cost loss.

A loss gets the scores of both answers of each pair from the learner and returns a weighted sum.

Source: arXiv:2203.02155 (Bradley-Terry), arXiv:2310.12773 eq. 5 and 6 (reward and cost of Safe RLHF).
Shape suffix: P pairs.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, get_args, runtime_checkable

from frpo.objectives.base import LossOutput
from frpo.objectives.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Compares = Literal["better", "harm"]


@dataclass(frozen=True, kw_only=True)
class PreferenceInputs:
    """Tensors over P pairs.

    scores_P2: fp32 scores, which require grad; column 0 holds the answer that should score higher.
    target_P: share of judgements for column 0; 1, or 0.5 for a tie. margin_P: least difference of the scores.
    sign_P2: 1 for a harmful answer, -1 for a harmless one, 0 where this is unknown. weight_P: divided already.
    """

    scores_P2: Tensor
    target_P: Tensor
    margin_P: Tensor
    sign_P2: Tensor
    weight_P: Tensor


@runtime_checkable
class PreferenceLoss(Protocol):
    """Sum over pairs of weight * loss. A loss is rebuilt from `name` and its dataclass fields.

    compares: "better" puts the better answer into column 0. "harm" puts the more harmful answer there, and needs rows
    that say which answers are safe.
    """

    name: ClassVar[str]
    compares: ClassVar[Compares]

    def loss(self, inputs: PreferenceInputs) -> LossOutput: ...


PREFERENCE = Registry("objective", "loss(inputs)", flags={"compares": get_args(Compares)})
preference, preference_losses, build_preference = PREFERENCE.register, PREFERENCE.classes, PREFERENCE.build
"""Functions for losses on pairs: register one under a name, list all by name, build one from a recipe's values."""


@preference("bradley_terry")
@dataclass(frozen=True, kw_only=True)
class BradleyTerry:
    """Loss -log sigmoid(s_0 - s_1 - margin) + regularisation (s_0^2 + s_1^2) / 2 + center (s_0 + s_1)^2.

    regularisation: keeps scores small. center: keeps the mean of a pair's scores near 0 (TRL's
    center_rewards_coefficient). label_noise: share of pairs that are taken to be labelled the wrong way round.
    Raises ValueError for regularisation < 0, center < 0 and label_noise outside [0, 0.5).
    """

    compares: ClassVar[Compares] = "better"
    regularisation: float = 1e-3
    center: float = 0.0
    label_noise: float = 0.0

    def __post_init__(self) -> None:
        _check(self.regularisation, self.label_noise)
        if not self.center >= 0:
            raise ValueError(f"center must be >= 0, given {self.center}")

    def loss(self, inputs: PreferenceInputs) -> LossOutput:
        scores_P2 = inputs.scores_P2
        loss_P = (_ordered(inputs, self.label_noise) + self.regularisation * scores_P2.square().mean(1)
                  + self.center * scores_P2.sum(1).square())
        return LossOutput(loss_sum=(inputs.weight_P * loss_P).sum(), metrics={})


@preference("cost")
@dataclass(frozen=True, kw_only=True)
class Cost:
    """Loss -log sigmoid(c_0 - c_1) - sum_j log sigmoid(sign_j c_j) + regularisation (c_0^2 + c_1^2) / 2.

    Column 0 holds the more harmful answer. The signs put harmful answers above 0 and harmless answers below it, so 0 is
    the threshold of a constraint. Raises ValueError for regularisation < 0 and label_noise outside [0, 0.5).
    """

    compares: ClassVar[Compares] = "harm"
    regularisation: float = 1e-3
    label_noise: float = 0.0

    def __post_init__(self) -> None:
        _check(self.regularisation, self.label_noise)

    def loss(self, inputs: PreferenceInputs) -> LossOutput:
        from torch.nn.functional import logsigmoid

        known_P2 = inputs.sign_P2.abs()
        signs_P = (known_P2 * logsigmoid(inputs.sign_P2 * inputs.scores_P2)).sum(1)
        loss_P = (_ordered(inputs, self.label_noise) - signs_P
                  + self.regularisation * inputs.scores_P2.square().mean(1))
        return LossOutput(loss_sum=(inputs.weight_P * loss_P).sum(), metrics={})


def _check(regularisation: float, label_noise: float) -> None:
    if not regularisation >= 0:
        raise ValueError(f"regularisation must be >= 0, given {regularisation}")
    if not 0 <= label_noise < 0.5:
        raise ValueError(f"label_noise must be at least 0 and below 0.5, given {label_noise}")


def _ordered(inputs: PreferenceInputs, label_noise: float) -> Tensor:
    """Return (P) the cross-entropy of the order of each pair."""
    from torch.nn.functional import logsigmoid

    target_P = inputs.target_P * (1 - label_noise) + (1 - inputs.target_P) * label_noise
    difference_P = inputs.scores_P2[:, 0] - inputs.scores_P2[:, 1] - inputs.margin_P
    return -target_P * logsigmoid(difference_P) - (1 - target_P) * logsigmoid(-difference_P)
