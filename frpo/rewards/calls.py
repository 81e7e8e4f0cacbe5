"""Call a reward function once on its share of a batch: pass arguments, check values, count and report errors.

A share is the part of N completions that one process of a reward gets. For threads and sums see `suite`.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from frpo.errors import RewardError
from frpo.rewards.arguments import check_kwargs, offered_arguments, select_arguments
from frpo.rewards.pool import RewardPool
from frpo.rewards.protocol import Format, RewardSpec
from frpo.rewards.stop import Stop
from frpo.rewards.values import Foreign, PortableValue, check_values, unusable
from frpo.rewards.worker import RewardCallError, RewardTimeoutError, Worker
from frpo.types import LARGEST_REWARD, RolloutGroup

Caller = Callable[[Worker, Mapping[str, Any], Stop], list[PortableValue] | Foreign]
"""`Worker.call` or `Worker.first_call`."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One reward's values for a share or for all N completions (NaN: abstained), and its counts by short name."""

    values: np.ndarray
    counts: Mapping[str, int]

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Join the shares of one reward in the given order. Counts are summed."""
        return cls(values=np.concatenate([np.empty(0), *(part.values for part in parts)]),
                   counts={what: sum(part.counts[what] for part in parts) for what in _counts()})


    def spread(self, mask_N: np.ndarray) -> Component:
        """Return the component over N completions, of which it holds those in the mask; the others abstain."""
        values_N = np.full(mask_N.size, np.nan)
        values_N[mask_N] = self.values
        return Component(values=values_N, counts=self.counts)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Input of all rewards of one call. offered: all arguments, by format. uids: names of the N prompts in errors.

    The name of a prompt is its origin, or else its uid.
    """

    offered: Mapping[Format, Mapping[str, list[Any]]]
    uids: Sequence[str]

    @classmethod
    def of(cls, groups: Sequence[RolloutGroup], formats: Collection[Format], columns: Sequence[str]) -> Self:
        """Make the batch of these groups. columns: names that are passed even if no prompt has them."""
        return cls(offered={form: offered_arguments(groups, form, columns) for form in formats},
                   uids=prompt_names(groups))

    def about(self, share: slice, form: Format) -> str:
        """Describe the input of a share's call, for error messages."""
        names = list(dict.fromkeys(self.uids[share]))
        few = len(names) <= 3
        prompts = ", ".join(map(repr, names)) if few else f"{names[0]!r} to {names[-1]!r}, {len(names)} in all"
        return (f"the call was given completions {share.start} to {share.stop - 1} of {len(self.uids)}, "
                f"of prompt{'s' if len(names) > 1 else ''} {prompts}, as {form} (rewards[].format)")


def prompt_names(groups: Sequence[RolloutGroup]) -> list[str]:
    """Return, for each completion, the name of its prompt in messages: its origin, or else its uid."""
    return [group.prompt.origin or group.prompt.uid for group in groups for _ in group.completions]


def score_share(spec: RewardSpec, pool: RewardPool, batch: Batch, share: slice, stop: Stop) -> Component:
    """Score completions `share`. If the call fails under `on_error: abstain`, all of them abstain."""
    try:
        return called(spec, spec.format, pool, batch, share, stop, Worker.call)
    except RewardCallError as error:
        if spec.on_error == "raise" or stop.is_set():
            raise
        return failed(error, share)


def called(spec: RewardSpec, form: Format, pool: RewardPool, batch: Batch, share: slice, stop: Stop,
           call: Caller) -> Component:
    """Score completions `share` by one call. Indices in errors count over all N.

    Raises RewardError regardless of `on_error`, except that `on_error` decides about single values that are unusable.
    """
    with pool.worker(stop) as worker:
        parameters = worker.start(stop)
        check_kwargs(spec, worker.label, parameters)
        arguments = select_arguments(
            spec, worker.label, parameters, {name: values[share] for name, values in batch.offered[form].items()})
        try:
            result = call(worker, arguments, stop)
        except RewardCallError as error:
            raise type(error)(f"{error}\n{batch.about(share, form)}") from None
    try:
        values = check_values(result, batch.uids[share], first=share.start)
    except RewardError as error:
        raise RewardError(f"{worker.label} {error}\n{batch.about(share, form)}") from None
    assert not isinstance(result, Foreign)  # check_values accepted it
    wild = unusable(result)
    if wild and spec.on_error == "raise":
        index = share.start + wild[0]
        raise RewardError(
            f"{worker.label} returned {result[wild[0]]} for completion {index} (prompt {batch.uids[index]!r}); "
            f"{len(wild)} of {len(values)} values are not allowed. Allowed are finite numbers from "
            f"-{LARGEST_REWARD:g} to {LARGEST_REWARD:g}; return None to abstain, or set on_error: abstain")
    return Component(values=values, counts=_counts(abstained=int(np.isnan(values).sum()), nonfinite=len(wild)))


def failed(error: RewardCallError, share: slice) -> Component:
    """Return only abstentions: the result of a call that raised or timed out under `on_error: abstain`."""
    size, kind = share.stop - share.start, "timed_out" if isinstance(error, RewardTimeoutError) else "failed"
    return Component(values=np.full(size, math.nan), counts=_counts(abstained=size, **{kind: 1}))


def _counts(**known: int) -> dict[str, int]:
    return {"abstained": 0, "nonfinite": 0, "failed": 0, "timed_out": 0, **known}
