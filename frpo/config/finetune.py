"""Define the recipe of supervised fine-tuning: its own sections; the others are those of reinforcement learning."""
from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from frpo.config.base import PathText, Section, WholeRecipe
from frpo.config.learner import LearnerSection, LearnerSpec
from frpo.config.model import ModelSection
from frpo.config.sections import ChecksSection, FinetuneTelemetrySection
from frpo.config.supervised import Reduction, SupervisedDataSection, supervised_loss
from frpo.objectives.supervised import SupervisedLoss, build_supervised


class FinetuneRunSection(Section):
    name: str = Field("finetune", description="name of the run, shown in logs")
    dir: PathText = Field("runs/finetune", description="folder of the run: metrics, checkpoints, export")
    seed: int = Field(0, ge=0, description="seed of data order and initialisation")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda if torch is built for it and there are enough GPUs, else cpu and a warning "
                            "with the reason; cpu: no GPU is used; cuda: GPUs, an error if they cannot be used")
    num_epochs: float = Field(1.0, gt=0, le=1e9, description="passes over the examples, such as 3 or 0.5")
    max_steps: int | None = Field(
        None, ge=1, description="optimizer updates of the run, instead of num_epochs; null: num_epochs decides")
    save_every: int = Field(0, ge=0, description="updates between resumable checkpoints; 0: only at the end")
    keep_last: int = Field(2, ge=1, description="number of newest resumable checkpoints to keep")
    max_restarts: int = Field(
        2, ge=0, description="most restarts from the newest checkpoint after a learner rank died, hung or was cut "
                             "off; one more loss ends the run")
    gpu_wait_s: float = Field(
        120, ge=0, description="seconds that a restart in a Ray cluster waits for free GPUs in place of lost ones")
    resume: PathText = Field(
        "auto", description="auto: continue from the newest complete checkpoint of run.dir, if any; force: the same, "
                            "even if its recipe differs; never: start anew, an error if run.dir has checkpoints; "
                            "overwrite: start anew and replace them; or a checkpoint's path: continue from it")

    def notes(self) -> list[str]:
        """Return a line if run.num_epochs is set but has no effect beside run.max_steps, else []."""
        if self.max_steps is None or self.num_epochs == type(self).model_fields["num_epochs"].default:
            return []
        return [f"note: run.num_epochs = {self.num_epochs:g} has no effect beside run.max_steps = {self.max_steps}; "
                "set run.max_steps=null to use run.num_epochs"]

    def updates(self, per_epoch: int) -> int:
        """Return the optimizer updates of the whole run. per_epoch: updates of one pass over the examples."""
        return self.max_steps or max(1, round(per_epoch * self.num_epochs))


class ReferenceSection(Section):
    path: PathText | None = Field(
        None, description="the aligned model; null: the model that is fine-tuned, as it is before the first update")
    mode: Literal["live", "cache"] = Field(
        "live", description="live: the reference runs beside the policy (with LoRA and no path it is the policy "
                            "without adapters); cache: its final hidden states are computed once, before training, and "
                            "kept on disk")
    cache_dir: PathText | None = Field(None, description="folder of the caches; null: reference_cache in run.dir")


class FinetuneLearnerSection(LearnerSection):
    lr: float = Field(2e-5, gt=0, description="peak learning rate of AdamW")


class FinetuneEvaluateSection(Section):
    every: int = Field(
        0, ge=0, description="evaluate on held-out examples every this many updates; 0: only before the first and "
                             "after the last update")


class FinetuneRecipe(WholeRecipe):
    """Recipe of a whole fine-tuning run."""

    COMMAND, ITEMS = "finetune", "examples"
    NAMED = (("objective",),)

    run: FinetuneRunSection = Field(FinetuneRunSection(), description="name, folder, length, checkpoints")
    model: ModelSection = Field(description="the model that is fine-tuned")
    data: SupervisedDataSection = Field(description="examples to train on")
    objective: SupervisedLoss = Field(
        default_factory=lambda: build_supervised({"name": "sft"}),
        description="loss: {name: sft|kl_sft|csft|csft_pa|module:Class, ...its own keys}, or the name alone")
    reduction: Reduction = Field(
        "token-mean", description="how the token losses of an update become one number, over all ranks. token-mean: "
                                  "mean of all tokens; seq-mean-token-mean: mean over sequences of their token means; "
                                  "seq-sum: mean over sequences of their token sums")
    reference: ReferenceSection = Field(ReferenceSection(), description="reference model of csft, csft_pa and kl_sft")
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
            raise ValueError("model.tiny.warm_start.source: prompts needs the prompts of a reinforcement learning "
                             "recipe; set it to generated")
        if self.model.max_length > self.learner.micro_batch_tokens:
            raise ValueError(f"learner.micro_batch_tokens = {self.learner.micro_batch_tokens} cannot hold an example "
                             f"of model.max_length = {self.model.max_length} tokens; raise it or lower "
                             "model.max_length")
        return self
