"""Try every reward before anything slow starts: call it on made-up completions of a few of the run's own prompts.

The trial finds a function that needs a missing column, returns too few values or takes completions in the other
format. The trial cannot check whether values are right; it prints them for the user.
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
from frpo.rewards.worker import RewardCallError, RewardTimeoutError, Worker
from frpo.types import Completion, Prompt, RolloutGroup, ScoredGroup

logger = logging.getLogger(__name__)

TEXTS = ("A short answer.", "", " ".join(["A long answer."] * 40))
"""A short, an empty and a long completion (599 characters).

The empty completion is not the first. Since it has no first character, it would hide the error of a function that
takes message lists.
"""

LONGEST = 2000
"""Most characters of a column's value that is tried as a completion."""

TRIED = ("this was a test call before the run, with made-up completions (short, empty, long) of prompts of the data "
         "(checks.rewards)")

MOST = 8
"""Most prompts that are tried, and most distinct values of a column that marks a kind of prompt, such as a task."""


def try_share(spec: RewardSpec, pool: RewardPool, batch: Batch, share: slice, stop: Stop) -> Component:
    """Score a share as `score_share` does, with the time limit of a first call, and explain errors.

    Under `on_error: abstain` an exception is a warning, unless the function only takes the other format.
    """
    try:
        return called(spec, spec.format, pool, batch, share, stop, Worker.first_call)
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
        logger.warning("%s; under on_error: abstain the call gives None", told)
        return failed(error, share)


def _succeeds(error: RewardError, spec: RewardSpec, form: Format, pool: RewardPool, batch: Batch, share: slice,
              stop: Stop) -> bool:
    """Check whether a call that raised succeeds if prompts and completions have the format `form` instead."""
    if not isinstance(error, RewardCallError) or isinstance(error, RewardTimeoutError):
        return False
    parameters = pool.workers[0].start(stop)
    if not parameters.open and not {"prompts", "completions"} & {*parameters.named}:
        return False  # the format changes nothing
    try:
        called(spec, form, pool, batch, share, stop, Worker.first_call)
    except RewardError:
        return False
    return True


def made_up(prompts: Sequence[Prompt], group_size: int, at_least: int) -> list[RolloutGroup]:
    """Make a group for each prompt of `examples`, and repeat the prompts up to `at_least` groups.

    The completions of a group are TEXTS and the values of the prompt's columns, in turn.
    """
    chosen = examples(prompts)
    return [RolloutGroup(group_id=(0, draw), prompt=prompt,
                         completions=tuple(_completion(text, prompt) for text in islice(
                             cycle((*TEXTS, *column_texts(prompt).values())), group_size)))
            for draw, prompt in enumerate(islice(cycle(chosen), max(at_least, len(chosen))))]


def column_texts(prompt: Prompt) -> dict[str, str]:
    """Return column -> its value as a text, for columns that may hold the right answer."""
    return {name: str(value) for name, value in prompt.columns.items()
            if isinstance(value, str | int | float) and not isinstance(value, bool) and 0 < len(str(value)) <= LONGEST}


def examples(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Choose the first prompt and each next prompt that shows something new, at most MOST in all.

    A prompt is new if a column is present or missing for the first time, or has a value of a new type, a first empty or
    zero value, or a new one of the column's few values.
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
    """Yield the results of a trial as text: a heading, and a line a reward with each prompt's values of TEXTS.

    Further lines show the values of columns tried as completions, if they differ from those of TEXTS.
    """
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
    """Return column -> the reward's values for the column as completion, if any of them was not given to TEXTS."""
    found: dict[str, list[str]] = {}
    usual = {_number(value) for scored in groups for value in scored.terms[name][:len(TEXTS)]}
    for scored in groups:
        for column, value in zip(column_texts(scored.group.prompt), scored.terms[name][len(TEXTS):]):
            found.setdefault(column, []).append(_number(value))
    return {column: values for column, values in found.items() if {*values} - usual}


def constant_rewards(groups: Sequence[ScoredGroup]) -> Iterator[str]:
    """Yield a note for each reward that gives 0 to all made-up completions, including each column's own value."""
    for name in groups[0].terms if groups else ():
        tried = {column for scored in groups
                 for column, _ in zip(column_texts(scored.group.prompt), scored.rewards_G[len(TEXTS):])}
        if tried and not any(scored.terms[name].any() for scored in groups):
            yield (f"note: reward {name!r} gives 0 to every made-up completion: short, empty, long, and the value of "
                   f"{', '.join(sorted(tried))}; check that it can give more")


def _few_values(prompts: Sequence[Prompt], name: str) -> bool:
    """Check whether a column marks kinds of prompts: it holds texts or whole numbers, at most MOST distinct ones."""
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
    """Make a completion with the prompt's token ids, which the vocabulary certainly has.

    An empty text has one token, as a completion of only the end-of-sequence token has.
    """
    token_ids = prompt.token_ids if text else prompt.token_ids[-1:]
    return Completion(text=text, token_ids=np.array(token_ids), logprobs=np.zeros(len(token_ids)),
                      loss_mask=np.full(len(token_ids), True), version_spans=(), seed=0, finish_reason="stop")


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4g}"
