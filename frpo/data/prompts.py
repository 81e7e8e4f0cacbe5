"""Load the prompts of a run: render and tokenize rows, set a held-out part aside, and draw from an endless stream.

This module does not sample or score completions and keeps no position: the trainer's cursor is the stream's only state.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from frpo.data.chat import Messages, check_tokenizer, checked_messages, render, render_text, with_system
from frpo.data.heldout import Source, Split, content_hash, set_aside
from frpo.data.order import epoch_order
from frpo.data.sets.calculator import calculator_rows
from frpo.data.source import Row, column, read_rows, select
from frpo.data.vocabulary import check_vocabulary
from frpo.errors import DataError
from frpo.types import Prompt, ScoredGroup

if TYPE_CHECKING:
    from frpo.config.sections import DataSection

PromptSet = Split[Prompt]
"""All prompts of a run."""


def load_prompts(data: DataSection, tokenizer: PreTrainedTokenizerBase, seed: int, embeddings: int | None = None
                 ) -> PromptSet:
    """Read, render, tokenize and split the prompts that `data` describes. `seed` orders generated arithmetic only.

    embeddings: number of the model's embeddings; None: do not check. `set_aside` decides which prompts are held out and
    which overlap is refused. Two prompts with the same tokens are the same.
    Raises DataError for broken rows, for an overlap that is refused and if nothing is left to train on. Raises
    ModelError for an unfit tokenizer, and naming a row that needs a token without an embedding.
    """
    check_tokenizer(tokenizer, needs_chat=data.format == "chat")
    train = _read(data, data.path, data.limit, tokenizer, seed)
    evaluation = None if data.heldout_path is None else _read(data, data.heldout_path, None, tokenizer, seed)
    if embeddings is not None:
        check_vocabulary(filter(None, (train, evaluation)), tokenizer, embeddings)
    return set_aside(train, evaluation, data)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Prompts chosen from a range of the stream.

    positions_used: length of the range, by which the caller must move the cursor; it counts skipped prompts too.
    revisited: number of prompts drawn by chance although out of bounds. forced: number of prompts drawn although out
    of bounds because too few were within bounds.
    """

    prompts: tuple[Prompt, ...]
    positions_used: int
    revisited: int
    forced: int


class PromptStream:
    """Endless sequence of prompts, epoch after epoch. Position `i` always holds the same prompt.

    shuffle: each epoch is a permutation of all prompts, drawn from (seed, epoch); otherwise the given order repeats.
    """

    def __init__(self, prompts: tuple[Prompt, ...], seed: int, shuffle: bool) -> None:
        if not prompts:
            raise DataError("a prompt stream needs at least one prompt")
        self.prompts, self.seed, self.shuffle = prompts, seed, shuffle

    def take(self, cursor: int, count: int) -> tuple[Prompt, ...]:
        """Return the prompts at positions [cursor, cursor + count), across epochs if needed."""
        drawn: list[Prompt] = []
        while len(drawn) < count:
            epoch, offset = divmod(cursor + len(drawn), len(self.prompts))
            order = epoch_order(len(self.prompts), self.seed, epoch, self.shuffle)[offset:offset + count - len(drawn)]
            drawn.extend(self.prompts[i] for i in order)
        return tuple(drawn)

    def choose(self, cursor: int, count: int) -> Choice:
        """Choose the prompts of `take`: no prompt is skipped."""
        return Choice(prompts=self.take(cursor, count), positions_used=count, revisited=0, forced=0)

    def record(self, groups: Iterable[ScoredGroup]) -> None:
        """Ignore the scored groups: this stream does not depend on them."""

    @property
    def state(self) -> dict[str, list[float]]:
        """Return an empty state: this stream keeps none."""
        return {}


def _read(data: DataSection, path: str, limit: int | None, tokenizer: PreTrainedTokenizerBase, seed: int
          ) -> Source[Prompt]:
    rows = read_rows(path, split=data.split, limit=limit, seed=seed, subset=data.subset)
    rows = select(rows, data.where, data.rename)
    skipped: dict[str, int] = {}
    if data.format == "calculator":
        rows, skipped = calculator_rows(rows)
        if not rows:
            raise DataError(f"data set {path!r} has no usable <<expression=value>> annotation in column 'answer' "
                            f"(skipped: {skipped}); give GSM8K rows, or set another data.format")
    return Source(items=tuple(_prompt(row, data, tokenizer) for row in rows),
                  origins=tuple(row.origin for row in rows), skipped=skipped)


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
    return Prompt(uid=content_hash([content, columns])[:16], messages=messages, token_ids=ids, columns=columns,
                  origin=row.origin)


def _chat_content(row: Row, data: DataSection) -> tuple[str, Messages]:
    """Return the system prompt, then the row's list of messages, or its text as one user message."""
    value = column(row, data.prompt_column, str, list, key="data.prompt_column")
    messages = ({"role": "user", "content": value},) if isinstance(value, str) else checked_messages(row.origin, value)
    if messages[-1]["role"] not in ("user", "tool"):
        raise DataError(f"{row.origin}: the last message must be the user's or a tool's, since the assistant answers "
                        f"it; given {messages[-1]['role']!r}")
    return data.prompt_column, with_system(row.origin, messages, data.system_prompt)


def _text_content(row: Row, data: DataSection) -> tuple[str, str]:
    return data.prompt_column, column(row, data.prompt_column, str, key="data.prompt_column")


def _calculator_content(row: Row, data: DataSection) -> tuple[str, str]:
    return "prompt", column(row, "prompt", str)  # made by calculator_rows, so data.prompt_column does not apply


_CONTENT: Mapping[str, Callable[[Row, Any], tuple[str, str | Messages]]] = {
    "chat": _chat_content, "text": _text_content, "calculator": _calculator_content}
