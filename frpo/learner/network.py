"""A causal language model, or a reward model, with outputs per token: logits exist for a chunk of loss positions only.

The model runs the decoder on a micro-batch and picks the hidden states at the loss positions. It gives them, with the
output head's weight, to a function of `frpo.kernels`. `learner` chooses this function and interprets the numbers.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from frpo.learner.attention import Arrangement, arrange
from frpo.learner.collate import TokenBatch
from frpo.learner.logits import decoder_of, logit_scale

HeadFunction = Callable[[torch.Tensor, torch.Tensor], Any]
"""Function (hidden_ND, weight_VD) -> a tensor or a tuple of tensors."""

RouterFunction = Callable[[Any, Sequence[torch.Tensor]], Any]
"""Function (a HeadFunction's answer, router logits of every layer) -> another answer."""


class TokenHead(nn.Module):
    """The output head's weight, applied by a function that need not form logits.

    The head is a module of its own because ZeRO-3 gathers a partitioned weight around the forward and the backward of
    the module that owns it. The head shares the parameter with the network (and, where tied, with the embeddings).
    """

    def __init__(self, network: PreTrainedModel):
        super().__init__()
        self.scale = logit_scale(network)
        self.weight = network.get_output_embeddings().weight

    def forward(self, hidden_ND: torch.Tensor, function: HeadFunction) -> Any:
        return function(hidden_ND, self.weight)


class ScoreHead(nn.Module):
    """The weight (1, D) of a reward model's score, applied as `TokenHead` applies its own."""

    def __init__(self, network: PreTrainedModel):
        super().__init__()
        self.weight = cast(nn.Linear, network.score).weight

    def forward(self, hidden_ND: torch.Tensor, function: HeadFunction) -> Any:
        return function(hidden_ND, self.weight)


def scores_of(hidden_ND: torch.Tensor, weight_1D: torch.Tensor) -> torch.Tensor:
    """Return the scores (N) of a reward model, in fp32 whatever the model's own type."""
    return (hidden_ND.float() @ weight_1D.float().T)[:, 0]


class TokenModel(nn.Module):
    """The network and its head behind one call, which DeepSpeed wraps.

    scores: whether the network is a reward model, with one score in place of logits.
    The model is never in training mode. The policy is therefore the same function during sampling, learning and
    measurement, without dropout, router jitter or any other noise.
    """

    head: TokenHead | ScoreHead

    def __init__(self, network: PreTrainedModel, *, scores: bool = False):
        super().__init__()
        self.network = network
        self.head = ScoreHead(network) if scores else TokenHead(network)
        self.train()

    def train(self, mode: bool = True) -> TokenModel:
        return super().train(False)

    def forward(self, batch: TokenBatch, function: HeadFunction | None, router: RouterFunction | None = None) -> Any:
        """Call `function` on the hidden states (N, D) that predict `batch.target_N`, and on the head's weight (V, D).

        function: None for the network's own logits (B, L, V), or scores (B, L, 1), of rows that are not packed.
        router: makes another answer from the result of `function` and the router logits of a mixture of experts.
        """
        if function is None:
            arrange(None)
            if isinstance(self.head, ScoreHead):
                decoded = decoder_of(self.network)(input_ids=batch.token_ids_BL, use_cache=False)
                return cast(nn.Linear, self.network.score)(decoded.last_hidden_state)
            return self.network(input_ids=batch.token_ids_BL, use_cache=False).logits
        arrange(Arrangement(lengths=batch.lengths, bounds=batch.bounds))
        # With a cache, transformers would take a pack for one long sequence.
        output = decoder_of(self.network)(
            input_ids=batch.token_ids_BL, attention_mask=batch.attention_mask_BL, position_ids=batch.position_ids_BL,
            use_cache=False, **({} if router is None else {"output_router_logits": True}))
        answer = self.head(output.last_hidden_state[batch.row_N, batch.column_N], function=function)
        return answer if router is None else router(answer, output.router_logits)


def token_model(network: nn.Module) -> TokenModel:
    """Return `network`, or the TokenModel inside DeepSpeed's engine."""
    return cast(TokenModel, getattr(network, "module", network))
