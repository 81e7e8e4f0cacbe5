"""Load the supervised examples of a run: render and tokenize rows, with a loss on the assistant's text only.

A row is a list of messages, or a prompt and its response. This module does not batch or order the examples.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from frpo.data.assistant import AssistantTokens, Tokens, to_learn
from frpo.data.chat import Messages, check_tokenizer, checked_messages, render_text, with_system
from frpo.data.heldout import Source, Split, content_hash, set_aside
from frpo.data.source import Row, column, read_rows, select
from frpo.data.vocabulary import check_vocabulary
from frpo.errors import DataError, UnknownTokenError
from frpo.types import Example

if TYPE_CHECKING:
    from frpo.config.supervised import SupervisedDataSection

ExampleSet = Split[Example]
"""All examples of a run."""


def load_examples(data: SupervisedDataSection, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int,
                  embeddings: int | None = None) -> ExampleSet:
    """Read, render, tokenize and split the examples that `data` describes. `seed` orders generated arithmetic only.

    max_length: most tokens of an example; `data.too_long` decides about longer examples. embeddings: number of the
    model's embeddings; None: do not check. `set_aside` decides which examples are held out.
    Raises DataError naming a row that is broken, has nothing to learn or is too long. Raises ModelError for a tokenizer
    that does not fit, and naming a row that needs a token without an embedding.
    """
    check_tokenizer(tokenizer, needs_chat=data.format == "chat")
    assistant = AssistantTokens(tokenizer, data.train_on)
    train = _read(data, data.path, data.limit, assistant, max_length, seed)
    evaluation = _read(data, data.heldout_path, None, assistant, max_length, seed) if data.heldout_path else None
    if embeddings is not None:
        check_vocabulary(filter(None, (train, evaluation)), tokenizer, embeddings)
    return set_aside(train, evaluation, data)


def _read(data: SupervisedDataSection, path: str, limit: int | None, assistant: AssistantTokens, max_length: int,
          seed: int) -> Source[Example]:
    rows = select(read_rows(path, split=data.split, limit=limit, seed=seed, subset=data.subset), data.where, {})
    examples, skipped = [], Counter[str]()
    for row in rows:
        try:
            example = _example(row, data, assistant)
        except UnknownTokenError:
            if data.unknown_tokens == "refuse":
                raise
            skipped["dropped, a character without a token"] += 1
            continue
        kept: Example | None = example
        if len(example.token_ids) > max_length:
            kept = _shortened(example, data, max_length)
            skipped[f"{'cut' if kept else 'dropped'} to fit model.max_length"] += 1
        if kept is not None:
            examples.append(kept)
    return Source(items=tuple(examples), origins=tuple(example.origin for example in examples), skipped=skipped)


def _example(row: Row, data: SupervisedDataSection, assistant: AssistantTokens) -> Example:
    content: Sequence[str] | Messages
    if data.format == "text":
        prompt, response = (column(row, getattr(data, name), str, key=f"data.{name}")
                            for name in ("prompt_column", "response_column"))
        content, tokens = (prompt, response), partial(_text_tokens, prompt, response, assistant.tokenizer)
    else:
        content = _messages(row, data)
        tokens = partial(assistant.of, content)
    try:
        ids, mask = tokens()
    except DataError as error:
        raise type(error)(f"{row.origin}: {error}") from error
    if not any(mask[1:]):
        raise DataError(f"{row.origin}: the row has no response token, so there is nothing to learn; give the row an "
                        "assistant message with text, or remove it")
    if mask[0]:
        raise DataError(f"{row.origin}: no token comes before the response, so its first token cannot be learned; "
                        "give the row a prompt, or use a tokenizer that puts a token before every text")
    return Example(uid=content_hash(content)[:16], origin=row.origin, token_ids=tuple(ids), loss_mask=tuple(mask))


def _messages(row: Row, data: SupervisedDataSection) -> Messages:
    """Return the system prompt, then the row's list of messages, or its prompt and response as two messages."""
    if data.messages_column in row.columns:
        messages: Messages = checked_messages(row.origin, column(row, data.messages_column, list))
    else:
        prompt = column(row, data.prompt_column, str, list, key="data.prompt_column")
        response = column(row, data.response_column, str, key="data.response_column")
        before = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else checked_messages(
            row.origin, prompt)
        messages = (*before, {"role": "assistant", "content": response})
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{row.origin}: the last message must be the assistant's, since the model learns it; given "
                        f"{messages[-1]['role']!r}")
    return with_system(row.origin, messages, data.system_prompt)


def _text_tokens(prompt: str, response: str, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Tokenize the prompt as for sampling, then the response and the end of sequence."""
    before = render_text(prompt, tokenizer)
    said = [*to_learn(prompt, response, tokenizer), tokenizer.eos_token_id]
    return [*before, *said], [False] * len(before) + [bool(response)] * len(said)


def _shortened(example: Example, data: SupervisedDataSection, max_length: int) -> Example | None:
    """Cut the end of the example. Return None if the example is to be dropped or would have nothing to learn."""
    if data.too_long == "refuse":
        raise DataError(f"{example.origin}: the example has {len(example.token_ids)} tokens, model.max_length allows "
                        f"{max_length}; raise it, or set data.too_long to cut (removes the end) or drop")
    mask = example.loss_mask[:max_length]
    if data.too_long == "drop" or not any(mask):
        return None
    return Example(uid=example.uid, origin=example.origin, token_ids=example.token_ids[:max_length], loss_mask=mask)
