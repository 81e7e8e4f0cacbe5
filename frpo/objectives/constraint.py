"""Hold the cost of the policy under a limit while its reward rises, by a Lagrange multiplier nu and no critic.

Safe RLHF (arXiv:2310.12773) on group advantages. The policy follows the gradient of E r - nu (C - d) over 1 + nu:

    A_i = (A^r_i - nu A^c_i) / (1 + nu),      A^c = -E(-c / s)

c is a reward component of weight 0, d the threshold, s one standard deviation of the cost, E any estimator: RLOO makes
C the mean cost, FRPO with scale "exact" the robust cost lam log E exp(c / lam). After every batch, before its updates,
the multiplier moves by gap = (C - d) / s:

    pi     I <- clip(I + lr gap, 0, max),  nu = clip(kp gap + I, 0, max)
    log    nu <- min(nu exp(lr nu gap), max), as the authors' code

The functions are pure. Their record of floats is kept in the run's state, so that a resumed run continues exactly.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from frpo.objectives.base import AdvantageEstimator, GroupAdvantages, Valued, estimator_of
from frpo.types import ScoredGroup, matches

NU, INTEGRAL, SCALE, STEPS = "nu", "nu_integral", "nu_scale", "nu_steps"
AT_MAX, FLAT_ABOVE, UNJUDGED = "nu_at_max", "nu_flat_above", "nu_unjudged"
PATIENCE = 20
"""Steps in a row after which a constraint that cannot be met is reported."""
UNJUDGED_STEPS = 5
"""Steps in a row without any cost after which the run ends."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Costs of the watched groups of one batch, in units of the cost.

    cost: mean of the groups' values, NaN without any cost. sd: standard deviation of all costs. watched: groups with a
    watched prompt. flat: share of these groups with equal costs. flat_above: share with equal costs above the
    threshold. below: share whose largest cost is more than one sd below the threshold. missing: share of completions
    without a cost.
    """

    cost: float
    sd: float
    watched: int
    flat: float
    flat_above: float
    below: float
    missing: float


class Constraint(BaseModel):
    """A limit on the cost of completions; a section of the recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True,
                              allow_inf_nan=False)

    cost: str = Field(description="name of the reward component that is the cost; its weight must be 0")
    threshold: float = Field(0.0, description="largest allowed cost, in units of the cost")
    where: dict[str, list[Any]] = Field(
        {}, description="constrain only prompts whose column has one of these values, such as {kind: [harmful]}; "
                        "{}: all prompts")
    advantage: AdvantageEstimator = Field(
        default_factory=lambda: estimator_of({"name": "rloo"}),
        description="{name: rloo}: limits the mean cost; {name: frpo, lam: 1.0, scale: exact}: limits the robust cost, "
                    "with lam in standard deviations of the cost")
    rule: Literal["pi", "log"] = Field(
        "pi", description="pi: proportional and integral control; log: gradient ascent on log nu (Safe RLHF)")
    kp: float = Field(1.0, ge=0, description="proportional gain of rule pi")
    lr: float = Field(0.02, ge=0, description="integral gain of rule pi, learning rate of rule log")
    initial: float = Field(1.0, ge=0, description="multiplier before the first step")
    max: float = Field(10.0, gt=0, description="largest multiplier")
    normalise: Literal["first", "none"] | float = Field(
        "first", description="unit of the cost. first: standard deviation of the costs in the first measured step; "
                             "none: 1; or a number above 0")
    missing: Literal["drop", "keep"] = Field(
        "drop", description="watched completions without a cost. drop: they get advantage 0; keep: they keep the "
                            "advantage of their reward")

    @field_validator("advantage", mode="plain")
    @classmethod
    def _build_estimator(cls, value: Any) -> AdvantageEstimator:
        return estimator_of(value)

    @model_validator(mode="after")
    def _can_move(self) -> Constraint:
        scale = getattr(self.advantage, "scale", "exact")
        if scale != "exact":
            raise ValueError(f"advantage: {self.advantage.name} needs scale: exact, given {scale}; other scales change "
                             "the unit of the multiplier")
        if self.advantage.name == "grpo":
            raise ValueError("advantage: grpo divides by the standard deviation of each group, so that the multiplier "
                             "has no fixed unit; use rloo, dr_grpo, or frpo with scale: exact")
        if self.initial > self.max:
            raise ValueError(f"initial = {self.initial:g} is above max = {self.max:g}; lower it or raise max")
        if self.rule == "log" and self.initial == 0:
            raise ValueError("initial = 0 with rule: log stays 0 forever; use rule: pi, or a value such as 1.0")
        if self.lr == 0 and (self.rule == "log" or self.kp == 0):
            raise ValueError(f"lr = 0 with rule: {self.rule} and kp = {self.kp:g} never moves the multiplier; set lr "
                             "above 0, such as 0.02")
        if isinstance(self.normalise, float) and self.normalise <= 0:
            raise ValueError(f"normalise must be first, none or a number above 0, given {self.normalise:g}")
        return self

    def notes(self) -> list[str]:
        """Return a note if the gains are known to oscillate."""
        if self.rule == "log" or self.kp == 0 or self.lr <= self.kp / 25:
            return []
        return [f"note: objective.constraint.lr = {self.lr:g} with kp = {self.kp:g} may oscillate; keep lr at or below "
                f"kp / 25 = {self.kp / 25:g}"]

    def watches(self, columns: Mapping[str, Any]) -> bool:
        """Return whether a prompt with these columns is constrained."""
        return matches(columns, self.where)

    def values(self, groups: Sequence[ScoredGroup], record: Mapping[str, float]) -> list[float]:
        """Return the cost of every watched group that has one: the mean, or the negative of the estimator's objective
        of -cost.
        """
        judged = self._judged(self._watched(groups))
        scale = self._scale(record, judged)
        return [self._value(cost_K, scale) for cost_K in judged]

    def _watched(self, groups: Sequence[ScoredGroup]) -> list[np.ndarray]:
        return [scored.terms[self.cost] for scored in groups if self.watches(scored.group.prompt.columns)]

    def _judged(self, costs: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [cost_K for cost_G in costs if (cost_K := cost_G[np.isfinite(cost_G)]).size]

    def _scale(self, record: Mapping[str, float], judged: Sequence[np.ndarray]) -> float:
        """Return the unit of the cost; as long as it is unknown, the standard deviation of these costs."""
        return self.scale_of(record) or (float(np.concatenate(judged).std()) if judged else 0.0) or 1.0

    def _value(self, cost_K: np.ndarray, scale: float) -> float:
        if isinstance(self.advantage, Valued):
            return -self.advantage.value(-cost_K / scale) * scale
        return float(cost_K.mean())

    def measure(self, groups: Sequence[ScoredGroup], record: Mapping[str, float]) -> Measured:
        """Measure the watched groups among all that a step has drawn, also groups whose costs are equal."""
        costs = self._watched(groups)
        judged = self._judged(costs)
        if not judged:
            return Measured(cost=math.nan, sd=math.nan, watched=len(costs), flat=math.nan, flat_above=math.nan,
                            below=math.nan, missing=1.0 if costs else math.nan)
        pooled, flat = np.concatenate(judged), [np.ptp(cost_K) == 0 for cost_K in judged]
        sd, scale = float(pooled.std()), self._scale(record, judged)
        return Measured(
            cost=float(np.mean([self._value(cost_K, scale) for cost_K in judged])), sd=sd,
            watched=len(costs), flat=float(np.mean(flat)),
            flat_above=float(np.mean([one and cost_K[0] > self.threshold for one, cost_K in zip(flat, judged)])),
            below=float(np.mean([cost_K.max() < self.threshold - sd for cost_K in judged])),
            missing=1 - pooled.size / sum(cost_G.size for cost_G in costs))

    def scale_of(self, record: Mapping[str, float]) -> float:
        """Return the unit of the cost, 0 as long as it is unknown: all costs so far were equal."""
        if self.normalise == "first":
            return record.get(SCALE, 0.0)
        return 1.0 if self.normalise == "none" else float(self.normalise)

    def after(self, record: Mapping[str, float], measured: Measured) -> dict[str, float]:
        """Return the record after a batch with these costs. Without a cost the multiplier stays as it is."""
        before = {NU: self.initial, INTEGRAL: self.initial, STEPS: 0.0} | dict(record)
        if math.isnan(measured.cost):
            return before | {UNJUDGED: before.get(UNJUDGED, 0.0) + 1 if measured.watched else 0.0}
        scale = self.scale_of(record) or measured.sd
        found = before | {UNJUDGED: 0.0, STEPS: before[STEPS] + 1}
        if scale > 0:
            found |= self._moved(before, (measured.cost - self.threshold) / scale) | {SCALE: scale}
        stuck = found[NU] >= self.max and measured.cost > self.threshold
        return found | {AT_MAX: before.get(AT_MAX, 0.0) + 1 if stuck else 0.0,
                        FLAT_ABOVE: before.get(FLAT_ABOVE, 0.0) + 1 if measured.flat_above > 0.5 else 0.0}

    def _moved(self, record: Mapping[str, float], gap: float) -> dict[str, float]:
        if self.rule == "log":
            return {NU: min(self.max, record[NU] * math.exp(min(self.lr * record[NU] * gap, 700.0)))}
        integral = min(self.max, max(0.0, record[INTEGRAL] + self.lr * gap))
        return {INTEGRAL: integral, NU: min(self.max, max(0.0, self.kp * gap + integral))}

    def metrics(self, record: Mapping[str, float], measured: Measured) -> dict[str, float]:
        """Return the `constraint/...` metrics of a step. gap: in units of the scale."""
        scale = self.scale_of(record)
        return {"constraint/nu": record[NU], "constraint/cost": measured.cost, "constraint/scale": scale,
                "constraint/gap": (measured.cost - self.threshold) / scale if scale else math.nan,
                "constraint/watched": float(measured.watched), "constraint/flat": measured.flat,
                "constraint/flat_above": measured.flat_above, "constraint/missing": measured.missing}

    def warnings(self, record: Mapping[str, float], measured: Measured) -> list[str]:
        """Return warnings about a constraint that dilutes itself or cannot be met, each once per occurrence."""
        found, name = [], "objective.constraint"
        if record[STEPS] == 1 and measured.below > 0.5:
            found.append(f"{measured.below:.0%} of the watched prompts cost less than {name}.threshold by more than "
                         f"one standard deviation, for every completion. Such prompts hide costly ones; set {name}."
                         "where to the prompts that matter")
        if record.get(AT_MAX) == PATIENCE:
            found.append(f"{name}: the multiplier is at max = {self.max:g} and the cost {measured.cost:.3g} is above "
                         f"threshold = {self.threshold:g} for {PATIENCE} steps. The constraint may be out of reach: "
                         "raise threshold or max, or lower objective.kl_coef (kl_control.target: raise it)")
        if record.get(FLAT_ABOVE) == PATIENCE:
            found.append(f"{name}: for {PATIENCE} steps most watched groups have equal costs above threshold = "
                         f"{self.threshold:g}, so that no completion of a group is safer than another; raise "
                         "rollout.group_size or rollout.temperature, or fine-tune on safe answers first")
        return found

    def mixture(self, record: Mapping[str, float]) -> Mixture:
        """Return the mixture of reward and cost for a step whose record this is."""
        return Mixture(constraint=self, nu=record.get(NU, self.initial), scale=self.scale_of(record) or 1.0)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The constraint with the multiplier and the unit of the cost of one step."""

    constraint: Constraint
    nu: float
    scale: float

    def streams(self, scored: ScoredGroup, rewards_G: np.ndarray, penalty_G: np.ndarray
                ) -> tuple[np.ndarray, np.ndarray]:
        """Return what is maximised (G,): the rewards, and the negative costs in their unit; NaN where missing.

        penalty_G: KL penalty of each completion. Both streams carry it, so that the mixture does for every nu. A prompt
        that is not watched has no cost.
        """
        rewards_G, cost_G = rewards_G - penalty_G, np.zeros_like(penalty_G)
        if self.constraint.watches(scored.group.prompt.columns):
            cost_G = np.where(np.isfinite(scored.terms[self.constraint.cost]), scored.terms[self.constraint.cost],
                              np.nan) / self.scale
            if self.constraint.missing == "drop":
                rewards_G = np.where(np.isnan(cost_G), np.nan, rewards_G)
        return rewards_G, -cost_G - penalty_G

    def mixed(self, reward: GroupAdvantages, cost: GroupAdvantages) -> GroupAdvantages:
        """Return (A^r - nu A^c) / (1 + nu); cost: advantages -A^c. Statistics of the costs are named cost/..."""
        advantages_G = (reward.advantages_G + self.nu * cost.advantages_G) / (1 + self.nu)
        stats = {**reward.stats, **{f"cost/{name}": value for name, value in cost.stats.items()}}
        return GroupAdvantages(advantages_G=advantages_G,
                               stats=stats | {"zero_advantage": float(not advantages_G.any())})
