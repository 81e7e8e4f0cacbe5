"""Keep the policy at a given distance from the reference, by changing the coefficient of the KL.

Policies of different objectives are comparable only at the same distance: more KL alone gives more reward. The
controller is a function of its record, which is kept in the run's state. The controller measures nothing itself.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from frpo.types import matches

COEF, AVERAGE, STEPS = "kl_coef", "kl_average", "kl_steps"


class KLControl(BaseModel):
    """Update log coef += gain * clip(average / target - 1, -1/2, 1) after every step; a section of the recipe.

    average: exponential moving average of the mean sequence KL in nats, over watched prompts. This is a proportional
    controller in log space, as in Ziegler et al. 2019 (arXiv:1909.08593, 2.2), with a smoothed measurement.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    target: float = Field(gt=0, description="mean KL to the reference to hold, in nats a sequence")
    where: dict[str, list[Any]] = Field(
        {}, description="measure the KL only on prompts whose column has one of these values, such as "
                        "{task: [safety]}; {}: on all")
    gain: float = Field(0.12, gt=0, description="largest relative change of kl_coef a step")
    smoothing: float = Field(0.85, ge=0, lt=1, description="weight of the old average of the KL when a new KL is added")
    warmup_steps: int = Field(10, ge=0, description="measured steps before kl_coef first changes")

    def watches(self, columns: Mapping[str, Any]) -> bool:
        """Check whether a prompt with these columns counts."""
        return matches(columns, self.where)

    def after(self, record: Mapping[str, float], coef: float, measured: float) -> dict[str, float]:
        """Return the record after a step with coefficient `coef` and mean sequence KL `measured`.

        measured: NaN if no prompt counted.
        """
        if math.isnan(measured):
            return dict(record) | {COEF: coef}
        average = self.smoothing * record.get(AVERAGE, measured) + (1 - self.smoothing) * measured
        steps = record.get(STEPS, 0.0) + 1
        if steps > self.warmup_steps:
            coef *= math.exp(self.gain * min(1.0, max(-0.5, average / self.target - 1)))
        return {COEF: coef, AVERAGE: average, STEPS: steps}
