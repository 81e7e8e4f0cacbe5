"""The first call of every reward, before anything slow starts: made-up completions of a few of the run's own prompts.

It finds a function that needs a column which is not there, returns too few values or takes completions in the other
format. It cannot tell whether values are right: they are there to be read.
"""
from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import cycle, islice

import numpy as np

from frpo.errors import RewardError
from frpo.rewards.calls import Batch, Component, called, failed
from frpo.rewards.pool import RewardPool
from frpo.rewards.protocol import Format, RewardSpec
from frpo.rewards.stop import Stop
from frpo.rewards.worker import RewardCallError, RewardTimeoutError, RewardWorker
from frpo.types import Completion, Prompt, RolloutGroup, ScoredGroup

logger = logging.getLogger(__name__)

TEXTS = ("A short answer.", "", " ".join(["A long answer."] * 40))
"""A short completion, an empty and a long one (599 characters). The empty one is not the first: it has no first
character, which would hide the error of a function that takes message lists."""

LONGEST = 2000
"""Characters of a column's value that is tried as a completion."""

TRIED = ("this was its first call, before the run: made-up completions (short, empty, long) of prompts of the data "
         "(checks.rewards)")

MOST = 8
"""Most prompts that are tried, and most values of a column that counts as a kind, such as a task."""


def try_share(spec: RewardSpec, pool: RewardPool, batch: Batch, share: slice, stop: Stop) -> Component:
    """As `score_share`, with the time limit of a first call and its errors explained.

    Under `on_error: abstain` an exception is a warning, unless the function only takes the other format.
    """
    try:
        return called(spec, spec.format, pool, batch, share, stop, RewardWorker.first_call)
    except RewardError as error:
        if stop.is_set():
            raise
        told = f"{error}\n{TRIED}"
        form: Format = "messages" if spec.format == "text" else "text"
        kind = "message lists" if form == "messages" else "strings"
        if _succeeds(error, spec, form, pool, batch, share, stop):
            raise type(error)(f"{told}. The same call succeeds when prompts and completions are {kind}: set format: "
                              f"{form} in this reward of the recipe, or change the function") from None
        if spec.on_error == "raise" or not isinstance(error, RewardCallError):
            raise type(error)(told) from None
        logger.warning("%s; on_error: abstain counts it as None", told)
        return failed(error, share)


def _succeeds(error: RewardError, spec: RewardSpec, form: Format, pool: RewardPool, batch: Batch, share: slice,
              stop: Stop) -> bool:
    """Whether a call that raised does not raise when prompts and completions have this format instead."""
    if not isinstance(error, RewardCallError) or isinstance(error, RewardTimeoutError):
        return False
    parameters = pool.workers[0].start(stop)
    if not parameters.open and not {"prompts", "completions"} & {*parameters.named}:
        return False  # the format changes nothing
    try:
        called(spec, form, pool, batch, share, stop, RewardWorker.first_call)
    except RewardError:
        return False
    return True


def made_up(prompts: Sequence[Prompt], group_size: int, at_least: int) -> list[RolloutGroup]:
    """A group of TEXTS and of the columns' values, in turn, for each of `examples`, which are repeated up to `at_least`
    groups.
    """
    chosen = examples(prompts)
    return [RolloutGroup(group_id=(0, draw), prompt=prompt,
                         completions=tuple(_completion(text, prompt) for text in islice(
                             cycle((*TEXTS, *column_texts(prompt).values())), group_size)))
            for draw, prompt in enumerate(islice(cycle(chosen), max(at_least, len(chosen))))]


def column_texts(prompt: Prompt) -> dict[str, str]:
    """Column -> its value as a text, for columns that may hold the right answer."""
    return {name: str(value) for name, value in prompt.columns.items()
            if isinstance(value, str | int | float) and not isinstance(value, bool) and 0 < len(str(value)) <= LONGEST}


def examples(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first prompt, and the next ones that show something new, MOST in all.

    New is a column that the others lacked or had, a value of another type, one that is empty or zero, or another of
    the few values of a column.
    """
    names = sorted({name for prompt in prompts for name in prompt.columns})
    kinds = {name for name in names if _few_values(prompts, name)}
    chosen: list[Prompt] = []
    seen: set[tuple[str, str, str | bool]] = set()
    for prompt in prompts:
        values = {name: prompt.columns.get(name) for name in names}
        shown = {(name, type(value).__name__, str(value) if name in kinds else bool(value))
                 for name, value in values.items()}
        if not chosen or not shown <= seen:
            chosen.append(prompt)
            seen |= shown
        if len(chosen) == MOST:
            break
    return chosen


def report_lines(groups: Sequence[ScoredGroup]) -> Iterator[str]:
    """What a trial gave, for a reader: a heading and a line a reward, with the values of each prompt's first TEXTS."""
    if not groups:
        return
    shown = {scored.group.prompt.uid: scored for scored in groups}  # a prompt may be there for several processes
    yield f"rewards of made-up completions (short, empty, long) of {len(shown)} prompt(s); -: None"
    for name in groups[0].terms:
        rows = (" ".join(map(_number, scored.terms[name][:len(TEXTS)])) for scored in shown.values())
        yield f"  {name}: {' | '.join(rows)}"
    for name in groups[0].terms:
        for column, values in _of_columns(name, [*shown.values()]).items():
            yield f"  {name}, where the completion is the column {column!r}: {' | '.join(values)}"


def _of_columns(name: str, groups: Sequence[ScoredGroup]) -> dict[str, list[str]]:
    """Column -> what a reward gives to its values as completions, where that is nothing it gave to TEXTS."""
    found: dict[str, list[str]] = {}
    usual = {_number(value) for scored in groups for value in scored.terms[name][:len(TEXTS)]}
    for scored in groups:
        for column, value in zip(column_texts(scored.group.prompt), scored.terms[name][len(TEXTS):]):
            found.setdefault(column, []).append(_number(value))
    return {column: values for column, values in found.items() if {*values} - usual}


def constant_rewards(groups: Sequence[ScoredGroup]) -> Iterator[str]:
    """A note for each reward that gives 0 to all made-up completions, each column's own value among them."""
    for name in groups[0].terms if groups else ():
        tried = {column for scored in groups
                 for column, _ in zip(column_texts(scored.group.prompt), scored.rewards_G[len(TEXTS):])}
        if tried and not any(scored.terms[name].any() for scored in groups):
            yield (f"note: reward {name!r} gives 0 to every made-up completion: short, empty, long, and the value of "
                   f"{', '.join(sorted(tried))}; see that it can give more")


def _few_values(prompts: Sequence[Prompt], name: str) -> bool:
    """Whether a column tells kinds of prompts apart: texts or whole numbers, of which there are few."""
    found = set()
    for prompt in prompts:
        value = prompt.columns.get(name)
        if isinstance(value, str | int):
            found.add(value)
        elif value is not None:
            return False
        if len(found) > MOST:
            return False
    return True


def _completion(text: str, prompt: Prompt) -> Completion:
    """Its token ids are the prompt's: the vocabulary certainly has them. An empty text has one, as an end has."""
    token_ids = prompt.token_ids if text else prompt.token_ids[-1:]
    return Completion(text=text, token_ids=np.array(token_ids), logprobs=np.zeros(len(token_ids)),
                      loss_mask=np.full(len(token_ids), True), version_spans=(), seed=0, finish_reason="stop")


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4g}"
