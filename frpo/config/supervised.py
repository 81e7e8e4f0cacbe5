"""Define the sections of supervised learning: the examples, and the loss on their responses."""
from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from frpo.config.base import RowsPath, Section
from frpo.objectives.supervised import SUPERVISED, SupervisedLoss, build_supervised

SOURCES = ("file (.jsonl, .ndjson, .json, .csv, .tsv, each also .gz; .parquet), folder (of Dataset.save_to_disk, or of "
           "such files), HF data set id, or generated: arithmetic, constraints")

Reduction = Literal["token-mean", "seq-mean-token-mean", "seq-sum"]


def supervised_loss(value: Any) -> SupervisedLoss:
    """Build the loss that a recipe gives by a name, or by a mapping with a name. Raises ValueError for other values."""
    if (given := SUPERVISED.given(value)) is not None:
        return given
    value = {"name": value} if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise ValueError(f"a name such as csft_pa or a mapping such as {{name: csft}} is needed, given {value!r}")
    return build_supervised(value)


class SupervisedDataSection(Section):
    path: RowsPath = Field(description=SOURCES)
    subset: str | None = Field(None, description="configuration of an HF data set that has several")
    split: str = Field("train", description="split of an HF data set or of a folder; a file has none")
    format: Literal["chat", "text"] = Field(
        "chat", description="chat: template applied to messages; text: prompt and response verbatim")
    messages_column: str = Field("messages", description="column with a list of messages (chat), where rows have it")
    prompt_column: str = Field("prompt", description="otherwise: column with the prompt, a string or messages")
    response_column: str = Field("response", description="and the column with the response")
    system_prompt: str | None = Field(None, description="system message put before every chat example")
    train_on: Literal["all", "last"] = Field(
        "all", description="turns of the assistant with a loss, end-of-turn token included: all of them, or the last; "
                           "found by rendering, so that any chat template will do")
    too_long: Literal["refuse", "cut", "drop"] = Field(
        "refuse", description="examples above model.max_length: an error; their end is left off; left out")
    unknown_tokens: Literal["refuse", "drop"] = Field(
        "refuse", description="examples whose response has a character without a token: an error; left out")
    where: dict[str, list[Any]] = Field({}, description="keep only rows whose column has one of these values")
    limit: int | None = Field(None, ge=1, description="use only the first rows")
    heldout: int = Field(0, ge=0, description="examples set aside for evaluation, never trained on")
    heldout_path: RowsPath | None = Field(
        None, description="evaluation examples instead of `heldout`: what `path` takes")
    heldout_overlap: Literal["refuse", "remove", "keep"] = Field(
        "refuse", description="training examples that are in heldout_path too: an error; left out; trained on")
    shuffle: bool = Field(True, description="reshuffle every epoch (by seed) instead of file order")
    batch_size: int = Field(64, ge=1, description="examples an optimizer update; the last of an epoch may be smaller")


class AuxiliarySection(Section):
    """A supervised term beside the policy loss of reinforcement learning, on data of its own."""

    data: SupervisedDataSection = Field(description="its examples; data.batch_size of them an optimizer update")
    objective: SupervisedLoss = Field(
        default_factory=lambda: build_supervised({"name": "sft"}),
        description="{name: sft|kl_sft|csft|csft_pa|module:Class, ...its own keys}, or the name alone; the reference "
                    "is the policy as it was before the first update")
    weight: float = Field(1.0, gt=0, description="factor of the term, which is normalised by itself")
    reduction: Reduction = Field("token-mean", description="how its token losses become one number")

    @field_validator("objective", mode="plain")
    @classmethod
    def _build(cls, value: Any) -> SupervisedLoss:
        return supervised_loss(value)
