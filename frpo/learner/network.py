"""A causal language model that answers per token: logits exist for a chunk of loss positions, never for a batch.

It runs the decoder on a micro-batch, picks the hidden states at the loss positions and hands them, with the output
head's weight, to a function of `frpo.kernels`. Which function, and what the numbers mean, is `learner`'s business.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from frpo.errors import ModelError
from frpo.learner.collate import TokenBatch

HeadFunction = Callable[[torch.Tensor, torch.Tensor], Any]
"""(hidden_ND, weight_VD) -> a tensor or a tuple of tensors."""


class TokenHead(nn.Module):
    """The output head's weight, applied by a function that need not form logits.

    A module of its own because ZeRO-3 gathers a partitioned weight around the forward and the backward of the module
    that owns it. It shares the parameter with the network (and, where tied, with the embeddings).
    """

    def __init__(self, network: PreTrainedModel):
        super().__init__()
        output = network.get_output_embeddings()
        if output is None or getattr(output, "bias", None) is not None:
            found = "no output head" if output is None else "an output head with a bias"
            raise ModelError(f"{type(network).__name__} has {found}; frpo trains causal language models whose logits "
                             "are hidden states times a weight")
        self.weight = output.weight
        self.softcap = getattr(network.config.get_text_config(), "final_logit_softcapping", None)

    def forward(self, hidden_ND: torch.Tensor, function: HeadFunction) -> Any:
        return function(hidden_ND, self.weight)


class TokenModel(nn.Module):
    """The network and its head behind one call, which is what DeepSpeed wraps."""

    def __init__(self, network: PreTrainedModel):
        super().__init__()
        self.network = network
        self.head = TokenHead(network)

    @property
    def softcap(self) -> float | None:
        """The bound that some families put on logits (cap * tanh(z / cap)); None for the others."""
        return self.head.softcap

    def forward(self, batch: TokenBatch, function: HeadFunction) -> Any:
        """`function` of the hidden states (N, D) that predict `batch.target_N`, and of the head's weight (V, D)."""
        pack = {} if batch.bounds is None else {  # transformers' names for the boundaries of a pack
            "cu_seq_lens_q": batch.bounds, "cu_seq_lens_k": batch.bounds,
            "max_length_q": batch.longest, "max_length_k": batch.longest}
        # With a cache, transformers would take a pack for one long sequence.
        hidden_BLD = self.network.get_decoder()(
            input_ids=batch.token_ids_BL, attention_mask=batch.attention_mask_BL, position_ids=batch.position_ids_BL,
            use_cache=False, **pack).last_hidden_state
        return self.head(hidden_BLD[batch.row_N, batch.column_N], function=function)
