"""One rank of the learner: the verbs a loop calls on every rank in lockstep.

    score, forward_backward, optim_step, push_weights, save, load, export

It takes micro-batches whose weights are divided already and only sums; group logic, advantages and batching happen
before, on the controller. A plain class: `cluster` puts it into Ray actors.
"""
from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from frpo.config.sections import Recipe
from frpo.data.batcher import is_padding
from frpo.errors import CheckpointError
from frpo.learner import engine as ds
from frpo.learner.collate import collate, loss_positions, per_sample
from frpo.learner.model import load_model, load_tokenizer
from frpo.learner.movement import MovementCheck
from frpo.objectives.base import LossInputs
from frpo.objectives.ops import selective_logprobs
from frpo.objectives.surrogate import PolicyLoss
from frpo.telemetry import MetricSums
from frpo.types import MicroBatch, OptimStepOutput, SampleId
from frpo.weight_sync.protocol import WeightSender

CHECKPOINT_TAG = "learner"


class Learner:
    """A ZeRO rank that holds the policy, its optimizer and, where a KL term needs one, the frozen reference.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT must be in the environment; construction is collective.
    """

    def __init__(self, recipe: Recipe, model_path: str, device: str):
        self.recipe = recipe
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if device == "cpu":
            torch.set_num_threads(recipe.learner.threads)
        self.device = torch.device(device)
        self.tokenizer = load_tokenizer(model_path, recipe.model.trust_remote_code)
        self.updates_done = 0
        self.loss = PolicyLoss(
            clip_low=recipe.objective.clip_low, clip_high=recipe.objective.clip_high,
            kl_coef=recipe.objective.kl_coef, kl_estimator=recipe.objective.kl_estimator)
        ds.init_process_group(self.device, recipe.learner.timeout_s)
        config = ds.deepspeed_config(recipe.learner, recipe.model)
        self.engine = ds.build_policy(lambda: self._load(model_path), recipe.learner, config)
        self.reference = None
        if recipe.objective.kl_coef > 0:
            self.reference = ds.build_reference(lambda: self._load(model_path), config, self.device)
        self.sender: WeightSender | None = None

    def _load(self, path: str):
        return load_model(self.recipe.model, path, gradient_checkpointing=self.recipe.learner.gradient_checkpointing)

    # --- computing ------------------------------------------------------------------------------------------------

    def score(self, micro_batches: Sequence[MicroBatch], *, model: str = "policy",
              temperature: float | None = None) -> dict[SampleId, np.ndarray]:
        """Log-probabilities (nats) of every sample's loss tokens under the "policy" or the frozen "reference".

        temperature: divides the logits; None takes the recipe's sampling temperature. Collective.
        Returns one float32 array over all tokens of each sample, zero outside its loss positions.
        """
        network = self.engine if model == "policy" else self.reference
        scores: dict[SampleId, np.ndarray] = {}
        with torch.no_grad():
            for samples in micro_batches:
                logprobs_N, _ = self._logprobs(network, samples, temperature)
                arrays = per_sample(samples, logprobs_N.cpu().numpy(), np.float32)
                scores |= {s.sample_id: array for s, array in zip(samples, arrays) if not is_padding(s)}
        return scores

    def forward_backward(self, micro_batches: Sequence[MicroBatch], *, watch_movement: bool = False) -> MetricSums:
        """Accumulate the gradient of the summed loss over this rank's micro-batches of one update. Collective.

        watch_movement: record which tensors get a gradient, for `optim_step(watch_movement=True)`.
        """
        metrics = MetricSums()
        self.movement = MovementCheck(self.engine.module) if watch_movement else None
        for samples in micro_batches:
            logprobs_N, entropy_N = self._logprobs(self.engine, samples, None)
            inputs = self._loss_inputs(samples, logprobs_N)
            output = self.loss(inputs)
            # DeepSpeed averages gradients over ranks, ours are shares of one sum: this factor undoes the average.
            self.engine.backward(output.loss_sum * self.world_size)
            metrics.add("policy/loss", output.loss_sum.item(), 1.0, "sum")
            metrics.update(output.metrics)
            metrics.add("policy/entropy", entropy_N.sum().item(), len(entropy_N), "mean")
            self._add_gap(metrics, samples, logprobs_N)
        return metrics

    def optim_step(self, total_updates: int, *, watch_movement: bool = False) -> OptimStepOutput:
        """Clip and apply the accumulated gradient. Collective.

        With `watch_movement`, `self.movement` then knows the tensors without gradient and those that did not move.
        """
        lr = ds.learning_rate(self.updates_done, total_updates, self.recipe.learner)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        if watch_movement:
            self.movement.before_step()
        self.engine.step()
        if watch_movement:
            self.movement.after_step()
        self.updates_done += 1
        grad_norm = self.engine.get_global_grad_norm()
        return OptimStepOutput(policy_version=self.updates_done, grad_norm=float(grad_norm), lr=lr)

    def movement_report(self) -> dict[str, tuple[bool, bool]]:
        """(got a gradient on this rank, its fp32 master moved) of every trainable tensor, after a watched step."""
        return self.movement.report()

    # --- weights and checkpoints ----------------------------------------------------------------------------------

    def push_weights(self, version: int) -> None:
        """Send the policy's weights to the rollout engines under label `version`. Collective; rank 0 drives."""
        self.sender.send(self._weights(), version)

    def connect(self, sender: WeightSender) -> None:
        """Hand over the sender that `push_weights` uses from now on."""
        self.sender = sender

    def save(self, folder: str) -> None:
        """Write parameters, optimizer and update count of this rank under `folder`. Collective."""
        self.engine.save_checkpoint(folder, tag=CHECKPOINT_TAG, client_state={"updates_done": self.updates_done},
                                    save_latest=False)

    def load(self, folder: str) -> int:
        """Restore what `save` wrote; returns the number of updates done. Collective. Raises CheckpointError."""
        path, client_state = self.engine.load_checkpoint(folder, tag=CHECKPOINT_TAG)
        if path is None:
            raise CheckpointError(f"{folder} holds no learner state of {self.world_size} ranks; "
                                  "resume with the learner.num_ranks it was written with")
        self.updates_done = client_state["updates_done"]
        return self.updates_done

    def export(self, folder: str) -> None:
        """Write a Hugging Face model (safetensors, config, tokenizer) from rank 0. Collective."""
        state = {}
        for bucket in self._weights():
            if self.rank == 0:
                state |= {name: tensor.detach().cpu().clone() for name, tensor in bucket}
        if self.rank == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            network = self.engine.module
            network.config.use_cache = True
            network.save_pretrained(folder, state_dict=state)
            network.config.use_cache = False
            self.tokenizer.save_pretrained(folder)

    def _weights(self) -> ds.GatheredWeights:
        return ds.GatheredWeights(self.engine.module, self.recipe.weight_sync.bucket_mb * 2**20)

    # --- pieces ---------------------------------------------------------------------------------------------------

    def _logprobs(self, network, samples: MicroBatch, temperature: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        batch = collate(samples, self.tokenizer.pad_token_id, self.device)
        logits_BLV = network(input_ids=batch.token_ids_BL, attention_mask=batch.attention_mask_BL).logits
        logits_NV = logits_BLV[batch.row_N, batch.column_N]
        divisor = self.recipe.rollout.temperature if temperature is None else temperature
        return selective_logprobs(logits_NV, batch.target_N, divisor)

    def _loss_inputs(self, samples: MicroBatch, logprobs_N: torch.Tensor) -> LossInputs:
        def flat(name: str) -> torch.Tensor:
            return loss_positions(samples, name, self.device)

        current = logprobs_N.detach()
        lengths = [int(sample.loss_mask.sum()) for sample in samples]
        advantage = np.repeat([sample.advantage for sample in samples], lengths)
        return LossInputs(
            logprobs_N=logprobs_N,
            # With one update per rollout batch the ratio is one by definition; its gradient is all that matters.
            old_logprobs_N=current if samples[0].old_logprobs is None else flat("old_logprobs"),
            ref_logprobs_N=None if samples[0].ref_logprobs is None else flat("ref_logprobs"),
            advantage_N=torch.as_tensor(advantage, dtype=torch.float32, device=self.device),
            policy_weight_N=flat("policy_weight"),
            kl_weight_N=flat("kl_weight"),
            mask_N=torch.ones_like(current, dtype=torch.bool))

    def _add_gap(self, metrics: MetricSums, samples: MicroBatch, logprobs_N: torch.Tensor) -> None:
        if len(logprobs_N) == 0:
            return
        gap_N = (logprobs_N.detach().float() - loss_positions(samples, "rollout_logprobs", self.device)).abs()
        metrics.add("rollout/logprob_gap", gap_N.sum().item(), len(gap_N), "mean")
        metrics.add("rollout/logprob_gap_max", gap_N.max().item(), 1.0, "max")
