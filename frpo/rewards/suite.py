"""All rewards of a run: calls every function over a batch of groups, checks what comes back, sums by weight.

G: completions of a group; N: completions of all groups of one `score`. A share is what one process of a reward gets of
them: all of them, unless the reward has several processes.

Computes no advantage, retries nothing and writes no metric: the counts go back to the caller.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from frpo.errors import RewardError
from frpo.rewards.arguments import check_kwargs, offered_arguments, select_arguments
from frpo.rewards.pool import RewardPool, shares
from frpo.rewards.protocol import BATCH_ARGUMENTS, RewardSpec
from frpo.rewards.stop import Stop
from frpo.rewards.values import check_values, nonfinite
from frpo.rewards.worker import RewardCallError, RewardTimeoutError, RewardWorker
from frpo.types import RolloutGroup, ScoredGroup

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ScoreReport:
    """Scored groups, in the order given, and what went wrong on the way.

    counts, for each reward: "reward/<name>/abstained" completions without a value for whatever reason;
    ".../nonfinite" completions on which the function returned NaN or infinity; ".../failed" and ".../timed_out" calls
    of the function, each about one share. The last three are above 0 only under `on_error: abstain`, and are contained
    in the first.
    """

    groups: list[ScoredGroup]
    counts: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class _Component:
    """One reward's values of a share, or of all N (NaN: abstained), and its counts by their short name."""

    values: np.ndarray
    counts: Mapping[str, int]


class RewardSuite:
    """Several weighted rewards, each in worker processes of its own.

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
        self._pools = [
            RewardPool(name=spec.name, function=spec.function, timeout_s=spec.timeout_s, processes=spec.processes)
            for spec in specs]
        self._stops: set[Stop] = set()

    @property
    def processes(self) -> int:
        """Most processes that a reward has: so many calls of `score` at the same time keep them all busy."""
        return max(spec.processes for spec in self._specs)

    def start(self) -> None:
        """Load all functions, concurrently. Raises RewardError when one cannot be loaded or refuses its kwargs."""
        self._each([partial(_load, spec, worker)
                    for spec, pool in zip(self._specs, self._pools) for worker in pool.workers])

    def score(self, groups: Sequence[RolloutGroup], stop: Stop | None = None) -> ScoreReport:
        """Call every reward over all completions of `groups`, concurrently; starts what is not started.

        A completion's reward is the sum of weight x value over the rewards of non-zero weight that did not abstain,
        NaN if all did. May be called from several threads. Raises RewardError naming the reward, what the function was
        given, and index and prompt uid where one value is at fault: for a wrong length or type, a missing column and a
        name taken twice always, and at once when `stop` is set or the suite is closed; for an exception, a time-out, a
        dead worker, NaN and infinity unless the reward says `on_error: abstain`, when all that its call was given
        abstains.
        """
        offered = offered_arguments(groups, self._chat, self._columns)
        uids = [group.prompt.uid for group in groups for _ in group.completions]
        cuts = [shares([len(group.completions) for group in groups], spec.processes) for spec in self._specs]
        parts = iter(self._each([
            partial(_score_share, spec, pool, offered, uids, share)
            for spec, pool, cut in zip(self._specs, self._pools, cuts) for share in cut], stop))
        named = {spec.name: _joined(list(islice(parts, len(cut)))) for spec, cut in zip(self._specs, cuts)}
        return ScoreReport(
            groups=self._split(groups, named),
            counts={f"reward/{name}/{what}": count
                    for name, component in named.items() for what, count in component.counts.items()})

    def close(self) -> None:
        """End all calls and all workers. The suite may be used again; its functions then start afresh."""
        for stop in tuple(self._stops):
            stop.set()
        workers = [worker for pool in self._pools for worker in pool.workers]
        with ThreadPoolExecutor(len(workers), "reward") as executor:  # an exit may take a while
            list(executor.map(RewardWorker.close, workers))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
    ) -> None:
        self.close()

    def _each(self, jobs: Sequence[Callable[[Stop], Result]], stop: Stop | None = None) -> list[Result]:
        """Every job on a thread of its own. An error, whichever comes first, ends the jobs that are still busy."""
        if not jobs:
            return []
        ours = Stop()  # not `stop` itself: an error here says nothing about other calls under it
        self._stops.add(ours)
        try:
            with (stop or Stop()).calls(ours.set), ThreadPoolExecutor(len(jobs), "reward") as executor:
                try:
                    futures = [executor.submit(job, ours) for job in jobs]
                    done = wait(futures, return_when=FIRST_EXCEPTION).done
                    return [future.result() for future in futures if future in done]
                except BaseException:  # Ctrl-C as well: leaving the block waits for the threads, so free them
                    ours.set()
                    raise
        finally:
            self._stops.discard(ours)

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


def _load(spec: RewardSpec, worker: RewardWorker, stop: Stop) -> None:
    check_kwargs(spec, worker.label, worker.start(stop))


def _score_share(
    spec: RewardSpec, pool: RewardPool, offered: Mapping[str, list[Any]], uids: Sequence[str], share: slice, stop: Stop,
) -> _Component:
    """One call over completions `share` of the N; indices in errors count over all N."""
    size = share.stop - share.start
    with pool.worker(stop) as worker:
        parameters = worker.start(stop)
        check_kwargs(spec, worker.label, parameters)
        arguments = select_arguments(
            spec, worker.label, parameters, {name: values[share] for name, values in offered.items()})
        try:
            result = worker.call(arguments, stop)
        except RewardCallError as error:
            if spec.on_error == "raise" or stop.is_set():
                raise type(error)(f"{error}\n{_given(uids, share)}") from None
            kind = "timed_out" if isinstance(error, RewardTimeoutError) else "failed"
            return _Component(values=np.full(size, math.nan), counts=_counts(abstained=size, **{kind: 1}))
    try:
        values = check_values(result, uids[share], first=share.start)
    except RewardError as error:
        raise RewardError(f"{worker.label} {error}\n{_given(uids, share)}") from None
    wild = nonfinite(result)
    if wild and spec.on_error == "raise":
        index = share.start + wild[0]
        raise RewardError(
            f"{worker.label} returned {result[wild[0]]} for completion {index} (prompt {uids[index]!r}), "
            f"{len(wild)} such of {size}; return None to abstain, or set on_error: abstain")
    return _Component(values=values, counts=_counts(abstained=int(np.isnan(values).sum()), nonfinite=len(wild)))


def _given(uids: Sequence[str], share: slice) -> str:
    """What the call of a share was about, for its errors."""
    names = list(dict.fromkeys(uids[share]))
    prompts = ", ".join(map(repr, names)) if len(names) <= 3 else f"{names[0]!r} to {names[-1]!r}, {len(names)} in all"
    return (f"the call was given completions {share.start} to {share.stop - 1} of {len(uids)}, "
            f"of prompt{'s' if len(names) > 1 else ''} {prompts}")


def _joined(parts: Sequence[_Component]) -> _Component:
    counts = {what: sum(part.counts[what] for part in parts) for what in _counts()}
    return _Component(values=np.concatenate([np.empty(0), *(part.values for part in parts)]), counts=counts)


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
        if spec.processes < 1:
            raise RewardError(f"reward {spec.name!r}: processes is {spec.processes}; it needs at least 1")
        taken = [name for name in spec.kwargs if name in BATCH_ARGUMENTS]
        if taken:
            raise RewardError(
                f"reward {spec.name!r}: kwargs may not set {taken[0]!r}, which every call gets from the batch")
