"""A reward model on disk: padding that no score is read at, and the scores of an export in plain transformers."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from frpo.data.assistant import end_of_turn
from frpo.errors import ModelError
from frpo.learner.model import DTYPES

BATCH = 4
"""Number of sequences in a padded batch of the comparison."""


def pad_apart(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Set a padding token that does not end an answer, in place, if the tokenizer's own one does. Return the tokenizer.

    transformers reads the score at the last token that is not padding. Raises ModelError if there is no other special
    token.
    """
    ends = {tokenizer.eos_token_id, end_of_turn(tokenizer) if tokenizer.chat_template else None}
    if tokenizer.pad_token_id not in ends:
        return tokenizer
    others = [token.content for number, token in sorted(tokenizer.added_tokens_decoder.items())
              if token.special and number not in ends]
    if not others:
        raise ModelError(f"tokenizer {tokenizer.name_or_path!r} pads with the token that ends an answer "
                         f"({tokenizer.pad_token!r}), and has no other special token; transformers would score an "
                         "answer without its end. Add a padding token and save the tokenizer beside the model")
    tokenizer.pad_token = others[-1]
    return tokenizer


def plain_scores(folder: str | Path, sequences: Sequence[Sequence[int]], dtype: str, pad_id: int
                 ) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of N sequences by the model in `folder`, in plain transformers: alone, and in padded batches.
    """
    network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    alone, padded = [], []
    with torch.no_grad():
        for ids in sequences:
            alone += network(input_ids=torch.tensor([ids])).logits[:, 0].tolist()
        for start in range(0, len(sequences), BATCH):
            part = sequences[start:start + BATCH]
            width = max(map(len, part))
            token_ids = torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids in part])
            mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in part])
            padded += network(input_ids=token_ids, attention_mask=mask).logits[:, 0].tolist()
    return np.array(alone), np.array(padded)
