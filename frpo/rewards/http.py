"""Ask a server over HTTP: reward functions for a scorer, for a language model as judge, and for a moderator.

These arguments are common to all:

url: http or https. A user name in it, and a query parameter that is named like a key, are refused.
key_env: name of the environment variable whose value is sent as `Authorization: Bearer`. No message shows the value.
max_concurrent: most requests of one call at the same time. Each of the reward's `processes` makes calls of its own.
timeout_s: limit for one try of a request, from connecting to the end of the answer.
retries: further tries of a request after a lost connection, a time-out, status 429 or status 5xx. Any other status but
    2xx is an error at once.
backoff_s: pause before the first retry, doubled for each next one, with jitter. If the server's Retry-After is longer,
    it is obeyed. No pause is longer than 30 s. A request that pauses counts as running.
partial: true: a request that fails for good costs only its own completions their scores. They abstain, and a warning
    counts the requests. If all requests of a call fail, the call fails.

A request takes at most (retries + 1) * timeout_s, and the pauses. A call with more than `max_concurrent` requests takes
several times as long. The recipe's `rewards[].timeout_s` limits the whole call: beyond, frpo kills the worker process.
Retries happen within one call only.

Without `partial`, the first request that fails for good ends the call: the others are cancelled, and RewardError is
raised. The recipe's `on_error` then decides about all completions of the call. NaN and infinity in an answer are left
to frpo's own checks.
"""
from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from frpo.errors import RewardError
from frpo.loading import did_you_mean, parameters_of
from frpo.rewards.endpoint import Body, Endpoint, UnexpectedError, check_number, is_number
from frpo.rewards.protocol import BATCH_ARGUMENTS, Message
from frpo.rewards.verifiers import Completions, texts

logger = logging.getLogger(__name__)

Prompts = Sequence[str] | Sequence[list[Message]]

_NUMBER = re.compile(r"(?<![\w.])[-−+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_NAMED = re.compile(r"\{\{([A-Za-z_]\w*)\}\}|\{([A-Za-z_]\w*)\}")
_RENAME = "a data column of this name needs data.rename"


async def scores(
    prompts: Prompts, completions: Completions, url: str, columns: Sequence[str] = (), key_env: str | None = None,
    max_concurrent: int = 16, batch_size: int = 64, timeout_s: float = 30.0, retries: int = 3, backoff_s: float = 0.5,
    partial: bool = False, **data_columns: Any,
) -> list[float | None]:
    """Return the scores that a server gives: POST {"prompts", "completions", "columns"} -> {"scores": [...]}.

    The request holds up to `batch_size` completions, as many prompts, and in `columns` each column as a list of as many
    values. Prompts and completions are strings, or message lists with the recipe's `format: messages`. A request may
    hold a part of a group. The answer holds one number for each completion, or null, which abstains.
    columns: names of the data columns to send, also `completion_ids`; none by default.
    For the other arguments see the module. Raises RewardError for a wrong argument and for a failed request.
    """
    server = Endpoint(url=url, key_env=key_env, max_concurrent=max_concurrent, timeout_s=timeout_s, retries=retries,
                      backoff_s=backoff_s, partial=partial)
    check_number("batch_size", batch_size, 1, whole=True)
    _check_columns(scores, data_columns, len(completions))
    if isinstance(columns, str) or not isinstance(columns, Sequence):
        raise RewardError(f"columns must be a list of names of data columns, given {columns!r:.80}")
    for name in columns:
        _check_known("columns", name, data_columns)
    parts = _parts(len(completions), batch_size)
    answers = await server.ask([
        {"prompts": prompts[part], "completions": completions[part],
         "columns": {name: data_columns[name][part] for name in columns}} for part in parts], _read_scores)
    return _joined(answers, parts)


async def judged(
    prompts: Prompts, completions: Completions, url: str, model: str, template: str, pattern: str | None = None,
    choices: Mapping[str, float] | None = None, temperature: float | None = 0.0, max_tokens: int | None = 512,
    extra_body: Mapping[str, Any] | None = None, key_env: str | None = None, max_concurrent: int = 16,
    timeout_s: float = 30.0, retries: int = 3, backoff_s: float = 0.5, partial: bool = False, **data_columns: Any,
) -> list[float | None]:
    """Return the scores that a language model gives as a judge: one request for each completion.

    url: base of an OpenAI-compatible API, such as "http://127.0.0.1:8000/v1"; "/chat/completions" is added.
    template: message to the judge. {prompt}, {completion} and {NAME} of a data column are replaced; other braces stay,
        and {{NAME}} gives {NAME}. A completion whose row lacks one of these columns abstains, without a request.
    pattern: read only group 1 of its *last* match in the reply (`.` matches newlines), not the whole reply.
    choices: text -> score, such as {"yes": 1.0, "no": 0.0}. The text is compared without case and without the blanks
        and punctuation around it. Without `choices` the score is the first number: 8 in "8/10".
    temperature, max_tokens: sent to the API; null leaves them out. extra_body: further fields to send.
    For the other arguments see the module.

    A reply without a match, a choice or a number abstains (None); a warning counts these replies at each call.
    Raises RewardError for a wrong argument and for a failed request.
    """
    server = Endpoint(url=url, path="/chat/completions", key_env=key_env, max_concurrent=max_concurrent,
                      timeout_s=timeout_s, retries=retries, backoff_s=backoff_s, partial=partial)
    _check_columns(judged, data_columns, len(completions))
    _check_text("model", model)
    read = _reader(pattern, choices)
    offered = {**data_columns, "prompt": [_dialogue(prompt) for prompt in prompts], "completion": [*texts(completions)]}
    asked = _filled(template, offered, len(completions))
    limits = {"temperature": temperature, "max_tokens": max_tokens}
    settings = {name: value for name, value in limits.items() if value is not None}
    replies = await server.ask(
        [{"model": model, "messages": [{"role": "user", "content": text}], **settings, **(extra_body or {})}
         for text in asked.values()], _read_reply)
    found = {index: None if reply is None else read(reply) for index, reply in zip(asked, replies, strict=True)}
    unread = [reply for reply, score in zip(replies, found.values()) if reply is not None and score is None]
    if unread:
        logger.warning("%s: %d of %d replies hold no score, the first is %s; their completions abstain",
                       server.label, len(unread), len(replies), server.quoted(unread[0]))
    return [found.get(index) for index in range(len(completions))]


async def moderated(
    completions: Completions, url: str, model: str | None = None, category: str | None = None,
    key_env: str | None = None, max_concurrent: int = 16, batch_size: int = 32, timeout_s: float = 30.0,
    retries: int = 3, backoff_s: float = 0.5, partial: bool = False,
) -> list[float | None]:
    """Return 1.0 for each completion that a moderator flags, else 0.0. This is a cost: give it a negative weight.

    url: base of an OpenAI-compatible API, such as "https://api.openai.com/v1"; "/moderations" is added. Prompts are not
        sent. A blank completion is not sent either, since servers refuse blank inputs; it gets 0.0.
    model: name of the moderation model; null leaves the choice to the server.
    category: return the score of this category instead, such as "violence".
    batch_size: most completions in one request.
    For the other arguments see the module. Raises RewardError for a wrong argument and for a failed request.
    """
    server = Endpoint(url=url, path="/moderations", key_env=key_env, max_concurrent=max_concurrent,
                      timeout_s=timeout_s, retries=retries, backoff_s=backoff_s, partial=partial)
    check_number("batch_size", batch_size, 1, whole=True)
    for name, value in (("model", model), ("category", category)):
        _check_text(name, value, optional=True)
    sent = {index: text for index, text in enumerate(texts(completions)) if text.strip()}
    inputs = [*sent.values()]
    parts = _parts(len(inputs), batch_size)
    answers = await server.ask([{"input": inputs[part], **({} if model is None else {"model": model})}
                                for part in parts], lambda answer, body: _read_flags(answer, body, category))
    found = dict(zip(sent, _joined(answers, parts), strict=True))
    return [found.get(index, 0.0) for index in range(len(completions))]


def _parts(count: int, size: int) -> list[slice]:
    return [slice(first, min(count, first + size)) for first in range(0, count, size)]


def _joined(answers: Sequence[Sequence[float | None] | None], parts: Sequence[slice]) -> list[float | None]:
    """Join the scores of all requests. A failed request has None for each of its completions."""
    return [score for answer, part in zip(answers, parts, strict=True)
            for score in ([None] * (part.stop - part.start) if answer is None else answer)]


def _read_scores(answer: Any, body: Body) -> list[float | None]:
    count = len(body["completions"])
    expected = f'{{"scores": [...]}} with one number or null for each of {count} completions'
    found = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise UnexpectedError(expected)
    if len(found) != count:
        raise UnexpectedError(f"{expected}, but there are {len(found)} scores")
    for index, score in enumerate(found):
        if score is not None and not is_number(score):
            raise UnexpectedError(f"{expected}, but scores[{index}] is of type {type(score).__name__}")
    return found


def _read_reply(answer: Any, _: Body) -> str:
    try:
        content = answer["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        content = False
    if not isinstance(content, str | None):
        raise UnexpectedError('{"choices": [{"message": {"content": TEXT}}]}')
    return content or ""  # null if the judge refused, or was still thinking at max_tokens


def _read_flags(answer: Any, body: Body, category: str | None) -> list[float]:
    count = len(body["input"])
    part = '"flagged": true or false' if category is None else f'"category_scores": {{"{category}": NUMBER}}'
    expected = f'{{"results": [...]}} with {{{part}}} for each of {count} completions'
    found = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(found, list) or len(found) != count:
        raise UnexpectedError(expected)
    flags = [_flag(result, category) for result in found]
    for result, flag in zip(found, flags, strict=True):
        if flag is None:
            named = result.get("category_scores") if isinstance(result, dict) else None
            known = f"; it has the categories {', '.join(named)}" if isinstance(named, dict) and category else ""
            raise UnexpectedError(expected + known)
    return [flag for flag in flags if flag is not None]


def _flag(result: Any, category: str | None) -> float | None:
    if not isinstance(result, dict):
        return None
    if category is None:
        flag = result.get("flagged")
        return float(flag) if isinstance(flag, bool) else None
    table = result.get("category_scores")
    score = table.get(category) if isinstance(table, dict) else None
    return score if is_number(score) else None


def _reader(pattern: str | None, choices: Mapping[str, float] | None) -> Callable[[str], float | None]:
    """Return the function that reads the score in a reply."""
    _check_text("pattern", pattern, optional=True)
    wanted = re.compile(pattern, re.DOTALL) if pattern is not None else None
    if wanted is not None and not wanted.groups:
        raise RewardError(f"pattern {pattern!r} has no group; put parentheses around the score")
    table = None if choices is None else _table(choices)

    def read(reply: str) -> float | None:
        if wanted is not None:
            matches = list(wanted.finditer(reply))
            reply = (matches[-1][1] or "") if matches else ""
        if table is not None:
            return table.get(_bare(reply))
        number = _NUMBER.search(reply)
        return float(number[0].replace("−", "-")) if number else None

    return read


def _table(choices: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(choices, Mapping) or not choices:
        raise RewardError(f'choices must map texts to numbers, such as {{"yes": 1.0, "no": 0.0}}, given '
                          f"{choices!r:.80}; {_RENAME}")
    for text, score in choices.items():
        if not isinstance(text, str):
            raise RewardError(f"choices has {text!r}, which is no text; put it in quotes (YAML reads yes, no, on and "
                              "off as booleans)")
        if not is_number(score):
            raise RewardError(f"choices[{text!r}] must be a number, given {score!r:.80}")
    return {_bare(text): float(score) for text, score in choices.items()}


def _bare(text: str) -> str:
    return text.strip(" \t\r\n.,;:!?\"'`*()[]").casefold()


def _filled(template: str, offered: Mapping[str, Sequence[Any]], count: int) -> dict[int, str]:
    """Fill the template for each completion whose row has all columns that it names. Returns index -> text."""
    _check_text("template", template)
    names = {match[2] for match in _NAMED.finditer(template) if match[2]}
    for name in sorted(names):
        _check_known("template", name, offered)
    if "completion" not in names:
        raise RewardError("template has no {completion}, so the judge would not see the completion; add it")
    rows = ({name: offered[name][index] for name in names} for index in range(count))
    return {index: _insert(template, row) for index, row in enumerate(rows) if None not in row.values()}


def _insert(template: str, row: Mapping[str, Any]) -> str:
    return _NAMED.sub(lambda match: f"{{{match[1]}}}" if match[1] else str(row[match[2]]), template)


def _dialogue(prompt: str | Sequence[Message]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _check_text(name: str, value: Any, optional: bool = False) -> None:
    if not isinstance(value, str) and not (optional and value is None):
        raise RewardError(f"{name} must be a text{' or null' if optional else ''}, given {value!r:.80}; {_RENAME}")


def _check_known(where: str, name: str, offered: Mapping[str, Any]) -> None:
    if name not in offered:
        raise RewardError(f"{where} names {name!r}{did_you_mean(name, offered)}, which is no data column; allowed are: "
                          f"{', '.join(offered) or 'none'}")


def _check_columns(function: Callable[..., Any], columns: Mapping[str, Any], count: int) -> None:
    """Refuse a misspelt kwarg. It arrives among the data columns, but is no list of one value for each completion."""
    known = [name for name in parameters_of(function).named if name not in BATCH_ARGUMENTS]
    for name, values in columns.items():
        if not isinstance(values, list) or len(values) != count:
            raise RewardError(f"{function.__name__} has no argument {name!r}{did_you_mean(name, known)}, but its "
                              f"kwargs set it; it takes: {', '.join(known)}")
