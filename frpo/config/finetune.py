"""Define the recipe of supervised fine-tuning: its own sections; the others are those of reinforcement learning."""
from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from frpo.config.base import Section, WholeRecipe
from frpo.config.learner import LearnerSection, LearnerSpec
from frpo.config.model import ModelSection
from frpo.config.sections import ChecksSection
from frpo.config.supervised import Reduction, SupervisedDataSection, supervised_loss
from frpo.objectives.supervised import SupervisedLoss, build_supervised


class FinetuneRunSection(Section):
    name: str = Field("finetune", description="name of the run, shown in logs")
    dir: str = Field("runs/finetune", description="folder of the run: metrics, checkpoints, export")
    seed: int = Field(0, ge=0, description="seed of data order and initialisation")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda if torch is built for it and there are GPUs enough; else cpu, saying why")
    num_epochs: float = Field(1.0, gt=0, description="passes over the examples, such as 3 or 0.5")
    max_steps: int | None = Field(None, ge=1, description="updates of the run, instead of num_epochs; null: num_epochs")
    save_every: int = Field(0, ge=0, description="updates between resumable checkpoints; 0: only at the end")
    keep_last: int = Field(2, ge=1, description="resumable checkpoints kept")
    max_restarts: int = Field(2, ge=0, description="times that a run goes on from its newest checkpoint after a "
                                                   "learner rank has died; one more death ends it")
    resume: str = Field("auto", description="auto: newest complete checkpoint of run.dir; force: that one even if its "
                                            "recipe differs; never; overwrite: start over; or a checkpoint's path")

    def notes(self) -> list[str]:
        """Return a line if run.num_epochs is set but has no effect beside run.max_steps, else []."""
        if self.max_steps is None or self.num_epochs == type(self).model_fields["num_epochs"].default:
            return []
        return [f"note: run.num_epochs = {self.num_epochs:g} has no effect beside run.max_steps = {self.max_steps}; "
                "set run.max_steps=null for it to count"]

    def updates(self, per_epoch: int) -> int:
        """Return the optimizer updates of the whole run. per_epoch: updates of one pass over the examples."""
        return self.max_steps or max(1, round(per_epoch * self.num_epochs))


class ReferenceSection(Section):
    path: str | None = Field(None, description="the aligned model; null: the model that is fine-tuned, as it was")
    mode: Literal["live", "cache"] = Field(
        "live", description="live: run beside the policy (with LoRA and no path: the policy without adapters); cache: "
                            "final hidden states computed once, before training, and kept on disk")
    cache_dir: str | None = Field(None, description="folder of caches; null: reference_cache in run.dir")


class FinetuneLearnerSection(LearnerSection):
    lr: float = Field(2e-5, gt=0, description="peak learning rate of AdamW")


class FinetuneEvaluateSection(Section):
    every: int = Field(0, ge=0, description="updates between evaluations on held-out examples; 0: only first and last")


class FinetuneTelemetrySection(Section):
    tensorboard: bool = Field(False, description="also write TensorBoard events")
    wandb: bool = Field(False, description="also log to Weights & Biases")
    project: str | None = Field(None, description="of W&B; null: WANDB_PROJECT, or its default")
    group: str | None = Field(None, description="of W&B: runs that belong together")
    tags: list[str] = Field([], description="of W&B")


class FinetuneRecipe(WholeRecipe):
    """Recipe of a whole fine-tuning run."""

    COMMAND = "finetune"
    NAMED = (("objective",),)

    run: FinetuneRunSection = Field(FinetuneRunSection(), description="name, folder, length, checkpoints")
    model: ModelSection = Field(description="what is fine-tuned")
    data: SupervisedDataSection = Field(description="examples")
    objective: SupervisedLoss = Field(
        default_factory=lambda: build_supervised({"name": "sft"}),
        description="{name: sft|kl_sft|csft|csft_pa|module:Class, ...its own keys}, or the name alone")
    reduction: Reduction = Field(
        "token-mean", description="how the token losses of an update become one number, over all ranks")
    reference: ReferenceSection = Field(ReferenceSection(), description="what csft, csft_pa and kl_sft hold on to")
    learner: FinetuneLearnerSection = Field(FinetuneLearnerSection(), description="optimizer and sharding")
    evaluate: FinetuneEvaluateSection = Field(FinetuneEvaluateSection(), description="held-out evaluation")
    checks: ChecksSection = Field(ChecksSection(), description="fail-fast checks")
    telemetry: FinetuneTelemetrySection = Field(FinetuneTelemetrySection(), description="where metrics go")

    @field_validator("objective", mode="plain")
    @classmethod
    def _build(cls, value: Any) -> SupervisedLoss:
        return supervised_loss(value)

    @property
    def learner_spec(self) -> LearnerSpec:
        """The parts of this recipe that a learner rank uses."""
        return LearnerSpec(model=self.model, learner=self.learner, seed=self.run.seed, supervised_loss=self.objective,
                           reference=self.reference.mode if self.objective.needs_reference else "none",
                           reference_path=self.reference.path)

    @model_validator(mode="after")
    def _fits_together(self) -> FinetuneRecipe:
        if self.model.tiny is not None and self.model.tiny.warm_start.source != "generated":
            raise ValueError("model.tiny.warm_start.source: prompts takes the prompts of a reinforcement learning "
                             "recipe; choose generated")
        if self.model.max_length > self.learner.micro_batch_tokens:
            raise ValueError(f"learner.micro_batch_tokens = {self.learner.micro_batch_tokens} cannot hold an example "
                             f"of model.max_length = {self.model.max_length} tokens; raise it or lower "
                             "model.max_length")
        return self
