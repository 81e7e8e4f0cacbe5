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
from frpo.types import Prompt

if TYPE_CHECKING:
    from frpo.config.sections import DataSection

Messages = tuple[Mapping[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """All prompts of a run.

    train: in the order of the data set. heldout: never trained on, in an order that only their content decides.
    digest: hash of the content of both, for the run's manifest. skipped: reason -> how many were left out.
    """

    train: tuple[Prompt, ...]
    heldout: tuple[Prompt, ...]
    digest: str
    skipped: Mapping[str, int]


def load_prompts(data: DataSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> PromptSet:
    """Read, render, tokenize and split the prompts that `data` describes. `seed` orders generated arithmetic only.

    The `data.heldout` rows with the smallest uids are held out. A uid is a hash of the row's content, so neither the
    run's seed, nor the order of the file, nor the tokenizer changes what is held out. With `data.heldout_path` every
    row of that file is held out instead. A training prompt with the tokens of a held-out one is removed and counted.
    Raises DataError for broken rows and when nothing is left to train on, ModelError for an unfit tokenizer.
    """
    check_tokenizer(tokenizer, needs_chat=data.format == "chat")
    train, skipped = _read(data, data.path, data.limit, tokenizer, seed)
    if data.heldout_path is None:
        heldout = _smallest_uids(train, data.heldout)
    else:
        evaluation, skipped_there = _read(data, data.heldout_path, None, tokenizer, seed)
        heldout = _smallest_uids(evaluation, len(evaluation))
        skipped |= {f"{reason} (held-out file)": count for reason, count in skipped_there.items()}
    withheld = {prompt.token_ids for prompt in heldout}
    kept = tuple(prompt for prompt in train if prompt.token_ids not in withheld)
    extra = len(train) - len(kept) - (len(heldout) if data.heldout_path is None else 0)
    if extra:
        skipped["same prompt as a held-out one"] = extra
    if not kept:
        raise DataError(f"nothing left to train on: all of the {len(train)} prompts of {data.path!r} are held out; "
                        f"lower data.heldout (given {data.heldout}), or give more rows or another data.heldout_path")
    return PromptSet(train=kept, heldout=heldout, digest=_digest(kept, heldout), skipped=skipped)


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

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.prompts))
        # A pair as entropy, not seed + epoch: run 1's first epoch would be run 0's second.
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self.prompts))


def _read(data: DataSection, path: str, limit: int | None, tokenizer: PreTrainedTokenizerBase,
          seed: int) -> tuple[list[Prompt], dict[str, int]]:
    """Prompts of one source in its order, and what was skipped."""
    rows, skipped = read_rows(path, split=data.split, limit=limit, seed=seed, subset=data.subset), {}
    rows = select(rows, data.where, data.rename)
    if data.format == "calculator":
        rows, skipped = calculator_rows(rows)
        if not rows:
            raise DataError(f"data set {path!r} has no usable <<expression=value>> annotation in column 'answer' "
                            f"(skipped: {skipped}); data.format: calculator reads GSM8K rows")
    return [_prompt(row, data, tokenizer) for row in rows], skipped


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
    messages = () if isinstance(content, str) else content
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
