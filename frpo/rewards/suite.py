"""All rewards of a run: calls every function once over a batch of groups, checks what comes back, sums by weight.

G: completions of a group; N: completions of all groups of one call.

Computes no advantage, retries nothing and writes no metric: the counts go back to the caller.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from frpo.errors import RewardError
from frpo.rewards.arguments import check_kwargs, offered_arguments, select_arguments
from frpo.rewards.protocol import BATCH_ARGUMENTS, RewardSpec
from frpo.rewards.values import check_values, nonfinite
from frpo.rewards.worker import RewardCallError, RewardTimeoutError, RewardWorker
from frpo.types import RolloutGroup, ScoredGroup

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ScoreReport:
    """Scored groups, in the order given, and what went wrong on the way.

    counts, for each reward: "reward/<name>/abstained" completions without a value for whatever reason;
    ".../nonfinite" completions on which the function returned NaN or infinity; ".../failed" and ".../timed_out" calls.
    The last three are above 0 only under `on_error: abstain`, and are contained in the first.
    """

    groups: list[ScoredGroup]
    counts: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class _Component:
    """One reward's N values (NaN: abstained) and its counts by their short name."""

    values: np.ndarray
    counts: dict[str, int]


class RewardSuite:
    """Several weighted rewards, each in its own worker process.

    specs: `RewardSpec`s, or the recipe's reward sections.
    chat: pass prompts and completions as message lists; otherwise as strings (a prompt's is the text of its messages,
    joined).
    columns: names to pass at every call, as None where a prompt lacks them. Give the data set's: a call whose prompts
    are all of another task then abstains instead of failing on a missing column.

    Raises RewardError when there is no reward, or names repeat, or kwargs take the name of a batch argument.
    """

    def __init__(self, specs: Sequence[RewardSpec], *, chat: bool, columns: Sequence[str] = ()) -> None:
        _check_specs(specs)
        self._specs = list(specs)
        self._chat = chat
        self._columns = tuple(columns)
        self._workers = [
            RewardWorker(name=spec.name, function=spec.function, timeout_s=spec.timeout_s) for spec in specs]

    def start(self) -> None:
        """Load all functions, concurrently. Raises RewardError when one cannot be loaded or refuses its kwargs."""
        self._each(lambda spec, worker: check_kwargs(spec, worker.label, worker.start()))

    def score(self, groups: Sequence[RolloutGroup]) -> ScoreReport:
        """Call every reward once over all completions of `groups`, concurrently; starts what is not started.

        A completion's reward is the sum of weight x value over the rewards of non-zero weight that did not abstain,
        NaN if all did. Raises RewardError naming the reward, and index and prompt uid where one value is at fault: for
        a wrong length or type, a missing column and a name taken twice always; for an exception, a time-out, a dead
        worker, NaN and infinity unless the reward says `on_error: abstain`.
        """
        offered = offered_arguments(groups, self._chat, self._columns)
        uids = [group.prompt.uid for group in groups for _ in group.completions]
        if not uids:
            components = [_Component(values=np.empty(0), counts=_counts()) for _ in self._specs]
        else:
            components = self._each(lambda spec, worker: _score_component(spec, worker, offered, uids))
        named = {spec.name: component for spec, component in zip(self._specs, components)}
        return ScoreReport(
            groups=self._split(groups, named),
            counts={f"reward/{name}/{what}": count
                    for name, component in named.items() for what, count in component.counts.items()})

    def close(self) -> None:
        """End all workers. The suite may be used again afterwards; its functions then start afresh."""
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
    ) -> None:
        self.close()

    def _each(self, work: Callable[[RewardSpec, RewardWorker], Result]) -> list[Result]:
        """`work(spec, worker)` on one thread a reward. An error ends the workers that are still busy."""
        with ThreadPoolExecutor(len(self._specs), thread_name_prefix="reward") as executor:
            futures = [executor.submit(work, spec, worker) for spec, worker in zip(self._specs, self._workers)]
            try:
                return [future.result() for future in futures]
            except BaseException:  # Ctrl-C as well: leaving the block waits for the threads, so free them
                for future, worker in zip(futures, self._workers):
                    if not future.done():
                        worker.kill()
                raise

    def _split(self, groups: Sequence[RolloutGroup], components: Mapping[str, _Component]) -> list[ScoredGroup]:
        total_N = _weighted_sum(
            np.array([spec.weight for spec in self._specs]), np.stack([c.values for c in components.values()]))
        ends = np.cumsum([len(group.completions) for group in groups])
        return [
            ScoredGroup(
                group=group, rewards_G=total_N[end - len(group.completions):end],
                terms={name: c.values[end - len(group.completions):end] for name, c in components.items()})
            for group, end in zip(groups, ends)]


def _weighted_sum(weights_R: np.ndarray, values_RN: np.ndarray) -> np.ndarray:
    """Sum over R rewards of weight x value where it counts; NaN where none does. A zero weight never counts."""
    counts_RN = ~np.isnan(values_RN) & (weights_R[:, None] != 0)
    total_N = np.where(counts_RN, weights_R[:, None] * np.nan_to_num(values_RN), 0.0).sum(axis=0)
    return np.where(counts_RN.any(axis=0), total_N, math.nan)


def _score_component(
    spec: RewardSpec, worker: RewardWorker, offered: Mapping[str, list[Any]], uids: Sequence[str],
) -> _Component:
    parameters = worker.start()
    check_kwargs(spec, worker.label, parameters)
    arguments = select_arguments(spec, worker.label, parameters, offered)
    try:
        result = worker.call(arguments)
    except RewardCallError as error:
        if spec.on_error == "raise":
            raise
        kind = "timed_out" if isinstance(error, RewardTimeoutError) else "failed"
        return _Component(values=np.full(len(uids), math.nan), counts=_counts(abstained=len(uids), **{kind: 1}))
    try:
        values = check_values(result, uids)
    except RewardError as error:
        raise RewardError(f"{worker.label} {error}") from None
    wild = nonfinite(result)
    if wild and spec.on_error == "raise":
        raise RewardError(
            f"{worker.label} returned {result[wild[0]]} for completion {wild[0]} (prompt {uids[wild[0]]!r}), "
            f"{len(wild)} such of {len(uids)}; return None to abstain, or set on_error: abstain")
    return _Component(values=values, counts=_counts(abstained=int(np.isnan(values).sum()), nonfinite=len(wild)))


def _counts(**known: int) -> dict[str, int]:
    return {"abstained": 0, "nonfinite": 0, "failed": 0, "timed_out": 0, **known}


def _check_specs(specs: Sequence[RewardSpec]) -> None:
    if not specs:
        raise RewardError("a reward suite needs at least one reward, given none")
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise RewardError(f"rewards need distinct names, given {names}")
    for spec in specs:
        if spec.on_error not in ("raise", "abstain"):
            raise RewardError(f"reward {spec.name!r}: on_error is {spec.on_error!r}; allowed are 'raise' and 'abstain'")
        taken = [name for name in spec.kwargs if name in BATCH_ARGUMENTS]
        if taken:
            raise RewardError(
                f"reward {spec.name!r}: kwargs may not set {taken[0]!r}, which every call gets from the batch")
