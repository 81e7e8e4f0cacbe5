"""Define the recipe of a reward or cost model: pairs of answers, and the loss on their scores."""
from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from frpo.config.base import PathText, RowsPath, WholeRecipe
from frpo.config.finetune import FinetuneEvaluateSection, FinetuneRunSection
from frpo.config.learner import LearnerSection, LearnerSpec
from frpo.config.model import ModelSection
from frpo.config.sections import ChecksSection, FinetuneTelemetrySection
from frpo.config.supervised import SOURCES, GivenDataSection
from frpo.objectives.preference import PREFERENCE, PreferenceLoss, build_preference


class PreferenceDataSection(GivenDataSection):
    path: RowsPath = Field(
        description=f"{SOURCES}. Rows have prompt, chosen and rejected; or chosen and rejected as whole conversations; "
                    "or the columns of PKU-SafeRLHF (prompt, response_0, response_1, better_response_id, ...)")
    format: Literal["chat", "text"] = Field(
        "chat", description="chat: apply the chat template to messages; text: use prompt and answer as they are")
    system_prompt: str | None = Field(None, description="system message put before every chat prompt")
    rename: dict[str, str] = Field({}, description="column of the rows -> name that frpo knows")
    contradictory: Literal["refuse", "drop"] = Field(
        "refuse", description="rows whose safer answer is flagged unsafe and the other one safe. refuse: an error; "
                              "drop: left out")
    equal: Literal["refuse", "drop"] = Field(
        "refuse", description="rows with two equal answers. refuse: an error; drop: left out")
    ties: Literal["half", "drop"] = Field(
        "half", description="rows that prefer neither answer. half: both orders count one half; drop: left out")
    too_long: Literal["refuse", "cut", "drop"] = Field(
        "refuse", description="pairs with an answer that ends beyond model.max_length. refuse: an error; cut: its end "
                              "is left off; drop: left out")

    @model_validator(mode="after")
    def _system_prompt_of_a_chat(self) -> PreferenceDataSection:
        if self.system_prompt is not None and self.format == "text":
            raise ValueError("system_prompt is a message of a chat, but format is text; set format to chat, or write "
                             "the text into the prompts")
        return self


class RewardModelRunSection(FinetuneRunSection):
    name: str = Field("reward_model", description="name of the run, shown in logs")
    dir: PathText = Field("runs/reward_model", description="folder of the run: metrics, checkpoints, export")


class RewardModelLearnerSection(LearnerSection):
    lr: float = Field(1e-5, gt=0, description="peak learning rate of AdamW")


class RewardModelRecipe(WholeRecipe):
    """Recipe of a run that trains a reward or cost model."""

    COMMAND, ITEMS = "reward-model", "pairs"
    NAMED = (("objective",),)

    run: RewardModelRunSection = Field(RewardModelRunSection(), description="name, folder, length, checkpoints")
    model: ModelSection = Field(description="the language model that becomes a reward model")
    data: PreferenceDataSection = Field(description="pairs of answers to train on")
    objective: PreferenceLoss = Field(
        default_factory=lambda: build_preference({"name": "bradley_terry"}),
        description="loss: {name: bradley_terry|cost|module:Class, ...its own keys}, or the name alone")
    learner: RewardModelLearnerSection = Field(RewardModelLearnerSection(), description="optimizer and sharding")
    evaluate: FinetuneEvaluateSection = Field(FinetuneEvaluateSection(), description="held-out evaluation")
    checks: ChecksSection = Field(ChecksSection(), description="fail-fast checks")
    telemetry: FinetuneTelemetrySection = Field(FinetuneTelemetrySection(), description="where metrics go")

    @field_validator("objective", mode="plain")
    @classmethod
    def _build(cls, value: Any) -> PreferenceLoss:
        if (given := PREFERENCE.given(value)) is not None:
            return given
        value = {"name": value} if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise ValueError(f"a name such as cost or a mapping such as {{name: cost}} is needed, given {value!r}")
        return build_preference(value)

    @property
    def learner_spec(self) -> LearnerSpec:
        """The parts of this recipe that a learner rank uses."""
        return LearnerSpec(model=self.model, learner=self.learner, seed=self.run.seed, preference_loss=self.objective)

    @model_validator(mode="after")
    def _fits_together(self) -> RewardModelRecipe:
        if self.model.tiny is not None and self.model.tiny.warm_start.source != "generated":
            raise ValueError("model.tiny.warm_start.source: prompts needs the prompts of a reinforcement learning "
                             "recipe; set it to generated")
        if 2 * self.model.max_length > self.learner.micro_batch_tokens:
            raise ValueError(f"learner.micro_batch_tokens = {self.learner.micro_batch_tokens} cannot hold a pair of "
                             f"answers of model.max_length = {self.model.max_length} tokens each; raise it to "
                             f"{2 * self.model.max_length} or lower model.max_length")
        return self
