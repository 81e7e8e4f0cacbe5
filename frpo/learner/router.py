"""The load-balancing loss of a mixture of experts (MoE), as transformers defines it (arXiv:2101.03961, eq. 4-6).

    E sum_e f_e P_e     f_e: how often expert e is among the k of a token, P_e: its mean probability

Both are means over all layers and all tokens of one optimizer update (arXiv:2501.11873), never of a micro-batch. f,
which has no gradient, is counted in a forward pass of its own. The remaining loss is a sum over tokens, so that the
gradient does not depend on how the update was split. Prompts count, padding does not.

Legend: E experts, M places of a micro-batch (rows times columns).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import distributed as dist
from transformers import PreTrainedModel

from frpo.config.model import ModelSection
from frpo.data.layout import is_padding
from frpo.errors import ModelError
from frpo.learner.collate import TokenBatch
from frpo.types import Metrics, MicroBatch


def balance_coefficient(model: ModelSection, network: PreTrainedModel) -> float:
    """Return the factor of the load-balancing loss; 0: there is no such loss.

    Raises ModelError where the recipe asks for a load-balancing loss and the family has none.
    """
    own: Any = getattr(network, "router_aux_loss_coef", None)
    given = model.router_aux_loss_coef
    known = own is not None and hasattr(network, "num_experts_per_tok")
    if given is None:
        return own if known and getattr(network.config.get_text_config(), "output_router_logits", False) else 0.0
    if given > 0 and not known:
        raise ModelError(f"model.router_aux_loss_coef = {given:g}, but transformers has no load-balancing loss for "
                         f"{type(network).__name__}; set it to null")
    return given


@dataclass(frozen=True, kw_only=True)
class ExpertUse:
    """Routing of the tokens of one update.

    share_E: choices of an expert, per token and layer; they add up to k. rows: tokens times layers.
    """

    share_E: torch.Tensor
    rows: float


class UseCounter:
    """Counter of the experts chosen in one update, micro-batch by micro-batch. k: experts per token."""

    def __init__(self, k: int):
        self.k = k
        self.chosen_E: torch.Tensor | None = None
        self.rows = 0.0

    def add(self, answer: Any, router_logits: Sequence[torch.Tensor], *, counted_M: torch.Tensor) -> Any:
        """Count the choices of one micro-batch. Returns `answer` unchanged."""
        if not router_logits:
            raise ModelError("the model has no layer with experts, so it has no load-balancing loss; set "
                             "model.router_aux_loss_coef to null and output_router_logits of its config.json to false")
        for logits_ME in router_logits:
            chosen = _counted(logits_ME, counted_M).softmax(-1).topk(self.k, dim=-1).indices
            chosen_E = torch.bincount(chosen.flatten(), minlength=logits_ME.shape[-1]).double()
            self.chosen_E = chosen_E if self.chosen_E is None else self.chosen_E + chosen_E
        self.rows += len(router_logits) * float(counted_M.sum())
        return answer

    def over_all_ranks(self) -> ExpertUse:
        """Sum the counts of all ranks, and return them as an ExpertUse. Collective."""
        assert self.chosen_E is not None  # an update has a micro-batch
        sums = torch.cat([self.chosen_E, self.chosen_E.new_tensor([self.rows])])
        if dist.is_initialized():
            dist.all_reduce(sums)
        return ExpertUse(share_E=sums[:-1] / sums[-1], rows=float(sums[-1]))


@dataclass(frozen=True, kw_only=True)
class RouterTerm:
    """This micro-batch's share of the load-balancing loss, added to its other loss.

    counted_M: places that hold a counted token. metrics: receives one entry.
    """

    use: ExpertUse
    coefficient: float
    counted_M: torch.Tensor
    metrics: list[Metrics]

    def __call__(self, loss_sum: torch.Tensor, router_logits: Sequence[torch.Tensor]) -> torch.Tensor:
        probability_E = reduce(torch.add, (_counted(logits_ME, self.counted_M).softmax(-1).sum(0)
                                           for logits_ME in router_logits))
        balance_sum = len(probability_E) * (self.use.share_E.to(probability_E.dtype) * probability_E).sum()
        rows = len(router_logits) * self.counted_M.sum()
        self.metrics.append({"policy/router_aux": (balance_sum.detach(), rows, "mean")})
        return loss_sum + self.coefficient * balance_sum / self.use.rows


def counted_tokens(samples: MicroBatch, batch: TokenBatch) -> torch.Tensor:
    """Return bool (M): where the batch of `samples` has a token of the update.

    Samples that only keep ranks in step have no such token.
    """
    real = torch.tensor([not is_padding(sample) for sample in samples], device=batch.token_ids_BL.device)
    if batch.bounds is None:
        return (batch.attention_mask_BL.bool() & real[:, None]).flatten()
    return real.repeat_interleave(torch.tensor(batch.lengths, device=real.device))


def _counted(logits_ME: torch.Tensor, counted_M: torch.Tensor) -> torch.Tensor:
    """Return float32 (or float64) logits of the counted tokens.

    Raises ModelError where a router has more than one row per token.
    """
    flat_ME = logits_ME.reshape(-1, logits_ME.shape[-1])
    if len(flat_ME) != len(counted_M):
        raise ModelError(f"the model's routers return {len(flat_ME)} rows for {len(counted_M)} tokens, so frpo has no "
                         "load-balancing loss for it; set model.router_aux_loss_coef to 0")
    return (flat_ME if flat_ME.dtype == torch.float64 else flat_ME.float())[counted_M]
