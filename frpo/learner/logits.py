"""Measurement of how a model family makes logits from its decoder's hidden states: by its own code, not by its config.

Some families multiply hidden states or logits by a number, and some cap logits. Each family has its own names for these
in the config. Here decoder and output head are replaced by known values for one call of the network's `forward`. The
result shows the computation around them. No weight is needed: the network may be partitioned or on the meta device.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from frpo.errors import ModelError
from frpo.kernels import LogitScale

SMALL, LARGE = 2.0**-20, 2.0**40
"""Raw logits that separate a factor (SMALL) from a cap (LARGE) in the answer."""

PROBES = (SMALL, LARGE, -LARGE, 0.0, *(sign * 2.0**power for power in range(-6, 9) for sign in (1, -1)))

TOLERANCE = 1e-5
"""Relative tolerance. Some families compute the last step in float32, in which a power of two is exact."""


class _Hidden(tuple):
    """Output of a decoder that holds only hidden states."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


def logit_scale(network: PreTrainedModel) -> LogitScale:
    """Measure the scale and the cap of `network`'s logits: logits = cap tanh(hidden W^T / cap') / temperature.

    Raises ModelError for other logits, which cannot be computed from hidden states and the head's weight.
    """
    head, family = network.get_output_embeddings(), type(network).__name__
    if head is None or getattr(head, "weight", None) is None:
        raise ModelError(f"{family} has no output head; frpo trains causal language models whose logits are hidden "
                         "states times a weight")
    if getattr(head, "bias", None) is not None:
        raise ModelError(f"{family} has an output head with a bias; frpo trains causal language models whose logits "
                         "are hidden states times a weight alone")
    rows, width = getattr(head.weight, "ds_shape", head.weight.shape)
    hidden = torch.tensor([2.0 ** (column % 7 - 3) for column in range(width)], dtype=torch.float64)
    raw = torch.tensor([PROBES[row % len(PROBES)] for row in range(rows)], dtype=torch.float64)
    seen, logits = _answers(network, hidden, raw)
    before = _factor(hidden, seen)
    if before is None:
        raise ModelError(f"{family} changes its decoder's hidden states before the output head by more than a factor; "
                         "frpo trains causal language models whose logits are hidden states times a weight")
    after = logits[0] / SMALL
    capped = abs(logits[1] - after * LARGE) > TOLERANCE * abs(after * LARGE)
    expected = logits[1] * torch.tanh(after * raw / logits[1]) if capped else after * raw
    if (logits.shape != raw.shape or not torch.allclose(logits, expected, rtol=TOLERANCE, atol=TOLERANCE * SMALL)
            or not after * before > 0):
        raise ModelError(f"{family} computes its logits by more than hidden states times the head's weight, a factor "
                         "and a soft-cap; frpo does not know this function and cannot train it")
    factor = after * before
    return LogitScale(temperature=_rounded(1.0 / factor), softcap=_rounded(logits[1] / factor) if capped else None)


def output_head(network: PreTrainedModel) -> torch.nn.Module | None:
    """Return the layer that makes logits, or the score of a reward model, from hidden states. None where there is none.
    """
    return network.get_output_embeddings() or getattr(network, "score", None)


def decoder_of(network: PreTrainedModel) -> torch.nn.Module:
    """Return the part of `network` that makes hidden states from token ids. Raises ModelError where there is none."""
    found = network.get_decoder()
    if found is network:
        parts = [part for part in network.children() if isinstance(part, PreTrainedModel)]
        if len(parts) != 1:
            raise ModelError(f"{type(network).__name__} has {len(parts)} parts that could be its decoder; frpo trains "
                             "causal language models with one")
        found = parts[0]
    return found


def _answers(network: PreTrainedModel, hidden_D: torch.Tensor, raw_V: torch.Tensor
             ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (D) the head's input when the decoder returns `hidden_D`, and (V) logits when the head returns `raw_V`."""
    decoder, head = decoder_of(network), network.get_output_embeddings()
    given: list[torch.Tensor] = []

    def said(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        given.append(hidden)
        return raw_V.expand(*hidden.shape[:-1], -1).clone()

    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(_replaced(decoder, lambda *args, **kwargs: _Hidden((hidden_D[None, None].clone(),))))
        stack.enter_context(_replaced(head, said))
        try:
            logits = network(input_ids=torch.zeros((1, 1), dtype=torch.int64), use_cache=False).logits
        except (AttributeError, TypeError, ValueError, RuntimeError, KeyError, IndexError) as error:
            raise ModelError(f"{type(network).__name__} needs more than its decoder's hidden states to compute logits "
                             f"({type(error).__name__}: {error}); frpo cannot train it") from error
    if len(given) != 1:
        raise ModelError(f"{type(network).__name__} calls its output head {len(given)} times for a forward pass; frpo "
                         "trains causal language models that call it once")
    return given[0].flatten().double(), logits.flatten().double()


def _rounded(value: torch.Tensor) -> float:
    """Round to nine digits, which removes errors of the measurement."""
    return float(f"{float(value):.9g}")


def _factor(of: torch.Tensor, is_: torch.Tensor) -> torch.Tensor | None:
    """Return the factor between `of` and `is_`; None where there is no such number."""
    if is_.shape != of.shape:
        return None
    factor = is_[0] / of[0]
    return factor if torch.allclose(is_, factor * of, rtol=TOLERANCE, atol=0.0) else None


@contextmanager
def _replaced(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
