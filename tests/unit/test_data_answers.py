"""A prompt with its answer as one sequence: by chat templates of real families, against the turns that are learned."""
from functools import cache

import pytest

from chat_templates import FAMILIES, Family, tokenizer_of
from frpo.data.answers import AnswerTokens
from frpo.data.assistant import AssistantTokens, end_of_turn
from frpo.data.chat import render
from frpo.errors import DataError, ModelError

PROMPTS = {
    "one question": [("user", "2+2")],
    "several turns": [("user", "is 12"), ("assistant", "no"), ("user", "and 6+6\n\nyes")],
    "system": [("system", "user: yes"), ("user", "2+2")],
}
ANSWERS = ["four", "yes no\n\nis 12", "] yes", "é 🙂"]

NO_SYSTEM = {"Gemma", "Mistral"}
"""Families whose template refuses a system message."""

OWN_BEGINNING = {"Qwen3", "Llama-2", "Command-R7B"}
"""Families whose template writes something between the prompt for sampling and an answer, such as an empty thought.

A policy would write that itself, so it is part of an answer and not of its prompt.
"""

made = cache(lambda name, scheme: tokenizer_of(FAMILIES[name], scheme))


def messages_of(case):
    return [{"role": role, "content": content} for role, content in PROMPTS[case]]


CASES = [(name, case) for name in FAMILIES for case in PROMPTS if not (case == "system" and name in NO_SYSTEM)]


@pytest.mark.parametrize("scheme", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("name, case", [each for each in CASES if each[0] not in OWN_BEGINNING])
def test_tokens_are_those_of_supervised_training_up_to_the_end_of_the_turn(name, case, scheme):
    tokenizer, messages = made(name, scheme), messages_of(case)
    for answer in ANSWERS:
        ids, mask = AssistantTokens(tokenizer, "last").of([*messages, {"role": "assistant", "content": answer}])
        learned = len(mask) - mask[::-1].index(True)
        assert AnswerTokens(tokenizer, "chat").of(messages, answer) == ids[:learned]


@pytest.mark.parametrize("scheme", ["byte-level", "byte-level trimmed", "sentencepiece", "sentencepiece legacy"])
@pytest.mark.parametrize("name, case", CASES)
def test_it_is_the_prompt_for_sampling_then_the_answer_and_ends_with_the_turn(name, case, scheme):
    tokenizer, messages = made(name, scheme), messages_of(case)
    prompt = render(messages, tokenizer)
    for answer in ANSWERS:
        ids = AnswerTokens(tokenizer, "chat").of(messages, answer)
        assert tuple(ids[:len(prompt)]) == prompt
        assert ids[-1] == end_of_turn(tokenizer)
        before, both = (tokenizer.decode(some) for some in (prompt, ids))
        assert both.startswith(before)
        if "legacy" not in scheme:
            ending = FAMILIES[name].said.rpartition("{}")[2]
            assert both[len(before):].replace("▁", " ") == (answer + ending).replace("▁", " ")  # pieces decode so


LINES = Family(special=("<eos>",), eos="<eos>", said="{}<eos>", template=(
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"))


def test_no_token_covers_prompt_and_answer():
    tokenizer = tokenizer_of(LINES, "byte-level")
    messages = [{"role": "user", "content": "a"}]
    prompt, whole = render(messages, tokenizer), tokenizer("user: a\nassistant: yes no<eos>")["input_ids"]
    assert tuple(whole[:len(prompt)]) != prompt  # " yes" would be one token
    ids = AnswerTokens(tokenizer, "chat").of(messages, "yes no")
    assert tuple(ids[:len(prompt)]) == prompt
    assert tokenizer.decode(ids) == tokenizer.decode(whole)


def test_a_text_is_a_message_of_the_user_in_chat_and_itself_in_text():
    tokenizer = made("Llama-3", "byte-level")
    chat, text = (AnswerTokens(tokenizer, form) for form in ("chat", "text"))
    assert chat.of("2+2", "four") == chat.of([{"role": "user", "content": "2+2"}], "four")
    assert text.of("2+2 is ", "four") == [*tokenizer("2+2 is ")["input_ids"], *tokenizer("four")["input_ids"],
                                          tokenizer.eos_token_id]


def test_answers_to_one_prompt_share_its_rendering(monkeypatch):
    rendered = []
    monkeypatch.setattr("frpo.data.answers.render", lambda messages, tokenizer: rendered.append(1) or (1, 2))
    tokens = AnswerTokens(made("ChatML", "byte-level"), "chat")
    first, second = (tokens.of("2+2", answer) for answer in ("four", "yes"))
    assert first[:2] == second[:2] == [1, 2] and first != second and len(rendered) == 1


def test_a_template_that_ends_no_turn_is_refused():
    tokenizer = made("ChatML", "sentencepiece legacy")
    tokenizer.chat_template = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                               "{% if add_generation_prompt %}assistant: {% endif %}")
    with pytest.raises(ModelError, match="writes no special token after the assistant's text"):
        AnswerTokens(tokenizer, "chat").of("2+2", "four")


def test_a_prompt_that_the_template_refuses_is_refused():
    with pytest.raises(DataError, match="refuses"):
        AnswerTokens(made("Gemma", "byte-level"), "chat").of(messages_of("system"), "four")
