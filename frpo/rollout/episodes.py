"""Run rollout hooks inside an engine's process: all samples of a call at once, with engine steps between their turns.

`hook` defines the interface of a hook. This module does not interpret turns.
"""
from __future__ import annotations

import asyncio
import inspect
import itertools
import math
import traceback
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from frpo.errors import ConfigError, RolloutHookError
from frpo.loading import load_function
from frpo.rollout.hook import Client, Episode, Turn
from frpo.types import Completion

IDLE_S = 0.01
"""Seconds to wait if every sample waits for something other than the engine."""


class Episodes:
    """Run the hook for many samples, and the engine between their turns.

    caller: a `sharing.Caller`. request: (token ids, tokens wanted, stop tokens, seed) -> vLLM prompt and parameters.
    turn: vLLM output -> Turn.
    """

    def __init__(self, caller: Any, request: Callable[..., tuple[Any, Any]], turn: Callable[[Any], Turn]):
        self.caller, self.request, self.turn = caller, request, turn
        self.asked: dict[str, tuple[Any, ...]] = {}
        self.waiting: dict[str, asyncio.Future] = {}
        self.numbers = itertools.count()
        self.loop = asyncio.new_event_loop()

    def ask(self, *wish: Any) -> asyncio.Future:
        """Return a future of the next turn. The engine gets the request once every sample that can go on has done so.
        """
        key = str(next(self.numbers))
        self.asked[key] = wish
        self.waiting[key] = self.loop.create_future()
        return self.waiting[key]

    def run(self, samples: Mapping[Any, Coroutine[Any, Any, Episode]]) -> Iterator[tuple[Any, Episode]]:
        """Yield (key, episode) of every sample as it ends. Raises the error that a sample raises."""
        tasks = {self.loop.create_task(sample): key for key, sample in samples.items()}
        try:
            while tasks:
                self.loop.run_until_complete(_breathe())
                for task in [task for task in tasks if task.done()]:
                    yield tasks.pop(task), task.result()
                self._drive(tasks)
        finally:
            self.loop.run_until_complete(_cancelled(tasks))
            self.loop.close()

    def _drive(self, tasks: Mapping[asyncio.Task, Any]) -> None:
        """Run one step of the engine if it has unfinished requests, else wait up to IDLE_S for the samples."""
        if self.asked:
            asked, self.asked = self.asked, {}
            self.caller.add(lambda: {key: self.request(*wish) for key, wish in asked.items()})
        if self.caller.unfinished:
            for key, output in self.caller.outputs():
                future = self.waiting.pop(key)
                if not future.done():  # a done future belongs to a sample that ran out of time
                    future.set_result(self.turn(output))
        elif tasks:
            self.loop.run_until_complete(asyncio.wait(tasks, timeout=IDLE_S, return_when=asyncio.FIRST_COMPLETED))


async def _breathe() -> None:
    """Run every coroutine that can go on, in a few rounds, because some coroutines pass results to others."""
    for _ in range(4):
        await asyncio.sleep(0)


async def _cancelled(tasks: Iterable[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def checked(hook: Callable[..., Any], client: Client, timeout_s: float) -> Episode:
    """Call the hook once. Raises RolloutHookError, naming the prompt, for an exception, a time-out or a bad result."""
    where = f"rollout hook, prompt {client.prompt.uid!r}"
    try:
        episode = await asyncio.wait_for(hook(client.prompt, client), timeout_s)
    except TimeoutError:
        raise RolloutHookError(f"{where}: no episode within {timeout_s:g} s; raise rollout.hook_timeout_s, or check "
                               "what the hook waits for") from None
    except Exception as error:  # the user's code
        own = error.__traceback__.tb_next if error.__traceback__ else None
        raise RolloutHookError(f"{where} raised {type(error).__name__}: {error}\n"
                               f"{''.join(traceback.format_exception(error.with_traceback(own))).rstrip()}") from None
    problem = _problem(episode, client.max_tokens)
    if problem:
        raise RolloutHookError(f"{where}: {problem}")
    return episode


def _problem(episode: Any, max_tokens: int) -> str | None:
    if not isinstance(episode, Episode):
        return f"it must return a frpo.rollout.hook.Episode, given {type(episode).__name__}"
    sizes = {name: len(getattr(episode, name)) for name in ("token_ids", "loss_mask", "logprobs")}
    if len(set(sizes.values())) > 1:
        return f"token_ids, loss_mask and logprobs must be equally long, given {sizes}"
    if sizes["token_ids"] > max_tokens:
        return (f"the episode has {sizes['token_ids']} tokens, rollout.max_new_tokens allows {max_tokens}, with tool "
                "tokens; raise it, or end the episode earlier")
    for place, (flag, logprob) in enumerate(zip(episode.loss_mask, episode.logprobs, strict=True)):
        if flag and not (isinstance(logprob, float) and math.isfinite(logprob) and logprob <= 0):
            return (f"token {place} has a loss, but the log-probability {logprob!r} is not a finite float <= 0; take "
                    "it from the turn (Transcript does), or mask the token")
    if episode.finish_reason not in ("stop", "length"):
        return f"finish_reason must be 'stop' or 'length', given {episode.finish_reason!r}"
    return None


def completion_of(episode: Episode, seed: int, text: str) -> Completion:
    """Convert the episode to a completion. Log-probabilities outside the loss mask become 0."""
    logprobs = [logprob if flag else 0.0
                for flag, logprob in zip(episode.loss_mask, episode.logprobs, strict=True)]
    return Completion(
        text=text, token_ids=np.array(episode.token_ids), loss_mask=np.array(episode.loss_mask),
        logprobs=np.array(logprobs, dtype=np.float64), seed=seed,
        version_spans=tuple(episode.version_spans), finish_reason=episode.finish_reason)


def load_hook(function: str) -> Callable[..., Any]:
    """Load the hook that a recipe names. Raises ConfigError if it is not found or is not a coroutine function."""
    hook = load_function(function, "rollout.hook: rollout hook", ConfigError)
    if not inspect.iscoroutinefunction(hook):
        raise ConfigError(f"rollout.hook: {function!r} is not a coroutine function; write it as async def "
                          "rollout(prompt, client)")
    return hook
