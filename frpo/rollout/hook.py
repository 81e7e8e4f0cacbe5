"""Define the interface of a rollout hook: the user's coroutine that samples turns until it has one completion.

    async def rollout(prompt: Prompt, client: Client) -> Episode

A hook may await anything; run blocking calls in `asyncio.to_thread`. Tokens that the policy did not choose (a tool's
output, another speaker) have False in the completion's loss mask. `rollout.calculator` is an example.
"""
from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from frpo.types import Prompt, VersionSpan


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of the policy: T tokens and their log-probabilities. version_spans count from the turn's first token.

    finish_reason: "stop" after an end-of-sequence or stop token, which is the last token; else "length".
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    version_spans: tuple[VersionSpan, ...]
    text: str
    finish_reason: str


@dataclass(frozen=True, kw_only=True)
class Episode:
    """Result of a hook: T tokens after the prompt, with a loss mask and the policy's log-probabilities.

    logprobs: used only where the mask is True; elsewhere any value is allowed, None included.
    finish_reason: "length" for a sample that was cut off, else "stop".
    """

    token_ids: Sequence[int]
    loss_mask: Sequence[bool]
    logprobs: Sequence[float | None]
    version_spans: Sequence[VersionSpan] = ()
    finish_reason: str = "stop"


@dataclass
class Transcript:
    """An unfinished episode: turns of the policy, and other tokens between them."""

    prompt: Prompt
    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    version_spans: list[VersionSpan] = field(default_factory=list)
    finish_reason: str = "stop"

    @property
    def context(self) -> list[int]:
        """Return all tokens so far, beginning with the prompt. The policy continues from these tokens."""
        return [*self.prompt.token_ids, *self.token_ids]

    def add_policy_turn(self, turn: Turn) -> None:
        """Append a turn of the policy."""
        start = len(self.token_ids)
        self.version_spans += [VersionSpan(policy_version=span.policy_version, start=start + span.start,
                                           end=start + span.end) for span in turn.version_spans]
        self._extend(turn.token_ids, turn.logprobs, chosen=True)
        self.finish_reason = turn.finish_reason

    def add_observation(self, token_ids: Sequence[int]) -> None:
        """Append tokens that the policy did not choose."""
        self._extend(token_ids, [0.0] * len(token_ids), chosen=False)

    def episode(self) -> Episode:
        return Episode(token_ids=self.token_ids, loss_mask=self.loss_mask, logprobs=self.logprobs,
                       version_spans=self.version_spans, finish_reason=self.finish_reason)

    def _extend(self, token_ids: Sequence[int], logprobs: Sequence[float], chosen: bool) -> None:
        self.token_ids += token_ids
        self.logprobs += logprobs
        self.loss_mask += [chosen] * len(token_ids)


class Client:
    """Access of one sample to the engine that serves the policy.

    tokenizer: the model's tokenizer. max_tokens: limit of the completion's tokens in all, including tokens that the
    policy did not choose.
    """

    def __init__(self, prompt: Prompt, seed: int, max_tokens: int, tokenizer: Any, ask: Callable[..., asyncio.Future]):
        self.prompt, self.seed, self.max_tokens, self.tokenizer = prompt, seed, max_tokens, tokenizer
        self._ask = ask
        self._turns = 0

    async def generate(self, token_ids: Sequence[int], *, stop_token_ids: Sequence[int] = (),
                       max_new_tokens: int | None = None) -> Turn:
        """Sample a turn that continues `token_ids` (the prompt and all tokens after it), with the recipe's sampling.

        The turn ends with the end-of-sequence token or one of `stop_token_ids`, or once `max_new_tokens` or the
        remaining room is used up. With no room left the turn is empty. The first turn uses the sample's seed, so a
        hook of one turn draws the same tokens as a run without a hook.
        """
        room = self.max_tokens - (len(token_ids) - len(self.prompt.token_ids))
        wanted = room if max_new_tokens is None else min(room, max_new_tokens)
        if wanted <= 0:
            return Turn(token_ids=(), logprobs=(), version_spans=(), text="", finish_reason="length")
        seed = self.seed if self._turns == 0 else zlib.crc32(f"{self.seed}/{self._turns}".encode())
        self._turns += 1
        return await self._ask(token_ids, wanted, tuple(stop_token_ids), seed)
