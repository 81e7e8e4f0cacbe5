"""Load a model that scores, with its tokenizer, and compute the states of the last tokens of sequences.

Only `scorer` imports this module.
B: sequences of a batch; L: tokens of its longest sequence; D: width.
"""
from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from frpo.errors import ModelError
from frpo.learner.model import DTYPES, load_tokenizer

logger = logging.getLogger(__name__)

Values = list[float | None]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""

START_TOKENS_CPU, START_TOKENS_GPU = 32, 512
"""Tokens whose computation takes about as long as the start of a batch. Measured on a CPU, a guess for GPUs."""

KEPT_BYTES = 1 << 30
"""Freed memory that a process on the CPU keeps for its next batch."""


class Reader:
    """A model and its tokenizer, and the states of the last tokens of sequences."""

    def __init__(self, path: str, network: PreTrainedModel, decoder: nn.Module, device: torch.device) -> None:
        self.path, self.device = path, device
        if device.type == "cpu":
            keep_freed_memory()
        self.network = network.eval().requires_grad_(False).to(device)
        self.decoder = decoder
        self.tokenizer = load_tokenizer(path)
        self.window: int | None = getattr(network.config.get_text_config(), "max_position_embeddings", None)
        self.trained: int | None = None
        self._told: set[str] = set()

    def checked(self, ids: Sequence[int]) -> list[int]:
        """Return the ids. Raises ModelError if they begin with two beginning-of-sequence tokens."""
        bos = self.tokenizer.bos_token_id
        if bos is not None and list(ids[:2]) == [bos, bos]:
            raise ModelError(
                f"{self.path}: a sequence begins with two tokens {self.tokenizer.bos_token!r}, which the model has not "
                "seen; remove the token from the chat template or from the prompts")
        return list(ids)

    def measured(self, rows: Sequence[list[int]], batch_tokens: int, function: Callable[[Tensor], Values]) -> Values:
        """Return `function` of the states (B, D), in fp32, of each row's last token. None where a row is too long."""
        fits = [number for number, row in enumerate(rows) if self.window is None or len(row) <= self.window]
        self._tell(len(rows) - len(fits), len(rows), self.window, "the model's window; they get no score")
        self._tell(sum(len(row) > self.trained for row in rows) if self.trained else 0, len(rows), self.trained,
                   "the longest in the model's training; do not rely on their scores")
        found: Values = [None] * len(rows)
        lengths = [(len(rows[number]), number) for number in fits]
        start_tokens = START_TOKENS_CPU if self.device.type == "cpu" else START_TOKENS_GPU
        for batch in in_batches(lengths, batch_tokens, start_tokens):
            with torch.inference_mode():
                values = function(self._last([rows[number] for number in batch]))
            for number, value in zip(batch, values, strict=True):
                found[number] = value
        return found

    def _last(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the states (B, D), in fp32, of the last tokens. Padding is on the right; its id does not matter."""
        ids_BL = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self.device)
        length_B = torch.tensor([len(row) for row in rows], device=self.device)
        mask_BL = (torch.arange(ids_BL.shape[1], device=self.device) < length_B[:, None]).long()
        state_BLD = self.decoder(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).last_hidden_state
        return state_BLD[torch.arange(len(rows), device=self.device), length_B - 1].float()

    def _tell(self, count: int, of: int, limit: int | None, what: str) -> None:
        """Warn once that some sequences are longer than a limit."""
        if count and what not in self._told:
            self._told.add(what)
            logger.warning("%s: %d of %d sequences are longer than %d tokens, %s", self.path, count, of, limit, what)


def loaded(path: str, family: Any, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    network, found = family.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelError(f"{path}: {len(missing)} weights are not found and would be random: {', '.join(missing[:3])}; "
                         "give a model with all its weights")
    return network


def keep_freed_memory() -> None:
    """Keep what a batch frees for the next one, where the C library is glibc.

    Otherwise the kernel clears the pages of each batch again, which takes a fifth of the time of a small model.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)


def device_of(device: str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def dtype_of(dtype: str | None, device: torch.device) -> torch.dtype:
    asked = dtype or ("bf16" if device.type == "cuda" else "fp32")
    if asked not in DTYPES:
        raise ModelError(f"dtype is {asked!r}; allowed are {', '.join(map(repr, DTYPES))}")
    return DTYPES[asked]


def in_batches(rows: Sequence[tuple[int, int]], batch_tokens: int, start_tokens: int) -> list[list[int]]:
    """Cut rows into batches at the least cost. Returns the numbers of the rows of each batch, longest rows first.

    rows: (length, number). A batch costs its tokens with padding, at most `batch_tokens`, and `start_tokens`. A longer
    row is a batch by itself.
    """
    ordered = sorted(rows, reverse=True)
    cost, begin = [0.0] + [math.inf] * len(ordered), [0] * (len(ordered) + 1)  # of the first rows; of their last batch
    for first, (longest, _) in enumerate(ordered):
        for end in range(first + 1, min(len(ordered), first + max(1, batch_tokens // max(1, longest))) + 1):
            total = cost[first] + longest * (end - first) + start_tokens
            if total <= cost[end]:
                cost[end], begin[end] = total, first
    batches, end = [], len(ordered)
    while end:
        batches.append([number for _, number in ordered[begin[end]:end]])
        end = begin[end]
    return batches[::-1]
