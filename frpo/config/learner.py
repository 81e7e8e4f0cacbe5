"""Define the section of the learner, and `LearnerSpec`: the parts of a recipe that a learner rank uses."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from frpo.config.base import PathText, Section
from frpo.config.model import ModelSection
from frpo.objectives.preference import PreferenceLoss
from frpo.objectives.supervised import SupervisedLoss
from frpo.objectives.surrogate import PolicyLoss

LORA_LR = 1e-5
"""Learning rate below which adapters hardly learn. TRL's guide advises ten times the learning rate of whole weights."""

Decay = Annotated[float, Field(ge=0, lt=1, strict=True)]


class LearnerSection(Section):
    num_ranks: int = Field(
        1, ge=1, description="number of ZeRO ranks (one GPU each on CUDA); under the deepspeed launcher this value is "
                             "ignored, and its processes are the ranks")
    ranks: Literal["ray", "process", "launcher"] = Field(
        "ray", description="ray: each rank is a Ray actor; process: the only rank is this process; launcher: the ranks "
                           "are the processes of the deepspeed launcher. Under this launcher the value is ignored")
    deepspeed: PathText = Field(
        "zero3", description="name of a file in ds_configs/, or path of a DeepSpeed JSON; it sets the memory strategy "
                             "only")
    updates_per_step: int = Field(
        1, ge=1, description="optimizer updates per pass over a rollout batch, on disjoint minibatches")
    epochs_per_step: int = Field(
        1, ge=1, description="passes over a rollout batch; a step has epochs_per_step x updates_per_step updates")
    micro_batch_tokens: int = Field(8192, ge=8, description="most tokens of a micro-batch, padding included")
    packing: bool = Field(
        True, description="true: put sequences end to end without padding; false: pad them to the longest")
    lr: float = Field(1e-6, gt=0, description="peak learning rate of AdamW")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after warm-up. constant: stays at lr; linear, cosine: falls to "
                                "min_lr_ratio x lr")
    warmup_steps: int = Field(0, ge=0, description="optimizer updates of linear warm-up")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="final learning rate divided by the peak (linear, cosine)")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW beta_1 and beta_2", strict=False)
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(0.0, ge=0, description="AdamW decoupled weight decay")
    grad_clip: float = Field(1.0, gt=0, description="largest global gradient norm; larger gradients are scaled down")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    threads: int = Field(1, ge=1, description="CPU threads of a rank (CPU only)")
    startup_timeout_s: float = Field(1800, gt=0, description="time limit for all ranks to load, downloads included")
    timeout_s: float = Field(1800, gt=0, description="time limit for one learner phase and for its collectives")

    @model_validator(mode="after")
    def _one_process(self) -> LearnerSection:
        if self.ranks == "process" and self.num_ranks > 1:
            raise ValueError(f"ranks: process has one rank, given num_ranks = {self.num_ranks}; set ranks to ray, or "
                             f"start `deepspeed --num_gpus {self.num_ranks} --module frpo ...`")
        return self

    def notes(self, updates: int, lora: bool) -> list[str]:
        """Return notes if learner.lr is low for adapters, or if a run of `updates` updates never reaches learner.lr."""
        found = []
        if lora and self.lr < LORA_LR:
            found.append(f"note: learner.lr = {self.lr:g} is low for adapters; LoRA usually takes {LORA_LR:g} to 2e-4")
        if self.warmup_steps >= updates:
            found.append(f"note: learner.warmup_steps = {self.warmup_steps} lasts longer than the run's {updates} "
                         "updates, so the learning rate never reaches learner.lr")
        return found


@dataclass(frozen=True, kw_only=True)
class LearnerSpec:
    """The parts of a recipe that a learner rank uses. Every kind of recipe builds one.

    policy_loss: loss on sampled completions; None if the run samples nothing. supervised_loss: loss on given responses;
    None without examples. preference_loss: loss on the scores of pairs; the model then is a reward model, with one
    score in place of logits. temperature: sampling temperature of the completions; it divides the logits.
    reference: "live" runs the reference beside the policy, "cache" reads its states from disk, "none" needs none.
    reference_path: folder of the reference; None: the policy before its first update. bucket_mb: MiB of the model that
    are gathered at a time.
    """

    model: ModelSection
    learner: LearnerSection
    seed: int
    policy_loss: PolicyLoss | None = None
    supervised_loss: SupervisedLoss | None = None
    preference_loss: PreferenceLoss | None = None
    temperature: float = 1.0
    reference: Literal["none", "live", "cache"] = "none"
    reference_path: str | None = None
    bucket_mb: float = 256.0

    @property
    def is_reward_model(self) -> bool:
        """Whether the model gives a score in place of logits."""
        return self.preference_loss is not None

    @property
    def policy_is_reference(self) -> bool:
        """Whether the policy without its adapters is the reference, which then needs no memory of its own."""
        return self.model.lora is not None and self.reference_path is None
