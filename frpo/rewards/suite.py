"""Call all rewards of a run over a batch of groups, check the returned values, and sum them by weight.

G: completions of a group; N: completions of all groups of one `score`. A share is the part of the N completions that
one process of a reward gets: all of them, unless the reward has several processes. For a single call see `calls`.

This module computes no advantage, retries nothing and writes no metric; it returns the counts to the caller.
"""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import compress, islice
from operator import methodcaller
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from frpo.errors import RewardError
from frpo.rewards.arguments import check_kwargs
from frpo.rewards.calls import Batch, Component, prompt_names, score_share
from frpo.rewards.pool import RewardPool, WorkersOf, processes_of, shares
from frpo.rewards.protocol import BATCH_ARGUMENTS, Format, RewardSpec
from frpo.rewards.stop import Stop
from frpo.rewards.trial import made_up, try_share
from frpo.rewards.worker import Worker
from frpo.types import LARGEST_REWARD, Prompt, RolloutGroup, ScoredGroup, matches

Result = TypeVar("Result")
Scorer = Callable[[RewardSpec, RewardPool, Batch, slice, Stop], Component]


@dataclass(frozen=True, kw_only=True)
class ScoreReport:
    """Scored groups, in the given order, and counts of abstentions and errors.

    counts, for each reward: "reward/<name>/abstained" completions without a value for any reason; ".../nonfinite"
    completions on which the function returned NaN, infinity or a number beyond 1e150; ".../failed" and ".../timed_out"
    calls of the function, each for one share. The last three are above 0 only under `on_error: abstain`. Their
    completions are part of the first count.
    """

    groups: list[ScoredGroup]
    counts: dict[str, int]

    @classmethod
    def joined(cls, reports: Sequence[Self]) -> Self:
        """Join reports: all groups, in order of the reports; counts are sums."""
        counts: Counter[str] = Counter()
        for report in reports:
            counts.update(report.counts)
        return cls(groups=[group for report in reports for group in report.groups], counts=dict(counts))


class RewardSuite:
    """Several weighted rewards, each in workers of its own.

    specs: `RewardSpec`s, or the recipe's reward sections.
    columns: names to pass at every call, as None for a prompt that lacks them. Pass the columns of the data set: a call
    whose prompts are all of another task then abstains instead of failing on a missing column.
    workers: makes the workers of each reward: processes on this machine, or others.

    Raises RewardError if there is no reward, names repeat, or kwargs use the name of a batch argument.
    """

    def __init__(self, specs: Sequence[RewardSpec], *, columns: Sequence[str] = (), workers: WorkersOf = processes_of
                 ) -> None:
        _check_specs(specs)
        self._specs = list(specs)
        self._columns = tuple(columns)
        self._pools = [RewardPool(workers(spec)) for spec in specs]
        self._stops: set[Stop] = set()

    @property
    def processes(self) -> int:
        """Most workers of a reward: this many calls of `score` at the same time keep all workers busy."""
        return max(len(pool.workers) for pool in self._pools)

    def start(self) -> None:
        """Load all functions, concurrently. Raises RewardError if a function cannot be loaded or refuses its kwargs."""
        self._each([partial(_load, spec, worker)
                    for spec, pool in zip(self._specs, self._pools) for worker in pool.workers])

    def score(self, groups: Sequence[RolloutGroup], stop: Stop | None = None) -> ScoreReport:
        """Call every reward over all completions of `groups`, concurrently. Start workers that are not started.

        A completion's reward is the sum of weight x value over the rewards of non-zero weight that did not abstain, or
        NaN if all abstained. On prompts outside its `where` a reward abstains without a call. Several threads may call
        this method.

        Raises RewardError naming the reward, the input of its call, and index and prompt uid if one value is wrong:
        - always for a wrong length or type, a missing column, a name used twice and a weighted sum beyond 1e150;
        - at once if `stop` is set or the suite is closed;
        - for an exception, a time-out and a dead worker, unless the reward has `on_error: abstain`; then all
          completions of the call abstain;
        - for NaN, infinity and numbers beyond 1e150, unless the reward has `on_error: abstain`; then these abstain.
        """
        return self._scored(groups, {spec.format for spec in self._specs}, score_share, stop)

    def lacking(self, prompts: Sequence[Prompt]) -> dict[tuple[str, str], list[Prompt]]:
        """Return (reward, column of the data that its function needs) -> the prompts that lack the column.

        For these prompts the function gets None.
        """
        found = {}
        for spec, pool in zip(self._specs, self._pools):
            for name in pool.workers[0].start(Stop()).required:
                without = [prompt for prompt in prompts
                           if name not in prompt.columns and matches(prompt.columns, spec.where)]
                if name in self._columns and without:
                    found[spec.name, name] = without
        return found

    def try_out(self, prompts: Sequence[Prompt], *, group_size: int, most: int) -> ScoreReport:
        """Call every reward on made-up completions of a few of these prompts (see `trial`), `most` groups at a time.

        Mostly, this makes one call for each process of a reward. A call may take as long as loading. A call that took
        longer than `timeout_s` is repeated with that limit. Raises RewardError as `score` does, and if a call fails
        only because of the reward's `format`. Other exceptions and time-outs are warnings under `on_error: abstain`.
        """
        groups = made_up(prompts, group_size, self.processes)
        return ScoreReport.joined([self._scored(groups[first:first + most], ("text", "messages"), try_share)
                                   for first in range(0, len(groups), most)])

    def close(self) -> None:
        """End all calls and all workers. The suite may be used again; its functions are then loaded again."""
        for stop in tuple(self._stops):
            stop.set()
        workers = [worker for pool in self._pools for worker in pool.workers]
        with ThreadPoolExecutor(len(workers), "reward") as executor:  # an exit may take a while
            list(executor.map(methodcaller("close"), workers))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
    ) -> None:
        self.close()

    def _scored(self, groups: Sequence[RolloutGroup], formats: Collection[Format], scorer: Scorer,
                stop: Stop | None = None) -> ScoreReport:
        routes = [tuple(matches(group.prompt.columns, spec.where) for group in groups) for spec in self._specs]
        batches = {route: Batch.of(list(compress(groups, route)), formats, self._columns) for route in set(routes)}
        sizes = [len(group.completions) for group in groups]
        cuts = [shares(list(compress(sizes, route)), len(pool.workers)) for pool, route in zip(self._pools, routes)]
        parts = iter(self._each([
            partial(scorer, spec, pool, batches[route], share)
            for spec, pool, route, cut in zip(self._specs, self._pools, routes, cuts) for share in cut], stop))
        masks = [np.repeat(np.array(route, dtype=bool), sizes) for route in routes]
        named = {spec.name: Component.joined(list(islice(parts, len(cut)))).spread(mask_N)
                 for spec, mask_N, cut in zip(self._specs, masks, cuts)}
        return ScoreReport(
            groups=self._split(groups, named),
            counts={f"reward/{name}/{what}": count
                    for name, component in named.items() for what, count in component.counts.items()})

    def _each(self, jobs: Sequence[Callable[[Stop], Result]], stop: Stop | None = None) -> list[Result]:
        """Run every job on a thread of its own. The first error ends the jobs that still run."""
        if not jobs:
            return []
        ours = Stop()  # not `stop` itself: an error here must not end other calls under `stop`
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

    def _split(self, groups: Sequence[RolloutGroup], components: Mapping[str, Component]) -> list[ScoredGroup]:
        values_RN = np.stack([c.values for c in components.values()])
        total_N = _weighted_sum(np.array([spec.weight for spec in self._specs]), values_RN)
        beyond = np.flatnonzero(np.abs(total_N) > LARGEST_REWARD)
        if beyond.size:
            self._refuse_sum(values_RN[:, beyond[0]], total_N[beyond[0]], f"completion {beyond[0]} (prompt "
                             f"{prompt_names(groups)[beyond[0]]!r})")
        ends = np.cumsum([len(group.completions) for group in groups])
        return [
            ScoredGroup(
                group=group, rewards_G=total_N[end - len(group.completions):end],
                terms={name: c.values[end - len(group.completions):end] for name, c in components.items()})
            for group, end in zip(groups, ends)]

    def _refuse_sum(self, values_R: np.ndarray, total: float, completion: str) -> None:
        parts = ", ".join(f"{spec.name}: {value:g} x {spec.weight:g}"
                          for spec, value in zip(self._specs, values_R))
        raise RewardError(f"{completion} has the weighted sum of rewards {total:g} ({parts}); allowed is "
                          f"-{LARGEST_REWARD:g} to {LARGEST_REWARD:g}: lower the weights")


def _weighted_sum(weights_R: np.ndarray, values_RN: np.ndarray) -> np.ndarray:
    """Sum weight x value over the R rewards that count; NaN if none counts. A NaN or a zero weight does not count."""
    counts_RN = ~np.isnan(values_RN) & (weights_R[:, None] != 0)
    with np.errstate(over="ignore", invalid="ignore"):
        total_N = np.where(counts_RN, weights_R[:, None] * np.nan_to_num(values_RN), 0.0).sum(axis=0)
    total_N = np.where(np.isnan(total_N), math.inf, total_N)  # inf - inf: no sum, but no abstention either
    return np.where(counts_RN.any(axis=0), total_N, math.nan)


def _load(spec: RewardSpec, worker: Worker, stop: Stop) -> None:
    check_kwargs(spec, worker.label, worker.start(stop))


def _check_specs(specs: Sequence[RewardSpec]) -> None:
    if not specs:
        raise RewardError("a reward suite needs at least one reward, given none")
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise RewardError(f"rewards need distinct names, given {names}")
    for spec in specs:
        if spec.on_error not in ("raise", "abstain"):
            raise RewardError(f"reward {spec.name!r}: on_error is {spec.on_error!r}; allowed are 'raise' and 'abstain'")
        if spec.format not in ("text", "messages"):
            raise RewardError(f"reward {spec.name!r}: format is {spec.format!r}; allowed are 'text' and 'messages'")
        if spec.processes < 1:
            raise RewardError(f"reward {spec.name!r}: processes is {spec.processes}; it needs at least 1")
        taken = [name for name in spec.kwargs if name in BATCH_ARGUMENTS]
        if taken:
            raise RewardError(
                f"reward {spec.name!r}: kwargs may not set {taken[0]!r}, which comes from the batch; remove it")
