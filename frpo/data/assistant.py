"""Turn a conversation into tokens, with a loss on the assistant's turns, for any chat template.

The template is rendered, never parsed. The template needs no {% generation %} markers, and no message is searched for
in the text. This module does not read rows or shorten examples.
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Literal

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from frpo.data.chat import check_header, check_written, template_text
from frpo.errors import DataError, ModelError, UnknownTokenError

Conversation = Sequence[Mapping[str, str]]

Tokens = tuple[list[int], list[bool]]
"""Token ids, and for each token whether it has a loss."""

ANCHORS = ("\n", "a", "0", ".")
"""Texts to put before a turn when tokenizing it, if its first token would merge with the end of its prompt.

Some tokenizers put a space before a turn that has no text before it, since they treat it as the start of a text.
"""

TAG_BEGINS, TAG_ENDS = ("<", "[", "◁"), (">", "]", "▷")

TAGS = re.compile(r"((<[^<>]*>|\[[^\[\]]*\]|◁[^◁▷]*▷)\s*)*$")
"""Pattern of the tags at the end of a text."""


class AssistantTokens:
    """Tokenizer of conversations, with a loss on all turns of the assistant or on the last one.

    A turn begins where its prompt ends; that prompt is the one that `render` makes for sampling. A turn ends with the
    token that ends a turn. Text that the template writes after that token has no loss.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: Literal["all", "last"]) -> None:
        self.tokenizer, self.train_on = tokenizer, train_on
        self.ending: str | None = None

    def of(self, messages: Conversation) -> Tokens:
        """Tokenize a conversation that ends with the assistant. No token belongs to both a prompt and a turn.

        Raises DataError if the template refuses or drops a message, or writes a turn differently from how the turn
        would be sampled. Raises ModelError if the template does not end a turn.
        """
        try:
            whole = template_text(messages, self.tokenizer)
            numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            turns = [self._turn(messages, n, whole) for n in (numbers if self.train_on == "all" else numbers[-1:])]
        except TemplateError as error:
            raise DataError(f"the chat template refuses the messages: {error}") from error
        check_written(messages, self.tokenizer)
        before = whole[:turns[0][0]]
        assert self.ending is not None  # every turn has found it
        ids = _ids(before, self.tokenizer)
        mask = [False] * len(ids)
        for (start, end), until in zip(turns, [*(start for start, _ in turns[1:]), len(whole)], strict=True):
            said = to_learn(before, whole[start:end], self.tokenizer)
            rest = continuation(self.ending, whole[end:until], self.tokenizer)
            ids += said + rest
            mask += [True] * len(said) + [False] * len(rest)
            before = self.ending + whole[end:until]
        return ids, mask

    def _turn(self, messages: Conversation, number: int, whole: str) -> tuple[int, int]:
        """Find where the turn of a message begins and ends (exclusive) in the rendered conversation."""
        before, content = messages[:number], messages[number]["content"]
        mark = _absent(messages)  # replaces the content, so that the text around the mark is the template's
        marked = template_text((*before, _said(mark * max(1, len(content))), *messages[number + 1:]), self.tokenizer)
        tail = marked.rpartition(mark)[2]
        head = marked.partition(mark)[0]
        prompt = template_text(before, self.tokenizer, add_generation_prompt=True) if before else head
        otherwise = ", or set data.train_on to last" if number < len(messages) - 1 else ""
        if not whole.startswith(prompt):
            same = _shared(prompt, whole)
            raise DataError(
                f"the chat template changes earlier messages when the assistant's message {number} follows: "
                f"{prompt[same:same + 40]!r} becomes {whole[same:same + 40]!r}; use a template that only "
                f"appends{otherwise}")
        check_header(before, prompt, head, self.tokenizer)
        start, stop = len(prompt), len(whole) - len(tail)
        lost = _lost(content, whole[start:stop])
        if start > stop or not whole.endswith(tail) or not _opens(prompt, head, lost) or (
                marked.count(mark) > max(1, len(content))):
            raise DataError(
                f"the chat template leaves out or changes the assistant's text in message {number}, at "
                f"{lost or content!r:.60}; use a template that keeps it, or remove it from the row{otherwise}")
        return start, stop + len(self._ending(before, tail, number))

    def _ending(self, before: Conversation, tail: str, number: int) -> str:
        """Return the text that ends every turn, after checking that this turn ends with it too.

        tail: all text after the content.
        """
        self.ending = self.ending or turn_ending(before, self.tokenizer)
        if self.ending is None:
            raise ModelError(
                f"the chat template of tokenizer {self.tokenizer.name_or_path!r} writes no special token after the "
                "assistant's text, so the policy would never learn to stop; put {{ eos_token }} "
                f"({self.tokenizer.eos_token}) after the assistant's content and save the template beside the model")
        if not tail.startswith(self.ending):
            raise DataError(
                f"the chat template ends the assistant's message {number} with {tail[:20]!r}, but another one with "
                f"{self.ending!r}; make the template end both the same way, or set data.train_on to last")
        return self.ending


def turn_ending(before: Conversation, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the text that the template writes after an answer to `before`, up to the token that ends the turn.

    That token is the end-of-sequence token, or else the first special token that the template writes regardless of
    what follows the turn. Returns None if the template writes no such token. Raises jinja2's TemplateError if the
    template refuses the messages.
    """
    mark = _absent(before)
    answered = (*before, _said(mark))
    alone = followed = template_text(answered, tokenizer).rpartition(mark)[2]
    with suppress(TemplateError):  # raised by a template for one question and one answer
        followed = template_text((*answered, {"role": "user", "content": "x"}), tokenizer).rpartition(mark)[2]
    always, eos = alone[:_shared(alone, followed)], tokenizer.eos_token
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()} | {eos}
    first = re.search("|".join(sorted(map(re.escape, special), reverse=True)), always)
    if eos in always or (eos in alone and not first):
        return alone[:alone.index(eos) + len(eos)]
    return alone[:first.end()] if first else None


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the token that ends a turn.

    Returns None if the template writes no such token or refuses a question and its answer.
    """
    try:
        ending = turn_ending(({"role": "user", "content": "x"},), tokenizer)
    except TemplateError:
        return None
    return _ids(ending, tokenizer)[-1] if ending else None


def continuation(before: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize `text` as the continuation of the text `before`. No token covers both; no special token is added.

    Raises DataError if the tokenizer cannot keep the two texts apart.
    """
    for anchor in (before, *ANCHORS):
        first, both = _ids(anchor, tokenizer), _ids(anchor + text, tokenizer)
        if both[:len(first)] == first:
            return both[len(first):]
    raise DataError(f"the tokenizer merges {text!r:.80} with any text before it; use another tokenizer")


def to_learn(before: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize a text to learn by `continuation`. Raises UnknownTokenError if the tokenizer lacks a character of it."""
    ids, unknown = continuation(before, text, tokenizer), tokenizer.unk_token_id
    if unknown is None or ids.count(unknown) <= text.count(tokenizer.unk_token):
        return ids
    lacking = next((char for char in text if unknown in _ids(char, tokenizer)), text)
    raise UnknownTokenError(f"the tokenizer has no token for {lacking!r:.60}, so {tokenizer.unk_token} would be "
                            "learned; set data.unknown_tokens=drop to leave such rows out, write it differently, or "
                            "use a tokenizer that has a token for it")


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def _absent(messages: Conversation) -> str:
    """Return a character (of the private use area) that no message has."""
    used = set().union(*(message["content"] for message in messages))
    return next(char for char in map(chr, range(0xE000, 0xF900)) if char not in used)


def _shared(one: str, other: str) -> int:
    """Return the length of the common prefix of two texts."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
                min(len(one), len(other)))


def _opens(prompt: str, head: str, lost: str) -> bool:
    """Check whether the prompt itself begins an answer with `lost`, for example <think>. White space does not count.

    head: all text that the template writes before another answer. The part of the prompt after the head begins an
    answer. So do the tags at the end of the prompt, since an answer may have an empty thought of its own.
    """
    if not lost:
        return True
    found = TAGS.search(prompt)
    assert found is not None  # TAGS may match nothing at all
    lost, beyond, tags = ("".join(text.split()) for text in (lost, prompt[_shared(prompt, head):], found[0]))
    return lost == beyond or (lost.startswith(TAG_BEGINS) and tags.endswith(lost))


def _lost(content: str, text: str) -> str:
    """Return the part of `content` that is not at the end of `text`. Return "" if all of it is there.

    Both are compared from their ends; the part runs up to the last character that differs. White space at the ends of
    the content may be missing, and the text may have more white space beside tags.
    """
    content, text = content.strip(), text.rstrip()
    if text.endswith(content):
        return ""
    place = len(text)
    for number in range(len(content), 0, -1):
        while place and text[place - 1].isspace() and text[place - 1] != content[number - 1] and (
                text[:place].rstrip().endswith(TAG_ENDS) or text[place:].lstrip().startswith(TAG_BEGINS)):
            place -= 1
        if not place or text[place - 1] != content[number - 1]:
            return content[:number]
        place -= 1
    return ""
