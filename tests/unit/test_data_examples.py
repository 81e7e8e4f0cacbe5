"""Supervised examples: what is learned of a row and what is not, what is too long, what is refused and how."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from chat_templates import FAMILIES, tokenizer_of
from frpo.config.supervised import SupervisedDataSection
from frpo.data.chat import render_text
from frpo.data.examples import load_examples
from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.errors import DataError, ModelError, UnknownTokenError

TURNS = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"},
         {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "four"}]


@pytest.fixture
def load(tmp_path):
    def load(rows, *, template=None, max_length=64, **keys):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tokenizer = build_tokenizer()
        if template:
            tokenizer.chat_template = template
        return load_examples(SupervisedDataSection(path=str(path), **keys), tokenizer, max_length, seed=0)

    return load


def learned(example):
    """The text with a loss, and all of it."""
    tokenizer = build_tokenizer()
    own = [token for token, flag in zip(example.token_ids, example.loss_mask, strict=True) if flag]
    return tokenizer.decode(own), tokenizer.decode(example.token_ids)


def test_every_turn_of_the_assistant_is_learned_with_its_end(load):
    example, = load([{"messages": TURNS}]).train
    assert learned(example) == ("2<eos>four<eos>", "<user>1+1<assistant>2<eos><user>2+2<assistant>four<eos>")


@pytest.mark.parametrize("keys", [{"train_on": "last"}, {"train_on": "last", "system_prompt": "be brief"}])
def test_or_the_last_turn_alone(load, keys):
    example, = load([{"messages": TURNS}], **keys).train
    own, whole = learned(example)
    assert own == "four<eos>" and whole.endswith("<user>2+2<assistant>four<eos>")
    assert whole.startswith("<system>be brief<user>") == ("system_prompt" in keys)


def test_a_prompt_and_its_response_are_two_messages(load):
    rows = [{"question": "1+1", "answer": "2"}, {"question": TURNS[:3], "answer": "4"}]
    first, second = load(rows, prompt_column="question", response_column="answer").train
    assert learned(first) == ("2<eos>", "<user>1+1<assistant>2<eos>")
    assert learned(second)[0] == "2<eos>4<eos>"


def test_plain_text_is_prompt_then_response_then_the_end(load):
    example, = load([{"prompt": "1+1=", "response": "2"}], format="text").train
    assert learned(example) == ("2<eos>", "1+1=2<eos>")


def test_examples_beyond_the_window_are_refused_cut_or_dropped(load):
    rows = [{"prompt": "1+1", "response": "2" * 20}, {"prompt": "1" * 30, "response": "2"},
            {"prompt": "1+1", "response": "2"}]
    with pytest.raises(DataError, match=r"rows.jsonl:1: the example has 26 tokens, model.max_length allows 16; raise it"
                                        r", or set data.too_long to cut"):
        load(rows, max_length=16)
    dropped = load(rows, max_length=16, too_long="drop")
    assert [example.origin[-2:] for example in dropped.train] == [":3"]
    assert dropped.skipped == {"dropped to fit model.max_length": 2}
    with pytest.raises(DataError, match=r"no row of .* can be used \(dropped to fit model.max_length: 3\); give other"):
        load(rows, max_length=2, too_long="drop")
    cut = load(rows, max_length=16, too_long="cut")  # the second has nothing to learn within 16 tokens
    assert [len(example.token_ids) for example in cut.train] == [16, 7]
    assert cut.skipped == {"cut to fit model.max_length": 1, "dropped to fit model.max_length": 1}
    assert learned(cut.train[0])[0] == "2" * 11


@pytest.mark.parametrize("rows, keys, message", [
    ([{"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}], {"format": "text"},
     "rows.jsonl:2: the row has no response token"),
    ([{"prompt": "é", "response": "b"}, {"prompt": "a", "response": "é"}], {"format": "text"},
     "rows.jsonl:2: the tokenizer has no token for 'é'"),
    ([{"messages": TURNS[:3]}], {}, "rows.jsonl:1: the last message must be the assistant's"),
    ([{"messages": []}], {}, "rows.jsonl:1: the list of messages is empty"),
    ([{"prompt": "", "response": "2"}], {"format": "text"}, "rows.jsonl:1: no token comes before the response"),
    ([{"messages": [{"role": "robot", "content": "x"}]}], {}, "rows.jsonl:1: message 0 must be"),
    ([{"prompt": "a"}], {}, "rows.jsonl:1: no column 'response'; the row has 'prompt'"),
    ([{"prompt": "a", "response": 3}], {}, "rows.jsonl:1: column 'response' must be str, given int 3"),
    ([{"messages": [{"role": "system", "content": "x"}, *TURNS]}], {"system_prompt": "y"},
     "rows.jsonl:1: the row already has a system message"),
])
def test_a_broken_row_is_named(load, rows, keys, message):
    with pytest.raises(DataError, match=message):
        load(rows, **keys)


def test_a_template_needs_no_markers_but_an_end_of_turn(load):
    bare = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>" \
           "{% endif %}"
    for train_on in ("all", "last"):
        with pytest.raises(ModelError, match="the policy would never learn to stop"):
            load([{"messages": TURNS}], template=bare, train_on=train_on)
    example, = load([{"messages": TURNS}], template=bare.replace("content }}", "content }}<eos>")).train
    assert learned(example)[0] == "2<eos>four<eos>"


def test_a_row_that_the_template_does_not_write_as_it_would_be_sampled_is_named(load):
    forgetful = "{% for m in messages %}{% if loop.last or add_generation_prompt %}<{{ m.role }}>{{ m.content }}<eos>" \
                "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    with pytest.raises(DataError, match=r"rows.jsonl:1: the chat template changes earlier messages when"):
        load([{"messages": TURNS}], template=forgetful, train_on="last")
    brief = "{% for m in messages %}<{{ m.role }}>{{ m.content[:3] }}<eos>{% endfor %}{% if add_generation_prompt %}" \
            "<assistant>{% endif %}"
    with pytest.raises(DataError, match=r"rows.jsonl:2: the chat template leaves out or changes the assistant's text"
                                        r" in message 3, at 'four'"):
        load([{"messages": TURNS[:2]}, {"messages": TURNS}], template=brief)


def test_a_response_follows_its_prompt_without_a_space_of_the_tokenizer(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "yes ", "response": "no is 12"}) + "\n")
    for scheme in ("byte-level", "sentencepiece", "sentencepiece legacy"):
        tokenizer = tokenizer_of(FAMILIES["Llama-2"], scheme)
        example, = load_examples(SupervisedDataSection(path=str(path), format="text"), tokenizer, 64, seed=0).train
        assert tokenizer.decode(example.token_ids) == "yes no is 12</s>"
        prompt = render_text("yes ", tokenizer)
        assert example.token_ids[:len(prompt)] == prompt
        assert example.loss_mask == tuple(place >= len(prompt) for place in range(len(example.token_ids)))


def test_a_template_that_refuses_the_roles_is_told_with_the_row(load):
    strict = "{% generation %}{% endgeneration %}{{ raise_exception('no tools here') }}"
    with pytest.raises(DataError, match="rows.jsonl:1: the chat template refuses the messages: no tools here"):
        load([{"messages": TURNS}], template=strict)


def test_held_out_examples_are_apart_and_depend_on_content_alone(load):
    rows = [{"prompt": str(i), "response": str(i + 1)} for i in range(20)]
    found = load([*rows, rows[3]], heldout=5)
    assert len(found.heldout) == 5
    assert not {e.token_ids for e in found.train} & {e.token_ids for e in found.heldout}
    turned = load([rows[3], *rows[::-1]], heldout=5)
    assert [e.uid for e in turned.heldout] == [e.uid for e in found.heldout] and turned.digest != found.digest


def test_a_held_out_file_that_shares_examples_is_refused_unless_allowed(load, tmp_path):
    rows = [{"prompt": str(i), "response": "1"} for i in range(4)]
    other = Path(tmp_path / "other.jsonl")
    other.write_text(json.dumps(rows[2]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"1 of the 4 .*rows.jsonl:3, same as .*other.jsonl:1"):
        load(rows, heldout_path=str(other))
    assert len(load(rows, heldout_path=str(other), heldout_overlap="remove").train) == 3
    assert load(rows, heldout_path=str(other), heldout_overlap="keep").overlap == 1


def test_a_character_that_the_tokenizer_lacks_is_refused_or_dropped_where_it_would_be_learned(load):
    rows = [{"prompt": "it’s", "response": "2"}, {"prompt": "1+1", "response": "it’s 2"}]
    with pytest.raises(UnknownTokenError, match=r"rows.jsonl:2: the tokenizer has no token for '’', so <unk> "
                                                r"would be learned; set data.unknown_tokens=drop to leave such rows"):
        load(rows)
    kept = load(rows, unknown_tokens="drop")
    assert [example.origin[-2:] for example in kept.train] == [":1"]
    assert kept.skipped == {"dropped, a character without a token": 1}


@pytest.mark.parametrize("overlap", ["refuse", "remove", "keep"])
def test_no_row_left_is_an_error_beside_a_held_out_file_too(load, tmp_path, overlap):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "1", "response": "2"}) + "\n")
    with pytest.raises(DataError, match=r"no row of '.*rows.jsonl' can be used \(dropped to fit model.max_length: 1\)"):
        load([{"prompt": "1+1", "response": "x" * 99}], too_long="drop", heldout_path=str(other),
             heldout_overlap=overlap)
