"""Define the sections of the trained model: an existing or a newly made small model, trained whole or by adapters."""
from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from frpo.config.base import PathText, Section


class WarmStartSection(Section):
    source: Literal["generated", "prompts"] = Field(
        "generated", description="generated: generated arithmetic; prompts: the training prompts with their column "
                                 "`answer`")
    steps: int = Field(600, ge=0, description="supervised steps; 0: random weights")
    batch_size: int = Field(128, ge=1, description="examples per supervised step")
    lr: float = Field(2e-3, gt=0, description="peak learning rate of the warm start")


class TinyModelSection(Section):
    """A small character-level Qwen2 that frpo makes itself, so that the whole loop runs without downloaded weights."""

    hidden_size: int = Field(96, ge=32, description="hidden width: 32, 64 or 128 times num_heads")
    num_layers: int = Field(3, ge=1, description="decoder layers")
    num_heads: int = Field(3, ge=1, description="attention heads; they share one key-value head")
    tied: bool = Field(True, description="tie the output head to the embeddings")
    warm_start: WarmStartSection = Field(WarmStartSection(), description="supervised warm start")

    @model_validator(mode="after")
    def _head_size(self) -> TinyModelSection:
        if self.hidden_size not in (32 * self.num_heads, 64 * self.num_heads, 128 * self.num_heads):
            raise ValueError(f"hidden_size = {self.hidden_size} with num_heads = {self.num_heads}: rollout engines on "
                             "CPU need heads of 32, 64 or 128; change one of them")
        return self


class LoraSection(Section):
    """Low-rank adapters without dropout. With dropout, learner and rollout engines would not be the same function."""

    r: int = Field(16, ge=1, description="rank of an adapter")
    alpha: int = Field(32, ge=1, description="scale of an adapter: it adds alpha / r times its product B A to a weight")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", min_length=1, description="linear layers with an adapter. all-linear: all except the output "
                                                "head; or names such as [q_proj, v_proj]")


class ModelSection(Section):
    path: PathText | None = Field(None, description="local folder or HF id of a causal language model")
    tiny: TinyModelSection | None = Field(None, description="make a small new model instead of loading `path`")
    lora: LoraSection | None = Field(
        None, description="train low-rank adapters on a frozen model, which is also the reference; null: train the "
                          "whole model")
    dtype: Literal["fp32", "bf16"] = Field("bf16", description="precision of parameters and of the rollout engines")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] = Field(
        "sdpa", description="attention implementation of the learner")
    router_aux_loss_coef: float | None = Field(
        None, ge=0, description="weight of the load-balancing loss of a mixture of experts; null: the model's own "
                                "weight if its config.json sets output_router_logits, else no such loss")
    max_length: int = Field(
        4096, ge=8, description="most tokens of a prompt and its completion together, or of an example")
    trust_remote_code: bool = Field(False, description="run model code shipped with the weights")

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if (self.path is None) == (self.tiny is None):
            raise ValueError("give exactly one of model.path (existing weights) and model.tiny (a new small model); "
                             "set the other to null")
        return self
