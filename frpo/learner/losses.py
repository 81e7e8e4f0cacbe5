"""Loss functions of one micro-batch, from hidden states to summed loss. The learner gives them to the output head.

The formulas are in `frpo.objectives`; the memory-bounded arithmetic over the vocabulary is in `frpo.kernels`. This
module turns a micro-batch into the flat tensors that both use.

Legend: N loss positions, n of them in one chunk, D hidden width, V vocabulary.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from frpo.kernels import LogitScale, ReferenceHead, TokenStats, linear_logprobs, linear_token_loss
from frpo.kernels.stats import known
from frpo.learner.collate import TokenBatch, loss_positions
from frpo.learner.network import scores_of
from frpo.learner.reference import ReferenceStates
from frpo.objectives.base import LossInputs
from frpo.objectives.preference import PreferenceInputs, PreferenceLoss
from frpo.objectives.supervised import Margin, Progress, SupervisedInputs, SupervisedLoss, supervised_metrics
from frpo.objectives.surrogate import PolicyLoss
from frpo.types import Metrics, MicroBatch, PairSample, TrainingSample


@dataclass(frozen=True, kw_only=True)
class MicroBatchLoss:
    """The policy loss of one micro-batch, as a function of hidden states and head.

    arrays: inputs of a loss besides log-probs, flat over N; None where the batch has no such numbers.
    reference: None where its distribution is not needed.
    metrics: receives one entry per chunk; its tensors stay on the device.
    """

    loss: PolicyLoss
    arrays: Mapping[str, torch.Tensor | None]
    reference: ReferenceStates | None
    metrics: list[Metrics]

    def of_head(self, hidden_ND: torch.Tensor, head_VD: torch.Tensor, *, target_N: torch.Tensor, scale: LogitScale,
                temperature: float) -> torch.Tensor:
        """Compute the summed loss chunk by chunk. If the loss needs whole sequences, logits are made twice instead.

        scale: the policy's own. temperature: at which policy and reference are compared.
        """
        options = head_options(scale.at(temperature))
        if self.loss.whole_sequences:
            logprobs_N, entropy_N = linear_logprobs(hidden_ND, head_VD, target_N, **options)
            return self.of_tokens(TokenStats(logprobs_N=logprobs_N, entropy_N=entropy_N), slice(None))
        reference = None if self.reference is None else reference_head(self.reference, head_VD, temperature)
        return linear_token_loss(hidden_ND, head_VD, target_N, self.of_tokens, **options, reference=reference)

    def of_tokens(self, stats: TokenStats, rows: slice) -> torch.Tensor:
        """Compute the summed loss of the tokens `rows` from their statistics."""
        given: dict[str, Any] = {name: None if array is None else array[rows] for name, array in self.arrays.items()}
        current = stats.logprobs_N.detach()
        output = self.loss(LossInputs(
            logprobs_N=stats.logprobs_N, kl_N=stats.kl_N, mask_N=torch.ones_like(current, dtype=torch.bool), **given))
        gap_N = (current - given["rollout_logprobs_N"]).abs()
        entropy_N = stats.entropy_N.detach()
        self.metrics.append(output.metrics | {
            "policy/loss": (output.loss_sum.detach(), 1.0, "sum"),
            "policy/entropy": (entropy_N.sum(), entropy_N.numel(), "mean"),
            "rollout/logprob_gap": (gap_N.sum(), gap_N.numel(), "mean"),
            "rollout/logprob_gap_max": (gap_N.max() if gap_N.numel() else gap_N.sum(), 1.0, "max")})
        return output.loss_sum


@dataclass(frozen=True, kw_only=True)
class SupervisedMicroBatch:
    """The supervised loss of one micro-batch, as a function of hidden states and head.

    coefficient: factor of this loss beside other losses. weight_N, position_N: as in SupervisedInputs. reference: None
    where no loss needs a reference.
    metrics: receives one entry per chunk; its tensors stay on the device.
    """

    loss: SupervisedLoss
    progress: Progress
    coefficient: float
    weight_N: torch.Tensor
    position_N: torch.Tensor
    reference: ReferenceStates | None
    metrics: list[Metrics]

    def of_head(self, hidden_ND: torch.Tensor, head_VD: torch.Tensor, *, target_N: torch.Tensor, scale: LogitScale
                ) -> torch.Tensor:
        """Compute the summed loss, chunk by chunk."""
        margin = getattr(self.loss, "margin", Margin())
        reference = None if self.reference is None else reference_head(
            self.reference, head_VD, margin=margin.argmax, tau=margin.tau)
        return linear_token_loss(hidden_ND, head_VD, target_N, self.of_tokens, **head_options(scale),
                                 reference=reference)

    def of_tokens(self, stats: TokenStats, rows: slice) -> torch.Tensor:
        """Compute the summed loss of the tokens `rows` from their statistics."""
        inputs = SupervisedInputs(
            logprobs_N=stats.logprobs_N, ref_logprobs_N=stats.ref_logprobs_N, kl_N=stats.kl_N, margin_N=stats.margin_N,
            agree_N=stats.agree_N, weight_N=self.weight_N[rows], position_N=self.position_N[rows])
        output = self.loss.loss(inputs, self.progress)
        self.metrics.append(output.metrics | supervised_metrics(inputs) | {
            "sft/loss": (output.loss_sum.detach(), 1.0, "sum")})
        return self.coefficient * output.loss_sum


@dataclass(frozen=True, kw_only=True)
class PreferenceMicroBatch:
    """The loss of one micro-batch of pairs, as a function of hidden states (2 a pair) and the score's weight.

    samples: padding may be among them. metrics: receives one entry; its tensors stay on the device.
    """

    loss: PreferenceLoss
    samples: Sequence[PairSample]
    metrics: list[Metrics]

    def of_head(self, hidden_ND: torch.Tensor, weight_1D: torch.Tensor) -> torch.Tensor:
        """Compute the summed loss."""
        pairs = [sample for sample in self.samples if sample.loss_mask.any()]

        def numbers(values: Sequence[Any]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=hidden_ND.device)

        inputs = PreferenceInputs(
            scores_P2=scores_of(hidden_ND, weight_1D).view(-1, 2), target_P=numbers([pair.target for pair in pairs]),
            margin_P=numbers([pair.margin for pair in pairs]),
            sign_P2=numbers([pair.signs for pair in pairs]).view(-1, 2),
            weight_P=numbers([float(pair.weight.max()) for pair in pairs]))
        output = self.loss.loss(inputs)
        self.metrics.append(output.metrics | preference_metrics(inputs) | {
            "preference/loss": (output.loss_sum.detach(), 1.0, "sum")})
        return output.loss_sum


def preference_metrics(inputs: PreferenceInputs) -> Metrics:
    """Compute the metrics of every loss on pairs.

    accuracy: share of pairs with a preference whose better answer scores strictly higher. margin: mean difference of
    their scores. score: mean score. sign_accuracy: share of answers with a known flag on the right side of 0.
    """
    scores_P2, sign_P2 = inputs.scores_P2.detach(), inputs.sign_P2
    decided_P, known_P2 = inputs.target_P != 0.5, sign_P2 != 0
    difference_P = (scores_P2[:, 0] - scores_P2[:, 1])[decided_P]
    return {
        "preference/accuracy": ((difference_P > 0).sum(), decided_P.sum(), "mean"),
        "preference/margin": (difference_P.sum(), decided_P.sum(), "mean"),
        "preference/score": (scores_P2.sum(), scores_P2.numel(), "mean"),
        "preference/sign_accuracy": ((sign_P2 * scores_P2 > 0).sum(), known_P2.sum(), "mean")}


def head_options(scale: LogitScale) -> dict[str, Any]:
    """Return the scale as arguments of the kernels' functions."""
    return {"temperature": scale.temperature, "softcap": scale.softcap}


def reference_head(states: ReferenceStates, head_VD: torch.Tensor, temperature: float = 1.0, **margin: Any
                   ) -> ReferenceHead:
    """Build the kernels' record of the reference.

    head_VD: the policy's head, used where the reference has no head of its own. margin: see `ReferenceHead`.
    """
    return ReferenceHead(hidden_NE=states.hidden_NE, **head_options(states.scale.at(temperature)), **margin,
                         head_VE=head_VD.detach() if states.head_VE is None else states.head_VE)


def token_kl(hidden_ND: torch.Tensor, head_VD: torch.Tensor, *, target_N: torch.Tensor, reference: ReferenceStates,
             scale: LogitScale) -> torch.Tensor:
    """Compute (N) KL(pi || pi_ref) over the vocabulary in nats, chunk by chunk and without gradients."""
    parts: list[torch.Tensor] = []

    def collect(stats: TokenStats, rows: slice) -> torch.Tensor:
        parts.append(known(stats.kl_N))
        return parts[-1].sum()

    with torch.no_grad():
        linear_token_loss(hidden_ND, head_VD, target_N, collect, **head_options(scale),
                          reference=reference_head(reference, head_VD))
    return torch.cat(parts) if parts else hidden_ND.new_zeros(0)


def response_positions(samples: MicroBatch, device: torch.device) -> torch.Tensor:
    """Return int64 (N): the index of every loss position among those of its example, from 0."""
    counts = [int(sample.loss_mask.sum()) for sample in samples]
    return torch.as_tensor(np.concatenate([np.arange(count) for count in counts]), dtype=torch.int64, device=device)


def loss_arrays(samples: Sequence[TrainingSample], batch: TokenBatch, device: torch.device
                ) -> dict[str, torch.Tensor | None]:
    """Return `MicroBatchLoss.arrays` of `samples`, by the field names of LossInputs."""
    lengths = [int(sample.loss_mask.sum()) for sample in samples]
    advantage = np.repeat([sample.advantage for sample in samples], lengths)
    named = {f"{name}_N": loss_positions(samples, name, device) for name in (
        "policy_weight", "kl_weight", "kl_metric_weight", "rollout_logprobs", "old_logprobs", "ref_logprobs")}
    return named | {"advantage_N": torch.as_tensor(advantage, dtype=torch.float32, device=device),
                    "sequence_N": batch.sequence_N}
