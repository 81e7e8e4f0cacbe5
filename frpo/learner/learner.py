"""One rank of the learner: the operations that a loop calls on every rank in lockstep.

    compare, score, kl, scores, forward_backward, supervised_forward_backward, preference_forward_backward, optim_step,
    push_weights, save, load, export

The learner takes micro-batches whose weights are divided already, and only sums. The controller computes groups,
advantages and batches before. `Learner` is a plain class; `cluster` puts it into Ray actors.
"""
from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from transformers import PreTrainedModel

from frpo.config.learner import LearnerSpec
from frpo.data.layout import is_padding
from frpo.kernels import linear_logprobs
from frpo.kernels.stats import known
from frpo.learner import zero as ds
from frpo.learner.checkpoint import load_state, save_state
from frpo.learner.checkpoint_names import CheckpointForm, Stored, as_they_are
from frpo.learner.collate import TokenBatch, collate, loss_positions, per_sample
from frpo.learner.export import write_model
from frpo.learner.guard import compare
from frpo.learner.lora import adapter_weights, add_adapters, merged_weights, write_adapter
from frpo.learner.losses import (
    MicroBatchLoss,
    PreferenceMicroBatch,
    SupervisedMicroBatch,
    head_options,
    loss_arrays,
    response_positions,
    token_kl,
)
from frpo.learner.model import load_model, load_tokenizer
from frpo.learner.movement import MovementCheck
from frpo.learner.network import TokenModel, scores_of
from frpo.learner.reference import (
    CachedStates,
    FrozenModel,
    Reference,
    ReferenceStates,
    fill_cache,
    finish_cache,
    head_of,
)
from frpo.learner.router import ExpertUse, RouterTerm, UseCounter, balance_coefficient, counted_tokens
from frpo.learner.score_export import pad_apart
from frpo.objectives.supervised import Progress
from frpo.storage import writing
from frpo.telemetry.sums import MetricSums
from frpo.types import (
    AnySample,
    Comparison,
    Metrics,
    MicroBatch,
    OptimStepOutput,
    PairSample,
    SampleId,
    SupervisedSample,
    TrainingSample,
)
from frpo.weight_sync.protocol import WeightSender, drained

OPTIMIZER_STATES = (OffloadStateTypeEnum.optim_states, OffloadStateTypeEnum.hp_params,
                    OffloadStateTypeEnum.lp_grads)
"""Parts of DeepSpeed's state that are not needed to gather weights."""

SHARD_BYTES = 5 * 2**30
"""Approximate size of one file of an export."""


class Learner:
    """A ZeRO rank that holds the policy, its optimizer and, where a KL term needs one, the frozen reference.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT must be in the environment. Construction is collective.
    """

    def __init__(self, spec: LearnerSpec, model_path: str, device: str):
        self.spec, self.model_path = spec, model_path
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.device = torch.device(device)
        # Needed on a GPU too: the optimizer may be offloaded, and Ray gives a process one thread.
        torch.set_num_threads(spec.learner.threads)
        self.tokenizer = load_tokenizer(model_path, spec.model.trust_remote_code)
        self.updates_done = 0
        ds.init_process_group(self.device, spec.learner.timeout_s)
        self.config = ds.deepspeed_config(spec.learner, spec.model, self.device)
        self.engine = ds.build_policy(self._policy, spec.learner, self.config, self.device)
        self.balance = 0.0 if spec.is_reward_model else balance_coefficient(spec.model, self.network)
        self.form = CheckpointForm(self.network, merged_weights(self.network))
        # Without its adapters the policy is a reference at no cost.
        self.reference: Reference | None = None
        if spec.reference == "live" or spec.policy_is_reference:
            self.reference = self._frozen(spec.reference_path)
        self.start: FrozenModel | None = None
        self.sender: WeightSender | None = None

    def _policy(self) -> TokenModel:
        learner = self.spec.learner
        network = load_model(self.spec.model, self.model_path, packed=learner.packing,
                             gradient_checkpointing=learner.gradient_checkpointing,
                             score_seed=self.spec.seed if self.spec.is_reward_model else None)
        if self.spec.model.lora is not None:
            add_adapters(network, self.spec.model.lora, self.spec.seed)
        model = TokenModel(network, scores=self.spec.is_reward_model)
        if self.spec.is_reward_model:
            model.head.weight.requires_grad_(True)  # a score has no use before it is trained, so adapters leave it
        return model

    def _frozen(self, path: str | None) -> FrozenModel:
        """Return the model at `path`, or the policy before its first update, as a frozen model."""
        if path is None and self.spec.model.lora is not None:
            return FrozenModel(self.engine, is_policy=True)
        load = partial(load_model, self.spec.model, path or self.model_path, packed=self.spec.learner.packing)
        return FrozenModel(ds.build_reference(lambda: TokenModel(load()), self.config, self.device), is_policy=False)

    @property
    def network(self) -> PreTrainedModel:
        """Return the policy as a transformers model. Its parameters may be partitioned."""
        return self.engine.module.network

    # --- computing ------------------------------------------------------------------------------------------------

    def score(self, micro_batches: Sequence[MicroBatch], *, model: str = "policy",
              temperature: float | None = None) -> dict[SampleId, np.ndarray]:
        """Compute log-probabilities (nats) of every sample's loss tokens. Collective.

        model: the "policy" or the frozen "reference".
        temperature: divides the logits; None takes the sampling temperature of the spec.
        Returns one float32 array over all tokens of each sample, zero outside its loss positions.
        """
        scores: dict[SampleId, np.ndarray] = {}
        with torch.no_grad(), self._scored(model) as network:
            for samples in micro_batches:
                batch = self._collate(samples)
                scale = head_of(network).scale.at(self._temperature(temperature))
                logprobs_N, _ = network(batch, partial(
                    linear_logprobs, target_N=batch.target_N, **head_options(scale)))
                arrays = per_sample(samples, logprobs_N.float().cpu().numpy(), np.float32)
                scores |= {s.sample_id: array for s, array in zip(samples, arrays) if not is_padding(s)}
        return scores

    def compare(self, sequences: Sequence[Sequence[int]]) -> list[Comparison]:
        """Compare log-probs of `sequences` under the policy with those of plain transformers. Collective.

        The reference is compared too where it is a model of its own.
        """
        found = [compare("policy", self.engine, sequences, self._collate)]
        if isinstance(self.reference, FrozenModel) and not self.reference.is_policy:
            found.append(compare("reference", self.reference.network, sequences, self._collate))
        return found

    def kl(self, micro_batches: Sequence[MicroBatch], *, to: str = "reference") -> dict[SampleId, float]:
        """Compute KL(policy || other) in nats at temperature 1, over the whole vocabulary. Collective.

        Returns the sum over the loss tokens of each sample. For samples of the policy at temperature 1 this sum is an
        unbiased estimate of the KL of whole sequences.
        to: "reference", or "start", the model that `keep_initial_policy` has put beside the policy.
        """
        found: dict[SampleId, float] = {}
        other = self._known_reference if to == "reference" else self.start
        assert other is not None, "keep_initial_policy comes first"
        with torch.no_grad():
            for samples in micro_batches:
                batch = self._collate(samples)
                with other.states(samples, batch) as states:
                    kl_N = self.engine(batch, partial(token_kl, target_N=batch.target_N, reference=states,
                                                      scale=self.engine.module.head.scale))
                arrays = per_sample(samples, kl_N.cpu().numpy())
                found |= {s.sample_id: float(a.sum()) for s, a in zip(samples, arrays) if not is_padding(s)}
        return found

    def forward_backward(self, micro_batches: Sequence[tuple[TrainingSample, ...]], *, kl_coef: float | None = None,
                         watch_movement: bool = False) -> MetricSums:
        """Accumulate the gradient of the summed loss over this rank's micro-batches of one update. Collective.

        kl_coef: None takes that of the policy loss. watch_movement: record which tensors get a gradient, for
        `optim_step(watch_movement=True)`.
        """
        parts: list[Metrics] = []
        self.movement = MovementCheck(self.network) if watch_movement else None
        use = self._expert_use(micro_batches)
        policy_loss = self.spec.policy_loss
        assert policy_loss is not None  # only a recipe with rollouts calls this
        if kl_coef is not None:
            policy_loss = replace(policy_loss, kl_coef=kl_coef)
        for samples in micro_batches:
            batch = self._collate(samples)
            with self._reference_states(samples, batch, policy_loss.needs_states) as states:
                loss = MicroBatchLoss(loss=policy_loss, arrays=loss_arrays(samples, batch, self.device),
                                      reference=states, metrics=parts)
                self._backward(self.engine(batch, partial(
                    loss.of_head, target_N=batch.target_N, scale=self.engine.module.head.scale,
                    temperature=self._temperature(None)), self._router_term(use, samples, batch, parts)))
        return _summed(parts)

    def supervised_forward_backward(self, micro_batches: Sequence[tuple[SupervisedSample, ...]], progress: Progress, *,
                  coefficient: float = 1.0, learn: bool = True, watch_movement: bool = False) -> MetricSums:
        """Accumulate the gradient of coefficient times the summed supervised loss over given responses. Collective.

        The gradient is added to the gradient of `forward_backward` for the same update. learn: False only measures.
        """
        parts: list[Metrics] = []
        if watch_movement:
            self.movement = MovementCheck(self.network)
        use = self._expert_use(micro_batches) if learn else None
        supervised = self.spec.supervised_loss
        assert supervised is not None  # no other recipe calls this
        with torch.set_grad_enabled(learn):
            for samples in micro_batches:
                batch = self._collate(samples)
                with self._reference_states(samples, batch, supervised.needs_reference) as states:
                    loss = SupervisedMicroBatch(
                        loss=supervised, progress=progress, coefficient=coefficient, reference=states, metrics=parts,
                        weight_N=known(loss_positions(samples, "weight", self.device)),
                        position_N=response_positions(samples, self.device))
                    loss_sum = self.engine(batch, partial(loss.of_head, target_N=batch.target_N,
                                                          scale=self.engine.module.head.scale),
                                           self._router_term(use, samples, batch, parts, coefficient))
                    if learn:
                        self._backward(loss_sum)
        return _summed(parts)

    def preference_forward_backward(self, micro_batches: Sequence[tuple[PairSample, ...]], *,
                                    watch_movement: bool = False) -> MetricSums:
        """Accumulate the gradient of the summed loss over the pairs of one update. Collective."""
        parts: list[Metrics] = []
        self.movement = MovementCheck(self.network) if watch_movement else None
        preference = self.spec.preference_loss
        assert preference is not None  # only a reward model's recipe calls this
        for samples in micro_batches:
            loss = PreferenceMicroBatch(loss=preference, samples=samples, metrics=parts)
            self._backward(self.engine(self._collate(samples), loss.of_head))
        return _summed(parts)

    def scores(self, micro_batches: Sequence[tuple[PairSample, ...]]) -> dict[SampleId, tuple[float, float]]:
        """Return the scores of both answers of every pair. Collective."""
        found: dict[SampleId, tuple[float, float]] = {}
        with torch.no_grad():
            for samples in micro_batches:
                pairs = [sample for sample in samples if not is_padding(sample)]
                scores_P2 = self.engine(self._collate(samples), scores_of).double().cpu().numpy().reshape(-1, 2)
                found |= {pair.sample_id: (float(a), float(b)) for pair, (a, b) in zip(pairs, scores_P2, strict=True)}
        return found

    def optim_step(self, total_updates: int, *, watch_movement: bool = False) -> OptimStepOutput:
        """Clip and apply the accumulated gradient. Collective.

        With `watch_movement`, `self.movement` then holds the tensors without gradient and those that did not move.
        """
        lr = ds.learning_rate(self.updates_done, total_updates, self.spec.learner)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        if watch_movement:
            self._watched.before_step()
        self.engine.step()
        if watch_movement:
            self._watched.after_step()
        self.updates_done += 1
        grad_norm = self.engine.get_global_grad_norm()
        return OptimStepOutput(policy_version=self.updates_done, grad_norm=float(grad_norm), lr=lr)

    def movement_report(self) -> dict[str, tuple[bool, bool]]:
        """Return (got a gradient on this rank, its fp32 master moved) of every trainable tensor. Call after a watched
        step.
        """
        return self._watched.report()

    def keep_initial_policy(self, path: str | None = None) -> None:
        """Keep a frozen model beside the policy, for `kl`. Collective.

        The model is the policy before its first update, or the model at `path`.
        """
        if path is None and isinstance(self.reference, FrozenModel) and self.spec.reference_path is None:
            self.start = self.reference
        else:
            self.start = self._frozen(path)

    # --- the reference on disk ------------------------------------------------------------------------------------

    def begin_cache(self) -> None:
        """Load the reference beside the policy for as long as `cache_reference` needs it. Collective."""
        self.reference = self._frozen(self.spec.reference_path)

    def cache_reference(self, micro_batches: Sequence[MicroBatch], folder: str) -> None:
        """Write the reference's states of these samples into the cache. Collective."""
        for samples in micro_batches:
            fill_cache(self._model_of_reference, folder, samples, self._collate(samples))

    def end_cache(self, folder: str) -> None:
        """Complete the cache and release the model that filled it. Collective."""
        finish_cache(self._model_of_reference, folder, self.rank)
        self.reference = None
        gc.collect()

    def use_cache(self, folder: str) -> None:
        """Read the reference from a complete cache from now on."""
        self.reference = CachedStates(folder, self.device)

    # --- weights and checkpoints ----------------------------------------------------------------------------------

    def push_weights(self, version: int) -> None:
        """Send the policy to the rollout engines under label `version`. Collective; rank 0 drives.

        Sends whole weights, or only the adapters where weight_sync.adapters is set.
        """
        assert self.sender is not None  # by `connect`
        stored = as_they_are(adapter_weights(self.network)) if self.sender.section.adapters else self._checkpoint()
        self.sender.send(self._stream(stored), version)

    def connect(self, sender: WeightSender) -> None:
        """Set the sender that `push_weights` uses from now on."""
        self.sender = sender

    def make_room(self, offload: bool) -> None:
        """Release free memory of the GPU to other processes. Collective.

        offload: move the optimizer's state to the CPU.
        """
        if offload:
            self.engine.offload_states(include=OPTIMIZER_STATES)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def take_room(self, offload: bool) -> None:
        """Bring back what `make_room` moved, if anything. Collective."""
        if offload:
            self.engine.reload_states()

    def save(self, folder: str) -> None:
        """Write parameters, optimizer and update count of this rank under `folder`. Collective."""
        save_state(self.engine, folder, self.updates_done)

    def load(self, folder: str) -> int:
        """Restore a state of `save`, on any number of ranks; returns the number of updates done. Collective.

        Raises CheckpointError.
        """
        self.updates_done = load_state(self.engine, folder)
        return self.updates_done

    def export(self, folder: str) -> None:
        """Write a Hugging Face model (safetensors, config, tokenizer) from rank 0, in files of some GB. Collective.

        With LoRA this is the merged model, and its subfolder `adapter` holds only the adapters, for peft.
        """
        shards = self._shards(self._checkpoint())
        try:
            if self.rank == 0:
                if self.spec.is_reward_model:
                    self.network.config.pad_token_id = pad_apart(self.tokenizer).pad_token_id
                with writing(Path(folder)):
                    write_model(self.network, self.tokenizer, shards, self.model_path, Path(folder))
        finally:
            drained(shards)
        if self.spec.model.lora is not None:
            for adapters in self._shards(as_they_are(adapter_weights(self.network)), limit=math.inf):
                if self.rank == 0:
                    with writing(Path(folder)):
                        write_adapter(Path(folder) / "adapter", self.network, adapters, self.model_path)

    def _checkpoint(self) -> list[Stored]:
        """Return the policy in the form of the checkpoint from which it was loaded, adapters merged."""
        return self.form.stored(merged_weights(self.network))

    def _stream(self, stored: Sequence[Stored]) -> ds.GatheredWeights:
        return ds.GatheredWeights(stored, self.spec.bucket_mb * 2**20)

    def _shards(self, stored: Sequence[Stored], limit: float = SHARD_BYTES) -> Iterator[dict[str, torch.Tensor]]:
        """Yield all tensors in rank 0's memory, about `limit` bytes at a time. Collective.

        Other ranks yield nothing.
        """
        shard: dict[str, torch.Tensor] = {}
        held = 0
        for bucket in self._stream(stored):
            size = sum(tensor.nbytes for _, tensor in bucket)
            if shard and held + size > limit:
                yield shard
                shard, held = {}, 0
            held += size
            if self.rank == 0:
                shard |= {name: tensor.detach().to("cpu", copy=True) for name, tensor in bucket}
        if shard:
            yield shard

    # --- pieces ---------------------------------------------------------------------------------------------------

    def _scored(self, model: str) -> AbstractContextManager[torch.nn.Module]:
        """Return the context of the policy or of the reference: a frozen copy, or the policy without its adapters."""
        return nullcontext(self.engine) if model == "policy" else self._model_of_reference.active()

    @property
    def _known_reference(self) -> Reference:
        assert self.reference is not None  # made wherever the recipe needs one
        return self.reference

    @property
    def _model_of_reference(self) -> FrozenModel:
        assert isinstance(self.reference, FrozenModel)  # states on disk are used for losses only
        return self.reference

    @property
    def _watched(self) -> MovementCheck:
        assert self.movement is not None  # begun with the update
        return self.movement

    def _reference_states(self, samples: MicroBatch, batch: TokenBatch, needed: bool
                          ) -> AbstractContextManager[ReferenceStates | None]:
        return self._known_reference.states(samples, batch) if needed else nullcontext()

    def _expert_use(self, micro_batches: Sequence[MicroBatch]) -> ExpertUse | None:
        """Count how often the update chooses each expert, on all ranks. Collective.

        None without a load-balancing loss.
        """
        if self.balance == 0:
            return None
        counter = UseCounter(cast(int, self.network.num_experts_per_tok))
        with torch.no_grad():
            for samples in micro_batches:
                batch = self._collate(samples)
                self.engine(batch, _no_answer, partial(counter.add, counted_M=counted_tokens(samples, batch)))
        return counter.over_all_ranks()

    def _router_term(self, use: ExpertUse | None, samples: MicroBatch, batch: TokenBatch, metrics: list[Metrics],
                     coefficient: float = 1.0) -> RouterTerm | None:
        return None if use is None else RouterTerm(use=use, coefficient=coefficient * self.balance, metrics=metrics,
                                                   counted_M=counted_tokens(samples, batch))

    def _backward(self, loss_sum: torch.Tensor) -> None:
        # DeepSpeed averages gradients over ranks. Each rank has a share of one sum: this factor undoes the average.
        self.engine.backward(loss_sum * self.world_size)

    def _collate(self, samples: Sequence[AnySample]) -> TokenBatch:
        return collate(samples, self.tokenizer.pad_token_id, self.device, packed=self.spec.learner.packing)

    def _temperature(self, given: float | None) -> float:
        return self.spec.temperature if given is None else given


def _no_answer(hidden_ND: torch.Tensor, head_VD: torch.Tensor) -> None:
    """Return nothing for the output head, where only the routers' outputs are needed."""


def _summed(parts: Sequence[Metrics]) -> MetricSums:
    """Sum the metrics of all micro-batches.

    Call this at the end: a number read from a GPU waits for all work queued on the GPU.
    """
    metrics = MetricSums()
    for part in parts:
        metrics.update(part)
    return metrics
