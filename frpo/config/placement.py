"""Define the section that assigns GPUs, and nodes, to learner ranks and rollout engines."""
from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from frpo.config.base import Section


class PlacementSection(Section):
    """GPUs and nodes of ranks and engines. On the CPU only the hosts have an effect. `placement: colocate` is short for
    {mode: colocate}.
    """

    mode: Literal["split", "colocate"] = Field(
        "split", description="split: ranks and engines have GPUs of their own; colocate: engines use the ranks' GPUs")
    sleep: bool = Field(
        True, description="colocate: engines free their memory while the learner works; false: both stay in memory, "
                          "for small models only")
    offload_optimizer: bool = Field(
        False, description="colocate with ZeRO-3: move the optimizer's state to CPU memory while engines sample")
    learner_hosts: list[str] | None = Field(
        None, min_length=1, description="addresses of the nodes for learner ranks, as `ray status -v` names them; "
                                        "null: any on GPUs, the node of the command on the CPU")
    engine_hosts: list[str] | None = Field(
        None, min_length=1, description="addresses of the nodes for engines; null: as for learner_hosts")

    @model_validator(mode="before")
    @classmethod
    def _by_mode_alone(cls, given: Any) -> Any:
        return {"mode": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _fits_together(self) -> PlacementSection:
        if self.mode == "colocate" and self.engine_hosts is not None:
            raise ValueError("mode: colocate puts engines where the learner's ranks are; set learner_hosts instead of "
                             "engine_hosts")
        if self.mode == "split" and self.offload_optimizer:
            raise ValueError("offload_optimizer makes room for engines on the same GPU; set mode to colocate, or set "
                             "learner.deepspeed to zero3_offload to keep the optimizer always off the GPU")
        return self

    @property
    def sleeps(self) -> bool:
        """Whether engines sleep while the learner works."""
        return self.mode == "colocate" and self.sleep
