"""Turn messages and plain text into prompt token ids, and check that a tokenizer has all that is needed for this.

This module does not pad, truncate or batch. No code depends on a model family: the tokenizer's own chat template
decides.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from frpo.errors import DataError, ModelError

ROLES = ("system", "user", "assistant", "tool")

Messages = tuple[Mapping[str, str], ...]


def template_text(messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase,
                  add_generation_prompt: bool = False) -> str:
    """Render `messages` as text by the chat template. Raises jinja2's TemplateError for any error of the template."""
    try:
        text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False,
                                             add_generation_prompt=add_generation_prompt)
        return cast(str, text)
    except TemplateError:
        raise
    except Exception as error:  # a template is code that came with a model, and may raise anything
        raise TemplateError(f"{type(error).__name__}: {error}") from error


def render(messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Render `messages` as token ids by the chat template, up to where the assistant's next turn begins.

    Only the template adds special tokens (a second beginning-of-sequence token would be off the model's distribution).
    Raises DataError if the template refuses the messages, leaves a message out or does not mark where an answer begins.
    """
    try:
        text = template_text(messages, tokenizer, add_generation_prompt=True)
    except TemplateError as error:
        raise DataError(f"the chat template refuses the roles {[m['role'] for m in messages]}: {error}") from error
    check_written(messages, tokenizer, add_generation_prompt=True)
    with suppress(TemplateError):  # raised by a template that writes no answer to such messages
        answered = template_text([*messages, {"role": "assistant", "content": "\uf8ff"}], tokenizer)
        check_header(messages, text, answered.rpartition("\uf8ff")[0], tokenizer)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def check_written(messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase,
                  add_generation_prompt: bool = False) -> None:
    """Raise DataError for a message that the chat template leaves out, as many do with system or tool messages.

    To recognise a message, its content is replaced by a character of the private use area. The check is skipped for a
    template that refuses such content.
    """
    marks = {number: chr(0xE000 + number) for number, m in enumerate(messages[:6400]) if m["content"].strip()}
    marked = [{**m, "content": marks.get(number, m["content"])} for number, m in enumerate(messages)]
    try:
        text = template_text(marked, tokenizer, add_generation_prompt)
    except TemplateError:
        return
    left_out = next((number for number, mark in marks.items() if mark not in text), None)
    if left_out is not None:
        raise DataError(f"the chat template leaves out message {left_out}, of role {messages[left_out]['role']!r}; "
                        "use a template that writes it, or remove it (remove data.system_prompt if it is that message)")


def check_header(messages: Sequence[Mapping[str, str]], prompt: str, head: str, tokenizer: PreTrainedTokenizerBase
                 ) -> None:
    """Raise DataError if the template writes a header before an answer, but not at the end of the prompt for sampling.

    prompt: `messages` rendered for sampling. head: the text before the content of an answer to these messages.
    """
    beyond = head[len(prompt):] if head.startswith(prompt) else ""
    if beyond.strip() and prompt == template_text(messages, tokenizer):
        raise DataError(
            f"the chat template writes {beyond[-40:]!r} before the assistant's text in message {len(messages)}, but "
            "does not end the prompt with it, so the policy would have to write it; make the template write it under "
            "add_generation_prompt")


def render_text(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokenize plain text, with the special tokens that the tokenizer puts *before* text by default.

    So the prompt has a beginning-of-sequence token exactly if the model was trained with one, as when vLLM tokenizes a
    string. An end-of-sequence token after the text is removed, since the completion follows.
    """
    ids = tokenizer(text)["input_ids"]
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    added_end = ids[-1:] == [tokenizer.eos_token_id] and bare[-1:] != [tokenizer.eos_token_id]
    return tuple(ids[:-1] if added_end else ids)


def checked_messages(origin: str, messages: list[Any]) -> Messages:
    """Check that each message of a row has a role, a content and nothing else. Raises DataError naming the row."""
    if not messages:
        raise DataError(f"{origin}: the list of messages is empty; give at least one user message")
    checked = []
    for number, message in enumerate(messages):
        # Data sets fill keys that only other rows have with None.
        given = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else message
        if (not isinstance(given, dict) or set(given) != {"role", "content"} or given["role"] not in ROLES
                or not isinstance(given["content"], str)):
            raise DataError(f"{origin}: message {number} must be {{role: {'|'.join(ROLES)}, content: text}}, "
                            f"given {message!r:.80}")
        checked.append(given)
    return tuple(checked)


def with_system(origin: str, messages: Messages, system_prompt: str | None) -> Messages:
    """Put the recipe's system prompt, if there is one, before the messages. Raises DataError if the row has its own."""
    if system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise DataError(f"{origin}: the row already has a system message; remove it or data.system_prompt")
    return ({"role": "system", "content": system_prompt}, *messages)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, needs_chat: bool) -> None:
    """Raise ModelError unless the tokenizer has end-of-sequence and padding tokens and, if needed, a chat template.

    The padding token does not fall back to the end-of-sequence token. Code that removes padding by its id would then
    remove every end of sequence too, and the policy would never learn to stop.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise ModelError(f"tokenizer {name!r} has no end-of-sequence token, so no completion could end; "
                         "set tokenizer.eos_token to the token that ends a turn and save it beside the model")
    if tokenizer.pad_token_id is None:
        raise ModelError(f"tokenizer {name!r} has no padding token; set tokenizer.pad_token to a token that no text "
                         "contains (an unused or reserved one) and save it beside the model")
    if needs_chat and not tokenizer.chat_template:
        raise ModelError(f"tokenizer {name!r} has no chat template, but data.format: chat needs one; use an "
                         "instruction model, set tokenizer.chat_template and save it, or choose data.format: text")
