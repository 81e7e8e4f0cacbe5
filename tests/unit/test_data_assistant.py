"""What the assistant is taught to say: chat templates of real families x cases, and templates that cannot be right.

Run as a program, this file prints the table of families, cases and learned texts.
"""
from functools import cache

import pytest
from tokenizers import AddedToken, Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from chat_templates import CHATML, DEEPSEEK_R1, FAMILIES, HARMONY, LLAMA3, NEMO, Family, tokenizer_of
from frpo.data.assistant import AssistantTokens, continuation, end_of_turn
from frpo.data.chat import render
from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.errors import DataError, ModelError


def talk(*contents, system=None):
    """User and assistant in turns."""
    roles = ("user", "assistant") * len(contents)
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, *({"role": role, "content": content} for role, content in zip(roles, contents, strict=False))]


THOUGHT = "<think>\n6+6\n</think>\n\n12"
CASES = {
    "one turn": (talk("2+2", "four"), ["four"]),
    "several turns": (talk("1+1", "2", "6+6", "12", "2+2", "four"), ["2", "12", "four"]),
    "leading space": (talk("1+1", "2", "6+6", " is 12", "2+2", " four"), ["2", " is 12", " four"],
                      ["2", "is 12", "four"]),
    "trailing space": (talk("1+1", "2 ", "2+2", "four \n"), ["2 ", "four \n"], ["2", "four"]),
    "leading newlines": (talk("1+1", "\n\nyes", "2+2", "is\n four"), ["\n\nyes", "is\n four"], ["yes", "is\n four"]),
    "thought at last": (talk("1+1", "2", "6+6", THOUGHT), ["2", THOUGHT]),
    "thought before": (talk("6+6", THOUGHT, "1+1", "2"), [THOUGHT, "2"]),
    "unicode": (talk("é?", "π ≈ 3 🙂 é", "🙂", "🙂é"), ["π ≈ 3 🙂 é", "🙂é"]),
    "empty system": (talk("1+1", "2", "2+2", "four", system=""), ["2", "four"]),
    "special text": (talk("four<|im_end|>\n<|im_start|>assistant\nfour</s>[/INST] four<|eot_id|>",
                          "four</s><|im_end|> yes", "four", "four"), ["four</s><|im_end|> yes", "four"]),
    "merging": (talk("a", "yes no", "a", "] yes"), ["yes no", "] yes"]),
    "empty answer": (talk("a", "", "a", "no"), ["", "no"]),
}
"""Messages, and what of each content is to be learned: all of it; and all but outer white space, if that differs."""

REFUSED = {
    ("Gemma", "empty system", "all"): "the chat template refuses the messages: System role not supported",
    ("Gemma", "empty system", "last"): "the chat template refuses the messages: System role not supported",
    ("Mistral", "empty system", "all"): "refuses the messages: Only user and assistant roles are supported",
    ("Mistral", "empty system", "last"): "refuses the messages: Only user and assistant roles are supported",
    ("Qwen3", "thought before", "all"): r"the assistant's text in message 1, at '<think>\\n6\+6\\n</think>\\n\\n'; "
                                        r".*, or set data.train_on to last",
}
OTHERWISE = {("Qwen3", "thought at last"): ["2<|im_end|>", f"{THOUGHT}<|im_end|>"]}
"""Qwen3 opens a last turn with a thought: the row's, or else an empty one."""

made = cache(lambda name, scheme: tokenizer_of(FAMILIES[name], scheme))


def expected(name, case):
    """What is to be learned, turn by turn."""
    family, contents = FAMILIES[name], CASES[case][-1 if FAMILIES[name].trims else 1]
    *earlier, last = contents
    before = family.earlier or family.said
    return OTHERWISE.get((name, case), [
        *(before.replace("{}", content) for content in earlier), family.said.replace("{}", last)])


def learned(tokenizer, messages, train_on):
    """The text of each stretch of tokens with a loss, as it stands behind the tokens before it; and all tokens."""
    ids, mask = AssistantTokens(tokenizer, train_on).of(messages)
    assert len(ids) == len(mask)
    edges = [i for i in range(len(ids) + 1) if (i < len(ids) and mask[i]) != (i > 0 and mask[i - 1])]
    upto = [tokenizer.decode(ids[:edge]) for edge in edges]
    return [text[len(before):] for before, text in zip(upto[::2], upto[1::2], strict=True)], ids


def check(name, case, scheme):
    messages, tokenizer = CASES[case][0], made(name, scheme)
    for train_on in ("all", "last"):
        if (name, case, train_on) in REFUSED:
            with pytest.raises(DataError, match=REFUSED[name, case, train_on]):
                learned(tokenizer, messages, train_on)
            continue
        texts, ids = learned(tokenizer, messages, train_on)
        assert texts == expected(name, case)[0 if train_on == "all" else -1:]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(ids) == tokenizer.decode(tokenizer(whole, add_special_tokens=False)["input_ids"])
        if train_on == "last":
            prompt = render(messages[:-1], tokenizer)
            assert tuple(ids[:len(prompt)]) == prompt


@pytest.mark.parametrize("scheme", ["byte-level", "byte-level trimmed"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_exactly_the_turns_of_the_assistant_are_learned(name, case, scheme):
    check(name, case, scheme)


@pytest.mark.parametrize("scheme", ["sentencepiece", "sentencepiece legacy"])
# The legacy one puts a space behind every special token, as here within the content.
@pytest.mark.parametrize("case", [case for case in CASES if case != "special text"])
@pytest.mark.parametrize("name", ["Llama-2", "Mistral", "Zephyr", "Gemma", "Phi-3"])
def test_a_tokenizer_that_puts_a_space_before_text_puts_none_before_a_turn(name, case, scheme):
    check(name, case, scheme)


# --- where prompt and turn would share a token ----------------------------------------------------------------------

LINES = Family(special=("<eos>",), eos="<eos>", said="{}<eos>", template=(
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"))


@pytest.mark.parametrize("scheme", ["byte-level", "byte-level trimmed", "sentencepiece", "sentencepiece legacy"])
def test_a_first_token_that_would_merge_with_the_prompt_is_learned(scheme):
    tokenizer = tokenizer_of(LINES, scheme)
    prompt = render(talk("a"), tokenizer)
    whole = tokenizer("user: a\nassistant: yes no<eos>\n", add_special_tokens=False)["input_ids"]
    assert tuple(whole[:len(prompt)]) != prompt  # the space before "yes" is part of a token
    texts, ids = learned(tokenizer, talk("a", "yes no", "a", "four"), "all")
    assert texts == ["yes no<eos>", "four<eos>"]
    assert tuple(ids[:len(prompt)]) == prompt and tokenizer.decode(ids[len(prompt):len(prompt) + 2]) != " yes no"


def test_tokens_are_those_of_the_whole_text_where_nothing_merges():
    tokenizer = made("ChatML", "byte-level")
    messages = talk("1+1", "2", "2+2", "is four", system="yes")
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert learned(tokenizer, messages, "all")[1] == tokenizer(whole)["input_ids"]


def test_a_token_that_takes_the_white_space_behind_it_leaves_the_turn_its_loss():
    tokenizer = tokenizer_of(FAMILIES["Phi-3"], "byte-level")
    tokenizer.add_tokens([AddedToken(token, rstrip=True, special=True) for token in ("<|assistant|>", "<|end|>")])
    assert len(tokenizer("<|end|>\n")["input_ids"]) == 1
    assert learned(tokenizer, talk("a", " is 12", "a", "four"), "all")[0] == ["is 12<|end|>", "four<|end|>"]


def test_a_tokenizer_that_merges_with_everything_is_refused():
    merges = [(before, "y") for before in (" ", "\n", "a", "0", ".")]
    vocabulary = {token: i for i, token in enumerate([" ", "\n", "a", "0", ".", "y", *map("".join, merges)])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, merges)), eos_token="<eos>")
    assert continuation("a", "0", tokenizer) == [vocabulary["0"]]
    with pytest.raises(DataError, match="merges 'y' with any text before it"):
        continuation("a", "y", tokenizer)


# --- templates that do not write what a row says, or write it in another place --------------------------------------

def with_template(template, name="ChatML"):
    tokenizer = tokenizer_of(FAMILIES[name], "byte-level")
    tokenizer.chat_template = template
    return tokenizer


def chat(said, header="<|im_start|>{{ m.role }}\n", after="", opened=""):
    """A template that writes `said` for the assistant's content."""
    return ("{% for m in messages %}" + header + "{% if m.role == 'assistant' %}" + said + "{% else %}{{ m.content }}"
            "<|im_end|>\n{% endif %}{% endfor %}" + after + "{% if add_generation_prompt %}<|im_start|>assistant\n"
            + opened + "{% endif %}")


@pytest.mark.parametrize("said, lost", [
    ("{{ m.content.split('</think>')[-1] }}", r"'<think>\\n6\+6\\n</think>'"),
    ("{{ m.content[:5] }}", r"'<think>\\n6\+6\\n</think>\\n\\n12'"),
    ("{{ m.content[2:] }}", "'<t'"),
    ("{{ m.content | upper }}", r"'<think>\\n6\+6\\n</think'"),
    ("{{ m.content | replace('6+6', '') }}", r"'<think>\\n6\+6'"),
    ("{{ m.content | replace('\n', ' ') }}", r"'<think>\\n6\+6\\n</think>\\n\\n'"),
    ("{{ m.content | striptags }}", r"'<think>\\n6\+6\\n</think>\\n\\n'"),
    ("", r"'<think>\\n6\+6\\n</think>\\n\\n12'"),
])
def test_content_that_the_template_drops_or_changes_is_refused(said, lost):
    for train_on in ("all", "last"):
        with pytest.raises(DataError, match=rf"changes the assistant's text in message 1, at {lost}; use a "
                                            r"template that keeps it, or remove it from the row$"):
            learned(with_template(chat(said + "<|im_end|>\n")), talk("6+6", THOUGHT), train_on)


def test_a_reasoning_model_that_never_shows_a_thought_learns_answers_only():
    tokenizer = with_template(DEEPSEEK_R1, "DeepSeek")
    assert learned(tokenizer, talk("6+6", "12", "a", "no"), "last")[0] == ["no<｜end▁of▁sentence｜>"]
    with pytest.raises(DataError, match="in message 1, at '<think>.*, or set data.train_on to last"):
        learned(tokenizer, talk("6+6", THOUGHT, "a", "no"), "all")


def test_a_thought_that_the_prompt_opens_is_learned_from_there():
    opens = chat("{% if '<think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n",
                 opened="<think>\n")
    assert learned(with_template(opens), talk("6+6", THOUGHT), "all")[0] == ["6+6\n</think>\n\n12<|im_end|>"]
    assert learned(with_template(opens), talk("6+6", "12"), "last")[0] == ["\n</think>\n\n12<|im_end|>"]
    newer = DEEPSEEK_R1.replace("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>\\n' }}")
    with pytest.raises(DataError, match=r"when the assistant's message 1 follows: '<think>\\n' becomes '\\n\\n12<"):
        learned(with_template(newer, "DeepSeek"), talk("6+6", THOUGHT), "last")


def test_a_prompt_that_closes_an_empty_thought_begins_an_answer_with_another():
    empty = "<think>\n\n</think>\n\n"
    said = "{% if '<think>' not in m.content %}" + empty + "{% endif %}{{ m.content }}<|im_end|>\n"
    closed = with_template(chat(said, opened=empty))
    for content in ("12", empty + "12"):
        assert learned(closed, talk("6+6", content), "all")[0] == ["12<|im_end|>"]
    with pytest.raises(DataError, match="when the assistant's message 1 follows"):
        learned(closed, talk("6+6", THOUGHT), "all")


@pytest.mark.parametrize("said, content", [
    ("{{ m.content | capitalize }}", "the sum"), ("{{ m.content[1:] }}", "t is"), ("{{ m.content[2:] }}", "nt is"),
    ("{{ m.content | replace('assistant\n', '') }}", "assistant\nfour"), ("", "assistant"),
    ("{{ m.content.split('\n')[-1] }}", "user\nassistant\nfour")])
def test_content_is_not_taken_for_there_because_the_prompt_ends_like_it(said, content):
    """The header ends with "assistant", as the content that is lost begins."""
    for train_on in ("all", "last"):
        with pytest.raises(DataError, match="changes the assistant's text in message 1, at"):
            learned(with_template(chat(said + "<|im_end|>\n")), talk("6+6", content), train_on)


def test_white_space_that_a_template_adds_beside_a_tag_is_no_loss():
    spaced = with_template(chat("{{ m.content | replace('<think>', '<think>\n') }}<|im_end|>\n"))
    assert learned(spaced, talk("6+6", "<think>6+6 = </think> 12 "), "all")[0] == [
        "<think>\n6+6 = </think> 12 <|im_end|>"]


@pytest.mark.parametrize("said", ["{{ m.content | indent }}", "{{ m.content | replace(' ', '  ') }}",
                                  "{{ m.content + m.content }}"])
def test_but_elsewhere_it_is_and_so_is_a_second_copy(said):
    with pytest.raises(DataError, match="changes the assistant's text in message 1, at"):
        learned(with_template(chat(said + "<|im_end|>\n")), talk("6+6", "def f():\n    return 12"), "all")


@pytest.mark.parametrize("last, messages", [
    ("", talk("1+1", "2")), ("{% if add_generation_prompt and messages[-1].role == 'user' %}<|im_start|>assistant\n"
                            "{% endif %}", [*talk("1+1", "2"), {"role": "assistant", "content": "four"}])])
def test_a_header_that_no_prompt_has_is_not_what_the_assistant_says(last, messages):
    bare = with_template(CHATML[:CHATML.index("{% if add_gen")] + last)
    with pytest.raises(DataError, match=r"writes '<\|im_start\|>assistant\\n' before the assistant's text in "
                                        rf"message {len(messages) - 1}, but does not end the prompt with it"):
        learned(bare, messages, "last")


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_template_that_leaves_out_another_message_is_refused(role):
    silent = with_template(CHATML.replace("message in messages", f"message in messages if message.role != '{role}'"))
    for content in ("be brief", " "):
        messages = [*talk("1+1", "2"), {"role": role, "content": content}, *talk("a", "no")]
        if content == " ":
            assert learned(silent, messages, "all")[0] == ["2<|im_end|>", "no<|im_end|>"]
            continue
        for train_on in ("all", "last"):
            with pytest.raises(DataError, match=f"the chat template leaves out message 2, of role '{role}'; use a"):
                learned(silent, messages, train_on)


def test_a_history_that_is_rewritten_is_refused():
    nemo = with_template(NEMO, "Mistral")
    assert learned(nemo, talk("1+1", "2", "2+2", "four"), "all")[0] == ["2</s>", "four</s>"]
    with pytest.raises(DataError, match="changes earlier messages when the assistant's message 2 follows"
                                        r": 'be brief\\n\\n1\+1\[/INST\]' becomes '1\+1\[/INST\]2</s>"):
        learned(nemo, talk("1+1", "2", "2+2", "four", system="be brief"), "all")


@pytest.mark.parametrize("template, messages", [
    (chat("{{ m.content }}<|im_end|>{{ 'even' if m.content == 'four' }}\n"), talk("1+1", "four")),
    (chat("{{ m.content }}<|im_end|>{{ 'silent' if not m.content }}\n"), talk("1+1", "")),
    ("{% for m in messages %}{% if m.content %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}", talk("1+1", "")),
])
def test_a_turn_that_cannot_be_told_from_what_follows_is_refused(template, messages):
    with pytest.raises(DataError, match="leaves out or changes the assistant's text in message 1"):
        learned(with_template(template), messages, "all")


# --- the end of a turn ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("said, after", [
    ("{{ m.content }}", ""), ("{{ m.content }}\n", ""), ("{{ m.content }}</s>\n", ""),
    ("{{ m.content }}{{ '' if loop.last else '<|im_end|>' }}", "")])
def test_a_template_that_never_ends_a_turn_is_refused(said, after):
    tokenizer = with_template(chat(said, after=after))
    tokenizer.add_tokens(["\n"])  # as some families have runs of white space
    assert end_of_turn(tokenizer) is None
    for train_on in ("all", "last"):
        with pytest.raises(ModelError, match=r"no special token after the assistant's text, so the policy "
                                             r"would never learn to stop; put {{ eos_token }} \(<\|im_end\|>\) after"):
            learned(tokenizer, talk("1+1", "2"), train_on)


@pytest.mark.parametrize("template, last", [
    (chat("{{ m.content }}", after="{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"), "four<|im_end|>"),
    (HARMONY, "<|channel|>final<|message|>four<|return|>"),
])
def test_a_template_that_ends_the_last_turn_otherwise_is_refused_for_the_others(template, last):
    tokenizer = with_template(template)
    tokenizer.add_special_tokens({"eos_token": last[last.index("four") + 4:]})
    assert learned(tokenizer, talk("2+2", "four"), "all")[0] == [last]
    assert learned(tokenizer, talk("1+1", "2", "2+2", "four"), "last")[0] == [last]
    with pytest.raises(DataError, match=r"ends the assistant's message 1 with '<\|.*, but another one with '<\|.*set "
                                        "data.train_on to last"):
        learned(tokenizer, talk("1+1", "2", "2+2", "four"), "all")


def test_a_template_for_one_question_will_do():
    once = chat("{{ m.content }}<|im_end|>\n", after="{{ raise_exception('once') if messages | length > 2 }}")
    assert learned(with_template(once), talk("2+2", "four"), "all")[0] == ["four<|im_end|>"]


def test_a_template_that_always_opens_a_next_turn_will_do():
    header = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"  # as Llama-3's first one
    always = LLAMA3[:LLAMA3.index("{% if add")] + header
    assert learned(with_template(always, "Llama-3"), talk("1+1", "2", "2+2", "four"), "all")[0] == [
        "2<|eot_id|>", "four<|eot_id|>"]


@pytest.mark.parametrize("name, token", [
    ("ChatML", "<|im_end|>"), ("Llama-2", "</s>"), ("Llama-3", "<|eot_id|>"), ("Gemma", "<end_of_turn>"),
    ("Phi-3", "<|end|>"), ("Phi-4-mini", "<|end|>"), ("Command-R7B", "<|END_OF_TURN_TOKEN|>")])
def test_the_token_that_ends_a_turn(name, token):
    tokenizer = tokenizer_of(FAMILIES[name], "byte-level")
    tokenizer.add_tokens([token[:-1]])  # the longer of two tokens counts, as to the tokenizer
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(token)
    for template in ("{{ raise_exception('no') }}", "{{ 'a' + 1 }}"):
        tokenizer.chat_template = template
        assert end_of_turn(tokenizer) is None


# --- others ---------------------------------------------------------------------------------------------------------

def test_markers_change_nothing():
    marked = chat("{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n")
    assert learned(with_template(marked), talk("a", " 2", "a", "no"), "all")[0] == [" 2<|im_end|>", "no<|im_end|>"]


def test_messages_of_tools_a_default_system_message_and_an_opening_assistant():
    tokenizer = made("Qwen2.5", "byte-level")
    messages = [*talk("6+6", "yes"), {"role": "tool", "content": "12"}, {"role": "assistant", "content": "is 12"}]
    texts, ids = learned(tokenizer, messages, "all")
    assert texts == ["yes<|im_end|>", "is 12<|im_end|>"]
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert learned(tokenizer, [{"role": "assistant", "content": "yes"}, *messages], "all")[0] == [
        "yes<|im_end|>", "yes<|im_end|>", "is 12<|im_end|>"]


def test_a_character_of_the_private_use_area_is_text_as_any_other():
    texts, _ = learned(made("ChatML", "byte-level"), talk("a", "yes", "\ue000", "\ue000 is \ue001"), "all")
    assert texts == ["yes<|im_end|>", "\ue000 is \ue001<|im_end|>"]


def test_only_the_template_adds_special_tokens():
    tokenizer = tokenizer_of(FAMILIES["Llama-2"], "sentencepiece")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    assert tokenizer("2")["input_ids"][0] == tokenizer.bos_token_id
    texts, ids = learned(tokenizer, talk("1+1", "2", "2+2", "four"), "all")
    assert texts == [" 2 </s>", " four </s>"] and ids.count(tokenizer.bos_token_id) == 2  # one before each [INST]


@pytest.mark.parametrize("template, said", [
    ("{{ 'a' + 1 }}", "TypeError: can only concatenate"), ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ({"rag": CHATML, "tool_use": CHATML}, "ValueError: This model has multiple chat templates")])
def test_whatever_a_template_raises_is_told(template, said):
    tokenizer = with_template(template)
    with pytest.raises(DataError, match=f"the chat template refuses the messages: {said}"):
        learned(tokenizer, talk("a", "no"), "all")
    with pytest.raises(DataError, match=rf"the chat template refuses the roles \['user'\]: {said}"):
        render(talk("a"), tokenizer)


def test_a_character_that_the_tokenizer_does_not_have_is_not_learned_as_unknown():
    tokenizer = build_tokenizer()
    for text in ("a", "<unk> a"):
        assert learned(tokenizer, talk("é", text), "all")[0] == [f"{text}<eos>"]
    for text in ("aéb", "<unk> é"):
        with pytest.raises(DataError, match="has no token for 'é', so <unk> would be learned"):
            learned(tokenizer, talk("a", text), "all")
    tokenizer.unk_token = "<eos>"  # as GPT-2's, which has a token for everything
    assert learned(tokenizer, talk("a", "b"), "all")[0] == ["b<eos>"]


if __name__ == "__main__":
    print("family | case | train_on | learned")
    for name in FAMILIES:
        for case, (messages, *_) in CASES.items():
            for train_on in ("all", "last"):
                try:
                    text = " ~ ".join(map(repr, learned(made(name, "byte-level trimmed"), messages, train_on)[0]))
                except (DataError, ModelError) as error:
                    text = f"{type(error).__name__}: {error}"
                print(f"{name} | {case} | {train_on} | {text}")
