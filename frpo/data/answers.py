"""Tokenize a prompt and an answer to it as one sequence, as a reward model reads them.

The same function serves training and scoring. The last token is the one that ends the answer; the score is read there.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from frpo.data.assistant import continuation, turn_ending
from frpo.data.chat import render, render_text, template_text
from frpo.errors import DataError, ModelError

Conversation = Sequence[Mapping[str, str]]


class AnswerTokens:
    """Tokenizer of prompts with answers. The prompt is rendered as for sampling; no token covers prompt and answer.

    format: "chat" renders messages by the chat template and ends an answer as the template ends a turn. "text" takes
    the prompt as it is and ends an answer with the end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, format: Literal["chat", "text"]) -> None:
        self.tokenizer, self.format = tokenizer, format
        self._prompt = lru_cache(maxsize=1024)(self._rendered)  # the answers of a group share their prompt

    def of(self, prompt: str | Conversation, answer: str) -> list[int]:
        """Return the token ids of the prompt, the answer and its end.

        prompt: text, or messages (format chat only). A text in format chat is one message of the user.
        Raises DataError if the template refuses the prompt, ModelError if it does not end a turn.
        """
        messages = ((("user", prompt),) if isinstance(prompt, str) else
                    tuple((message["role"], message["content"]) for message in prompt))
        ids, before, ending = self._prompt(messages)
        return [*ids, *continuation(before, answer + ending, self.tokenizer)]

    def _rendered(self, messages: tuple[tuple[str, str], ...]) -> tuple[tuple[int, ...], str, str]:
        """Return the prompt's token ids, its text, and the text that ends an answer."""
        if self.format == "text":
            text = "\n\n".join(content for _, content in messages)
            return render_text(text, self.tokenizer), text, self.tokenizer.eos_token
        given = [{"role": role, "content": content} for role, content in messages]
        try:
            ending = turn_ending(given, self.tokenizer)
        except TemplateError as error:
            raise DataError(f"the chat template refuses the messages: {error}") from error
        if ending is None:
            raise ModelError(
                f"the chat template of tokenizer {self.tokenizer.name_or_path!r} writes no special token after the "
                f"assistant's text, so an answer has no end to be scored at; put {{{{ eos_token }}}} "
                f"({self.tokenizer.eos_token}) after the assistant's content and save the template beside the model")
        return render(given, self.tokenizer), template_text(given, self.tokenizer, add_generation_prompt=True), ending
