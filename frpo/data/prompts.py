"""The prompts of a run: rows rendered and tokenized, a held-out part set aside, and an endless stream to draw from.

Does not sample completions, score them or remember a position: the trainer's cursor is the only state of the stream.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from frpo.data.calculator import calculator_rows
from frpo.data.chat import ROLES, check_tokenizer, render, render_text
from frpo.data.source import Row, column, read_rows, select
from frpo.errors import DataError
from frpo.types import Prompt, ScoredGroup

if TYPE_CHECKING:
    from frpo.config.sections import DataSection

Messages = tuple[Mapping[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """All prompts of a run.

    train: in the order of the data set. heldout: never trained on, in an order that only their content decides.
    digest: hash of the content of both, for the run's manifest. skipped: reason -> how many were left out.
    overlap: how many of train have the tokens of a held-out prompt (only with `data.heldout_overlap: keep`).
    """

    train: tuple[Prompt, ...]
    heldout: tuple[Prompt, ...]
    digest: str
    skipped: Mapping[str, int]
    overlap: int = 0


def load_prompts(data: DataSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> PromptSet:
    """Read, render, tokenize and split the prompts that `data` describes. `seed` orders generated arithmetic only.

    The `data.heldout` rows with the smallest uids are held out. A uid is a hash of the row's content, so neither the
    run's seed, nor the order of the file, nor the tokenizer changes what is held out. A training prompt with the tokens
    of a held-out one is removed and counted. With `data.heldout_path` every row of that file is held out instead, and
    `data.heldout_overlap` says what happens to such training prompts.
    Raises DataError for broken rows, for an overlap that is refused and when nothing is left to train on, ModelError
    for an unfit tokenizer.
    """
    check_tokenizer(tokenizer, needs_chat=data.format == "chat")
    train = _read(data, data.path, data.limit, tokenizer, seed)
    if data.heldout_path is None:
        heldout, skipped = _smallest_uids(train.prompts, data.heldout), dict(train.skipped)
    else:
        evaluation = _read(data, data.heldout_path, None, tokenizer, seed)
        heldout = _smallest_uids(evaluation.prompts, len(evaluation.prompts))
        skipped = train.skipped | {f"{why} (held-out file)": count for why, count in evaluation.skipped.items()}
        if data.heldout_overlap == "refuse":
            _refuse_overlap(data, train, evaluation)
    withheld = {prompt.token_ids for prompt in heldout}
    kept = tuple(prompt for prompt in train.prompts if prompt.token_ids not in withheld)
    extra = len(train.prompts) - len(kept) - (len(heldout) if data.heldout_path is None else 0)
    if data.heldout_path is not None and data.heldout_overlap == "keep":
        return PromptSet(train=train.prompts, heldout=heldout, digest=_digest(train.prompts, heldout), skipped=skipped,
                         overlap=extra)
    if extra:
        skipped["same prompt as a held-out one"] = extra
    if not kept:
        raise DataError(f"nothing left to train on: all of the {len(train.prompts)} prompts of {data.path!r} are held "
                        f"out; lower data.heldout (given {data.heldout}), or give more rows or another "
                        "data.heldout_path")
    return PromptSet(train=kept, heldout=heldout, digest=_digest(kept, heldout), skipped=skipped)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Prompts chosen from a stretch of the stream.

    positions_used: length of the stretch, by which the caller's cursor moves; those beyond the prompts were passed
    over. revisited: prompts drawn by chance although out of bounds. forced: drawn so because there was no better.
    """

    prompts: tuple[Prompt, ...]
    positions_used: int
    revisited: int
    forced: int


class PromptStream:
    """An endless sequence of prompts, epoch after epoch; position `i` holds the same prompt whenever it is asked for.

    shuffle: each epoch is a permutation of all prompts, drawn from (seed, epoch); otherwise the given order repeats.
    """

    def __init__(self, prompts: tuple[Prompt, ...], seed: int, shuffle: bool) -> None:
        if not prompts:
            raise DataError("a prompt stream needs at least one prompt")
        self.prompts, self.seed, self.shuffle = prompts, seed, shuffle

    def take(self, cursor: int, count: int) -> tuple[Prompt, ...]:
        """The prompts at positions [cursor, cursor + count), over as many epochs as that covers."""
        drawn: list[Prompt] = []
        while len(drawn) < count:
            epoch, offset = divmod(cursor + len(drawn), len(self.prompts))
            order = self._order(epoch)[offset:offset + count - len(drawn)]
            drawn.extend(self.prompts[i] for i in order)
        return tuple(drawn)

    def choose(self, cursor: int, count: int) -> Choice:
        """`take` as a choice: of the next prompts none is passed over."""
        return Choice(prompts=self.take(cursor, count), positions_used=count, revisited=0, forced=0)

    def record(self, groups: Iterable[ScoredGroup]) -> None:
        """How prompts were answered changes nothing here."""

    @property
    def state(self) -> dict[str, list[float]]:
        """A stream remembers nothing."""
        return {}

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.prompts))
        # A pair as entropy, not seed + epoch: run 1's first epoch would be run 0's second.
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self.prompts))


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Prompts of one source in its order, where each comes from, and what was skipped."""

    prompts: tuple[Prompt, ...]
    origins: tuple[str, ...]
    skipped: Mapping[str, int]


def _read(data: DataSection, path: str, limit: int | None, tokenizer: PreTrainedTokenizerBase, seed: int) -> _Source:
    rows, skipped = read_rows(path, split=data.split, limit=limit, seed=seed, subset=data.subset), {}
    rows = select(rows, data.where, data.rename)
    if data.format == "calculator":
        rows, skipped = calculator_rows(rows)
        if not rows:
            raise DataError(f"data set {path!r} has no usable <<expression=value>> annotation in column 'answer' "
                            f"(skipped: {skipped}); data.format: calculator reads GSM8K rows")
    return _Source(prompts=tuple(_prompt(row, data, tokenizer) for row in rows),
                   origins=tuple(row.origin for row in rows), skipped=skipped)


def _refuse_overlap(data: DataSection, train: _Source, evaluation: _Source) -> None:
    places: dict[tuple[int, ...], str] = {}
    for prompt, origin in zip(evaluation.prompts, evaluation.origins):
        places.setdefault(prompt.token_ids, origin)
    shared = [(origin, places[prompt.token_ids])
              for prompt, origin in zip(train.prompts, train.origins) if prompt.token_ids in places]
    if shared:
        raise DataError(
            f"{len(shared)} of the {len(train.prompts)} training prompts of data.path {data.path!r} are held-out "
            f"prompts of data.heldout_path {data.heldout_path!r} too (the first: {shared[0][0]}, as {shared[0][1]}); "
            "data.heldout_overlap is 'refuse': set it to 'remove' to leave them out of training or to 'keep' to train "
            "on them all the same, or give other files")


def _prompt(row: Row, data: DataSection, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    name, content = _CONTENT[data.format](row, data)
    try:
        ids = render_text(content, tokenizer) if isinstance(content, str) else render(content, tokenizer)
    except DataError as error:
        raise DataError(f"{row.origin}: {error}") from error
    if not ids:
        raise DataError(f"{row.origin}: the prompt has no tokens; remove the row")
    if len(ids) > data.max_prompt_tokens:
        raise DataError(f"{row.origin}: the prompt has {len(ids)} tokens, data.max_prompt_tokens allows "
                        f"{data.max_prompt_tokens}; shorten or remove the row, or raise the limit")
    columns = {key: value for key, value in row.columns.items() if key != name}
    # Verbatim text is one message too, so that rewards and traces have it.
    messages = ({"role": "user", "content": content},) if isinstance(content, str) else content
    return Prompt(uid=_hash([content, columns])[:16], messages=messages, token_ids=ids, columns=columns)


def _chat_content(row: Row, data: DataSection) -> tuple[str, Messages]:
    """The messages of a row: its own list, or its text as one user message; the system prompt before them."""
    value = column(row, data.prompt_column, str, list)
    messages = ({"role": "user", "content": value},) if isinstance(value, str) else _checked_messages(row, value)
    if data.system_prompt is not None:
        if messages[0]["role"] == "system":
            raise DataError(f"{row.origin}: the row has a system message of its own; remove it or data.system_prompt")
        messages = ({"role": "system", "content": data.system_prompt}, *messages)
    return data.prompt_column, messages


def _checked_messages(row: Row, messages: list[Any]) -> Messages:
    """Messages with nothing but role and content, the last of them one that an assistant answers."""
    if not messages:
        raise DataError(f"{row.origin}: the list of messages is empty; give at least one user message")
    checked = []
    for number, message in enumerate(messages):
        # Data sets fill keys that only other rows have with None.
        given = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else message
        if (not isinstance(given, dict) or set(given) != {"role", "content"} or given["role"] not in ROLES
                or not isinstance(given["content"], str)):
            raise DataError(f"{row.origin}: message {number} must be {{role: {'|'.join(ROLES)}, content: text}}, "
                            f"given {message!r:.80}")
        checked.append(given)
    if checked[-1]["role"] not in ("user", "tool"):
        raise DataError(f"{row.origin}: the last message must be the user's or a tool's, since the assistant answers "
                        f"it; given {checked[-1]['role']!r}")
    return tuple(checked)


def _text_content(row: Row, data: DataSection) -> tuple[str, str]:
    return data.prompt_column, column(row, data.prompt_column, str)


def _calculator_content(row: Row, data: DataSection) -> tuple[str, str]:
    return "prompt", column(row, "prompt", str)  # made by calculator_rows, so data.prompt_column does not apply


_CONTENT: Mapping[str, Callable[[Row, Any], tuple[str, str | Messages]]] = {
    "chat": _chat_content, "text": _text_content, "calculator": _calculator_content}


def _smallest_uids(prompts: Iterable[Prompt], count: int) -> tuple[Prompt, ...]:
    """The `count` prompts with the smallest uids, no two with the same tokens."""
    chosen: dict[tuple[int, ...], Prompt] = {}
    for prompt in sorted(prompts, key=lambda prompt: prompt.uid):
        if len(chosen) == count:
            break
        chosen.setdefault(prompt.token_ids, prompt)
    return tuple(chosen.values())


def _digest(train: Iterable[Prompt], heldout: Iterable[Prompt]) -> str:
    return _hash([[prompt.uid for prompt in part] for part in (train, heldout)])


def _hash(value: Any) -> str:
    """SHA-256 of the value as canonical JSON; what JSON lacks (dates, say) counts by its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
