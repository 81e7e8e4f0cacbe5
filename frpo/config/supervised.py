"""Define the sections of supervised learning: the examples, and the loss on their responses."""
from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from frpo.config.base import RowsPath, Section
from frpo.objectives.supervised import SUPERVISED, SupervisedLoss, build_supervised

SOURCES = ("a file (.jsonl, .ndjson, .json, .csv, .tsv, each also .gz; .parquet), a folder (from Dataset.save_to_disk, "
           "or of such files), an HF data set id, or generated data: arithmetic, constraints")

Reduction = Literal["token-mean", "seq-mean-token-mean", "seq-sum"]


def supervised_loss(value: Any) -> SupervisedLoss:
    """Build the loss that a recipe gives by a name, or by a mapping with a name. Raises ValueError for other values."""
    if (given := SUPERVISED.given(value)) is not None:
        return given
    value = {"name": value} if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise ValueError(f"a name such as csft_pa or a mapping such as {{name: csft}} is needed, given {value!r}")
    return build_supervised(value)


class GivenDataSection(Section):
    """Keys of data with given answers: where the rows are, which ones are used, and in which order."""

    path: RowsPath = Field(description=SOURCES)
    subset: str | None = Field(None, description="configuration of an HF data set that has several")
    split: str = Field("train", description="split of an HF data set or of a folder; a file has none")
    where: dict[str, list[Any]] = Field(
        {}, description="column -> values; keep only rows whose columns have one of these values")
    limit: int | None = Field(None, ge=1, description="use only this many rows, the first ones; null: all")
    heldout: int = Field(0, ge=0, description="rows set aside for evaluation, never trained on")
    heldout_path: RowsPath | None = Field(
        None, description="source of evaluation rows, instead of `heldout`; the same forms as `path`")
    heldout_overlap: Literal["refuse", "remove", "keep"] = Field(
        "refuse", description="training rows that are also in heldout_path. refuse: an error; remove: left out; keep: "
                              "trained on")
    shuffle: bool = Field(True, description="true: shuffle every epoch by the seed; false: file order")
    batch_size: int = Field(
        64, ge=1, description="rows per optimizer update; the last update of an epoch may have fewer")


class SupervisedDataSection(GivenDataSection):
    format: Literal["chat", "text"] = Field(
        "chat", description="chat: apply the chat template to messages; text: use prompt and response as they are")
    messages_column: str = Field(
        "messages", description="column with a list of messages (format chat), if the rows have one")
    prompt_column: str = Field(
        "prompt", description="column with the prompt, a string or messages, in rows without that list")
    response_column: str = Field("response", description="column with the response, in rows without that list")
    system_prompt: str | None = Field(None, description="system message put before every chat example")
    train_on: Literal["all", "last"] = Field(
        "all", description="assistant turns that have a loss, with their end-of-turn token. all: all turns; last: the "
                           "last one. Any chat template works")
    too_long: Literal["refuse", "cut", "drop"] = Field(
        "refuse", description="examples above model.max_length. refuse: an error; cut: their end is left off; drop: "
                              "left out")
    unknown_tokens: Literal["refuse", "drop"] = Field(
        "refuse", description="examples whose response has a character without a token. refuse: an error; drop: left "
                              "out")


class AuxiliarySection(Section):
    """A supervised term beside the policy loss of reinforcement learning, on data of its own."""

    data: SupervisedDataSection = Field(
        description="examples of the term; each optimizer update uses data.batch_size of them")
    objective: SupervisedLoss = Field(
        default_factory=lambda: build_supervised({"name": "sft"}),
        description="loss: {name: sft|kl_sft|csft|csft_pa|module:Class, ...its own keys}, or the name alone; the "
                    "reference is the policy before the first update")
    weight: float = Field(1.0, gt=0, description="factor of the term; the term is normalised by itself")
    reduction: Reduction = Field(
        "token-mean", description="how the term's token losses become one number. token-mean: mean of all tokens; "
                                  "seq-mean-token-mean: mean over sequences of their token means; seq-sum: mean over "
                                  "sequences of their token sums")

    @field_validator("objective", mode="plain")
    @classmethod
    def _build(cls, value: Any) -> SupervisedLoss:
        return supervised_loss(value)
