"""Define the section of the objective: advantages, surrogate, corrections, and the reduction of token losses."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from frpo.config.base import Section
from frpo.objectives.base import (
    SURROGATES,
    AdvantageEstimator,
    Surrogate,
    build_estimator,
    build_surrogate,
    estimator_of,
)
from frpo.objectives.constraint import Constraint, Mixture
from frpo.objectives.correction import RolloutCorrection
from frpo.objectives.kl_control import KLControl
from frpo.objectives.scalarise import SCALARISERS, Scalariser
from frpo.objectives.stage import require_reweightable
from frpo.objectives.trial import try_estimator
from frpo.types import ScoredGroup


class ObjectiveSection(Section):
    advantage: AdvantageEstimator = Field(
        default_factory=lambda: build_estimator({"name": "frpo"}),
        description="advantage estimator: {name: frpo|grpo|dr_grpo|rloo|module:Class, ...its own keys}")
    reweight: Literal["frozen", "current"] = Field(
        "frozen", description="frozen: advantages come from the rewards alone; current: they are computed again before "
                              "every update, with the policy's ratios since the rollout (exact off-policy FRPO)")
    surrogate: Surrogate = Field(
        default_factory=lambda: build_surrogate({"name": "clip"}),
        description="surrogate: {name: clip|gspo|cispo|reinforce|module:Class, ...its own keys}")
    correction: RolloutCorrection | None = Field(
        RolloutCorrection(), description="importance weights that correct for differences between rollout engine and "
                                         "learner; null: none")
    scalarise: Scalariser | None = Field(
        None, description="number that several rewards become before the advantage: {name: gdpo|rvpo|module:Class, "
                          "...its own keys}; null: their weighted sum")
    constraint: Constraint | None = Field(
        None, description="keep a cost under a limit by a Lagrange multiplier; a mapping such as {cost: cost, "
                          "threshold: 0.0}; null: no limit")
    kl_coef: float = Field(
        0.0, ge=0, description="weight of the KL to the reference (beta); 0: the reference is not run for it")
    kl_estimator: Literal["k1", "k2", "k3", "full"] = Field(
        "k3", description="k1: subtracted from the rewards; k2, k3: in the loss, from sampled tokens; full: in the "
                          "loss, exact over the vocabulary")
    kl_control: KLControl | None = Field(
        None, description="adjust kl_coef so that the KL of a completion to the reference stays at a target; a mapping "
                          "such as {target: 0.8}; null: kl_coef is constant")
    reduction: Literal["seq-mean-token-mean", "seq-sum", "token-mean", "fixed-length"] = Field(
        "seq-mean-token-mean", description="how the token losses of an update become one number, over all ranks. "
                                           "token-mean: mean of all tokens; seq-mean-token-mean: mean over sequences "
                                           "of their token means; seq-sum: mean over sequences of their token sums; "
                                           "fixed-length: as seq-sum, divided by rollout.max_new_tokens")
    truncated: Literal["train", "mask"] = Field(
        "train", description="completions that the length limit cuts off. train: they have a loss like others; mask: "
                             "they have no loss, but still count in means")

    @field_validator("advantage", mode="plain")
    @classmethod
    def _build_estimator(cls, value: Any) -> AdvantageEstimator:
        return estimator_of(value)

    @field_validator("scalarise", mode="plain")
    @classmethod
    def _build_scalariser(cls, value: Any) -> Scalariser | None:
        if value is None or (given := SCALARISERS.given(value)) is not None:
            return None if value is None else given
        described = {"name": value} if isinstance(value, str) else value
        if not isinstance(described, dict):
            raise ValueError(f"a name such as gdpo, or a mapping, is needed, given {value!r}")
        return SCALARISERS.build(described)

    @field_validator("surrogate", mode="plain")
    @classmethod
    def _build_surrogate(cls, value: Any) -> Surrogate:
        if (given := SURROGATES.given(value)) is not None:
            return given
        if not isinstance(value, dict):
            raise ValueError(f"a mapping such as {{name: clip, clip_high: 0.28}} is needed, given {value!r}")
        return build_surrogate(value)

    def notes(self, group_size: int) -> list[str]:
        """Return notes about settings that are allowed and known to work badly.

        Raises ValueError if an advantage estimator fails on made-up groups of this size.
        """
        found = try_estimator(self.advantage, group_size)
        if self.scalarise is not None:
            found = []  # its numbers need not be rewards
        return found if self.constraint is None else [
            *found, *try_estimator(self.constraint.advantage, group_size), *self.constraint.notes()]

    def after_batch(self, controllers: Mapping[str, float], drawn: Sequence[ScoredGroup]) -> Mapping[str, float]:
        """Return the controllers with the multiplier moved by the costs of a batch; unchanged without a constraint."""
        if self.constraint is None:
            return controllers
        return self.constraint.after(controllers, self.constraint.measure(drawn, controllers))

    def mixture(self, controllers: Mapping[str, float]) -> Mixture | None:
        """Return the mixture of rewards and costs at the multiplier of these controllers; None without a constraint."""
        return None if self.constraint is None else self.constraint.mixture(controllers)

    def kl_in_reward(self, kl_coef: float) -> float:
        """Return beta if the KL is subtracted from the rewards, 0 if the KL is in the loss."""
        return kl_coef if self.kl_estimator == "k1" else 0.0

    @property
    def scores_reference(self) -> bool:
        """Whether the reference's log-probs of sampled tokens are needed before the first update of a batch."""
        return self.kl_coef > 0 and self.kl_estimator != "full"

    def watches(self, columns: Mapping[str, Any]) -> bool:
        """Return whether a prompt with these columns counts in the mean KL of a sequence."""
        return self.kl_control is None or self.kl_control.watches(columns)

    @model_validator(mode="after")
    def _unit_of_kl(self) -> ObjectiveSection:
        if self.scalarise is not None and self.kl_coef > 0 and self.kl_estimator == "k1":
            raise ValueError("kl_estimator: k1 subtracts the KL from rewards, but scalarise removes their unit; set "
                             "kl_estimator to k3 or full, or scalarise to null")
        return self

    @model_validator(mode="after")
    def _kl(self) -> ObjectiveSection:
        if self.kl_control is not None and self.kl_coef == 0:
            raise ValueError("kl_control multiplies kl_coef, so it needs a first value above 0, given kl_coef = 0; set "
                             "kl_coef to a value such as 0.1")
        whole = self.surrogate.whole_sequences or (self.correction is not None and self.correction.whole_sequences)
        if self.kl_estimator == "full" and whole:
            raise ValueError(f"kl_estimator: full works token by token, but surrogate {self.surrogate.name} or the "
                             "correction works on whole sequences; use k2 or k3, or a surrogate such as "
                             "clip with correction.level: token")
        return self

    @model_validator(mode="after")
    def _reweighting(self) -> ObjectiveSection:
        if self.reweight == "frozen":
            return self
        estimators = {"advantage": self.advantage} | (
            {"constraint.advantage": self.constraint.advantage} if self.constraint else {})
        for key, estimator in estimators.items():
            try:
                require_reweightable(estimator)
            except ValueError as error:
                raise ValueError(f"reweight: current does not work with this {key}: {error}") from error
        if self.surrogate.name != "reinforce":
            raise ValueError("reweight: current has the ratios in its advantages already, given surrogate "
                             f"{self.surrogate.name}; set surrogate to {{name: reinforce}}")
        return self
