"""Pairs of answers: the layouts of rows, which answer comes first, what is left out, what is refused and how."""
from __future__ import annotations

import json

import pytest

from frpo.config.preference import PreferenceDataSection
from frpo.data.preferences import load_pairs
from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.errors import DataError, ModelError

ROW = {"prompt": "1+1", "chosen": "2", "rejected": "3"}
JUDGED = {"prompt": "how", "response_0": "so", "response_1": "no", "better_response_id": 0, "safer_response_id": 1,
          "is_response_0_safe": False, "is_response_1_safe": True}
"""PKU-SafeRLHF: the first response is more helpful, the second safer."""

PAIR = ("<user>1+1<assistant>2<eos>", "<user>1+1<assistant>3<eos>")


def message(role, content):
    return {"role": role, "content": content}


USER, TWO, THREE = message("user", "1+1"), message("assistant", "2"), message("assistant", "3")
TALK = [message("user", "hi"), message("assistant", "yes"), message("user", "x")]
CLOSING = "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
STRICT = ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
          "<{{ m.role }}>{{ m.content }}<eos>" + CLOSING)


@pytest.fixture
def load(tmp_path):
    def load(rows, compares="better", *, template=None, max_length=64, embeddings=None, **keys):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tokenizer = build_tokenizer()
        if template:
            tokenizer.chat_template = template
        return load_pairs(PreferenceDataSection(path=str(path), **keys), tokenizer, max_length, compares, 0, embeddings)

    return load


def texts(pair):
    return tuple(build_tokenizer().decode(ids) for ids in (pair.first, pair.second))


@pytest.mark.parametrize("row", [
    ROW,
    {"prompt": [USER], "chosen": [TWO], "rejected": [THREE]},
    {"prompt": "1+1", "chosen": [TWO], "rejected": "3"},
    {"chosen": [USER, TWO], "rejected": [USER, THREE]},
    {"prompt": "1+1", "chosen": [USER, TWO], "rejected": [USER, THREE], "score_chosen": 8.0, "messages": [USER, TWO]},
    {"chosen": "\n\nHuman: 1+1\n\nAssistant: 2", "rejected": "\n\nHuman: 1+1\n\nAssistant: 3"},
    {"chosen": "Human: 1+1\n\nAssistant: 2\n", "rejected": "Human: 1+1\n\nAssistant: 3"},
    {"prompt": "1+1", "response_0": "3", "response_1": "2", "better_response_id": 1},
], ids=["texts", "messages", "mixed", "conversations", "UltraFeedback", "hh-rlhf", "hh-rlhf bare", "numbered"])
def test_every_layout_gives_the_same_pair(load, row):
    pair, = load([row]).train
    assert texts(pair) == PAIR and pair.origin.endswith("rows.jsonl:1")
    assert (pair.target, pair.margin, pair.signs) == (1.0, 0.0, (0, 0))
    same, = load([ROW]).train
    assert pair.uid == same.uid


def test_turns_of_a_text(load):
    """Two turns of one speaker are one message; a speaker's name inside a line is text; an answer may be empty."""
    before = "\n\nHuman: hi\n\nHuman: you\n\nAssistant: The Assistant: and Human: say\nAssistant: a\n\nHuman:   x"
    row = {"chosen": f"{before}\n\nAssistant: one\n\nAssistant: two", "rejected": f"{before}\n\nAssistant:"}
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content | replace('\n', '/') }}{% if m.role == 'assistant' " \
               "%}<eos>{% endif %}" + CLOSING
    pair, = load([row], template=template, max_length=128).train
    prompt = "<user>hi//you<assistant>The Assistant: and Human: say/Assistant: a<eos><user>x<assistant>"
    assert pair.first[:-1][:len(pair.second) - 1] == pair.second[:-1]
    assert texts(pair)[1] == f"{prompt}<eos>"
    assert texts(pair)[0].startswith(f"{prompt}one") and texts(pair)[0].endswith("two<eos>")


def test_a_conversation_keeps_its_turns_and_a_system_message_comes_first(load):
    row = {"chosen": [*TALK, TWO], "rejected": [*TALK, THREE]}
    pair, = load([row], system_prompt="be brief").train
    assert texts(pair)[0] == "<system>be brief<user>hi<assistant>yes<eos><user>x<assistant>2<eos>"
    assert load([row | {"prompt": TALK}]).train[0].first == load([row]).train[0].first
    assert load([{"prompt": TALK, "chosen": "2", "rejected": "3"}]).train[0].first == load([row]).train[0].first


def test_text_is_taken_as_it_is(load):
    pair, = load([ROW], format="text").train
    assert texts(pair) == ("1+12<eos>", "1+13<eos>")
    of_messages, = load([{"prompt": [USER], "chosen": [TWO], "rejected": [THREE]}], format="text").train
    assert texts(of_messages) == texts(pair)


def test_columns_may_have_other_names(load):
    renamed = {"question": "1+1", "good": "2", "bad": "3", "kind": "a"}
    rows = [renamed, renamed | {"kind": "b", "good": "4"}]
    pair, = load(rows, rename={"question": "prompt", "good": "chosen", "bad": "rejected"}, where={"kind": ["a"]}).train
    assert texts(pair) == PAIR


def test_a_margin_is_read(load):
    rows = [ROW | {"margin": margin} for margin in (1, 0.5, 0, None)]
    assert [pair.margin for pair in load(rows).train] == [1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("compares, change, first, target, signs", [
    ("better", {}, "so", 1.0, (0, 0)),
    ("better", {"better_response_id": 1}, "no", 1.0, (0, 0)),
    ("better", {"better_response_id": 1.0}, "no", 1.0, (0, 0)),
    ("better", {"better_response_id": None}, "so", 0.5, (0, 0)),
    ("better", {"better_response_id": -1}, "so", 0.5, (0, 0)),
    ("harm", {}, "so", 1.0, (1, -1)),
    ("harm", {"safer_response_id": 0, "is_response_0_safe": True, "is_response_1_safe": False}, "no", 1.0, (1, -1)),
    ("harm", {"safer_response_id": 0, "is_response_1_safe": False}, "no", 1.0, (1, 1)),
    ("harm", {"safer_response_id": 0, "is_response_0_safe": 1}, "no", 1.0, (-1, -1)),
    ("harm", {"safer_response_id": None}, "so", 0.5, (1, -1)),
    ("harm", {"is_response_0_safe": None}, "so", 1.0, (0, -1)),
    ("harm", {"is_response_0_safe": None, "is_response_1_safe": None}, "so", 1.0, (0, 0))])
def test_which_answer_comes_first(load, compares, change, first, target, signs):
    """The better one, or the more harmful one; the more harmful one is not the safer one."""
    pair, = load([JUDGED | change], compares).train
    assert texts(pair)[0] == f"<user>how<assistant>{first}<eos>" and {*texts(pair)} == {
        "<user>how<assistant>so<eos>", "<user>how<assistant>no<eos>"}
    assert (pair.target, pair.signs) == (target, signs)


@pytest.mark.parametrize("compares, column", [("better", "better_response_id"), ("harm", "safer_response_id")])
def test_ties_count_one_half_or_are_dropped(load, compares, column):
    rows = [JUDGED, JUDGED | {column: None, "prompt": "who"}]
    assert [pair.target for pair in load(rows, compares).train] == [1.0, 0.5]
    dropped = load(rows, compares, ties="drop")
    assert [pair.target for pair in dropped.train] == [1.0]
    assert dropped.skipped == {"neither answer is preferred (data.ties)": 1}


def test_contradictory_flags_are_refused_or_dropped_where_they_matter(load):
    rows = [JUDGED, JUDGED | {"safer_response_id": 0}]
    with pytest.raises(DataError, match=r"rows.jsonl:2: safer_response_id = 0, but response 0 is flagged unsafe and "
                                        r"response 1 safe; correct the row, or set data.contradictory to drop"):
        load(rows, "harm")
    dropped = load(rows, "harm", contradictory="drop")
    assert len(dropped.train) == 1 and dropped.skipped == {"contradictory flags (data.contradictory)": 1}
    assert len(load(rows).train) == 2


@pytest.mark.parametrize("row", [ROW | {"chosen": "3"}, {"chosen": [USER, TWO], "rejected": [USER, TWO]},
                                 JUDGED | {"response_0": "no"}])
def test_equal_answers_are_refused_or_dropped(load, row):
    with pytest.raises(DataError, match=r"rows.jsonl:2: both answers are the same text \(same tokens\), .* data.equal"):
        load([ROW, row])
    dropped = load([ROW, row], equal="drop")
    assert [texts(pair) for pair in dropped.train] == [PAIR]
    assert dropped.skipped == {"both answers are equal (data.equal)": 1}


def test_pairs_beyond_the_window_are_refused_cut_or_dropped(load):
    """The prompt has 5 tokens. Of 8, the first answer fits with its end and the second does not."""
    rows = [ROW, ROW | {"chosen": "2222"}, {"prompt": "1+1", "chosen": "7", "rejected": "77"}]
    with pytest.raises(DataError, match=r"rows.jsonl:2: prompt and answer have 10 tokens, model.max_length allows 8; "
                                        r"raise it, or set data.too_long to cut \(removes the end\) or drop"):
        load(rows, max_length=8)
    dropped = load(rows, max_length=8, too_long="drop")
    assert [pair.origin[-2:] for pair in dropped.train] == [":1", ":3"]
    assert dropped.skipped == {"longer than model.max_length": 1}
    cut = load(rows, max_length=8, too_long="cut")
    assert [texts(pair) for pair in cut.train] == [
        PAIR, ("<user>1+1<assistant>222", PAIR[1]), ("<user>1+1<assistant>7<eos>", "<user>1+1<assistant>77<eos>")]
    assert cut.skipped == {"cut to fit model.max_length": 1}
    with pytest.raises(DataError, match=r"no row of .* can be used \(longer than model.max_length: 3\)"):
        load(rows, max_length=3, too_long="drop")


def test_answers_that_differ_only_after_the_cut(load):
    rows = [ROW, {"prompt": "1+1", "chosen": "2222", "rejected": "2223"}]
    with pytest.raises(DataError, match=r"rows.jsonl:2: the answers differ only after token 8, where model.max_length "
                                        r"cuts them; raise it, or set data.too_long or data.equal to drop"):
        load(rows, max_length=8, too_long="cut")
    dropped = load(rows, max_length=8, too_long="cut", equal="drop")
    assert [texts(pair) for pair in dropped.train] == [PAIR]
    assert dropped.skipped == {"differ only where model.max_length cuts (data.equal)": 1}


HARM = "objective cost needs "
LAYOUTS = ("preference rows have prompt, chosen, rejected, or prompt, response_0, response_1, better_response_id")


@pytest.mark.parametrize("row, compares, told", [
    ({"prompt": "a", "choosen": "b", "rejected": "c"}, "better",
     "no column 'chosen' (did you mean 'choosen'?); " + LAYOUTS + "; the row has prompt, choosen, rejected (data."),
    ({"prompt": "a", "chosen": "b", "rejectd": "c"}, "better", "no column 'rejected' (did you mean 'rejectd'?); "),
    ({"prompt": "a", "response_0": "b", "respons_1": "c"}, "better",
     "no column 'response_1' (did you mean 'respons_1'?); "),
    ({"question": "a"}, "better", "no column 'chosen'; " + LAYOUTS + "; the row has question (data.rename gives"),
    ({}, "better", "the row has none (data.rename"),
    ({"prompt": "a", "response_0": "b", "response_1": "c"}, "better", "no column 'better_response_id'; " + LAYOUTS),
    ({"prompt": "a", "response_0": "b", "response_1": "c", "best_response_id": 0}, "better",
     "no column 'better_response_id' (did you mean 'best_response_id'?); "),
    ({"response_0": "b", "response_1": "c", "better_response_id": 0}, "better", "no column 'prompt'; the row has "),
    (ROW | {"response_0": "b"}, "better", "the columns chosen, rejected, response_0 belong to two layouts; keep chosen "
                                          "and rejected, or response_0 and response_1"),
    (JUDGED | {"chosen": "b"}, "harm", "the columns chosen, response_0, response_1 belong to two layouts"),
    (ROW, "harm", HARM + "response_0, response_1, is_response_0_safe, is_response_1_safe, safer_response_id; the row "
                         "has prompt, chosen, rejected; use bradley_terry"),
    ({k: v for k, v in JUDGED.items() if k != "safer_response_id"}, "harm",
     "no column 'safer_response_id'; " + LAYOUTS + "; " + HARM + "is_response_0_safe"),
    ({k: v for k, v in JUDGED.items() if k != "is_response_1_safe"} | {"is_response_1_saf": True}, "harm",
     "no column 'is_response_1_safe' (did you mean 'is_response_1_saf'?)"),
])
def test_columns_of_no_layout_or_of_two(load, row, compares, told):
    with pytest.raises(DataError) as caught:
        load([ROW if compares == "better" else JUDGED, row], compares)
    assert "rows.jsonl:2: " in str(caught.value) and told in str(caught.value)


@pytest.mark.parametrize("row, told", [
    (ROW | {"prompt": None}, "column 'prompt' must be str or list, given NoneType None"),
    (ROW | {"prompt": 3}, "column 'prompt' must be str or list, given int 3"),
    (ROW | {"prompt": ""}, "the prompt has no text; remove the row"),
    (ROW | {"prompt": " \n"}, "the prompt has no text"),
    (ROW | {"prompt": [message("user", "")]}, "the prompt has no text"),
    (ROW | {"prompt": []}, "column 'prompt': the list of messages is empty"),
    (ROW | {"prompt": [USER, TWO]}, "the last message before an answer must be the user's or a tool's, given "
                                    "'assistant'"),
    (ROW | {"prompt": [message("system", "x")]}, "must be the user's or a tool's, given 'system'"),
    (ROW | {"prompt": [message("robot", "x")]}, "column 'prompt': message 0 must be {role: "),
    (ROW | {"chosen": None}, "column 'chosen' must be str or list, given NoneType None"),
    (ROW | {"rejected": None}, "column 'rejected' must be str or list, given NoneType None"),
    (ROW | {"chosen": 2}, "column 'chosen' must be str or list, given int 2"),
    (ROW | {"rejected": {"role": "assistant", "content": "x"}}, "column 'rejected' must be str or list, given dict"),
    (ROW | {"chosen": []}, "chosen must be a text or one message of the assistant, given the roles []"),
    (ROW | {"chosen": ["x"]}, "column 'chosen': message 0 must be {role: "),
    (ROW | {"chosen": [message("assistant", None)]}, "column 'chosen': message 0 must be {role: "),
    (ROW | {"chosen": [USER]}, "chosen must be a text or one message of the assistant, given the roles ['user']"),
    (ROW | {"rejected": [TWO, USER]}, "rejected must be a text or one message of the assistant, given the roles "
                                      "['assistant', 'user']"),
    (ROW | {"chosen": [USER, TWO]}, "chosen must be a text or one message of the assistant, given the roles ['user', "),
    (ROW | {"margin": -0.5}, "margin must be a number of at least 0, or null; given -0.5"),
    (ROW | {"margin": True}, "margin must be a number of at least 0, or null; given True"),
    (ROW | {"margin": "1"}, "column 'margin' must be float or int, given str '1'"),
    (ROW | {"margin": 10**400}, "margin is beyond the largest number that a float holds; give a smaller one"),
    (ROW | {"margin": float("nan")}, "NaN is not a JSON number"),
    ({"chosen": "2", "rejected": "3"}, "chosen is a text without \"Human:\" and \"Assistant:\" turns; give a column "
                                       "'prompt', or a list of messages, given '2'"),
    ({"chosen": None, "rejected": "3"}, "column 'chosen' must be list or str, given NoneType None"),
    ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "chosen must be a prompt and an answer of the assistant, "
                                                             "given the roles ['user']; without a column 'prompt'"),
    ({"chosen": [USER, TWO], "rejected": [USER]}, "rejected must be a prompt and an answer of the assistant, given"),
    ({"chosen": [USER, TWO], "rejected": []}, "column 'rejected': the list of messages is empty"),
    ({"chosen": [TWO, TWO], "rejected": [TWO, THREE]}, "must be the user's or a tool's, given 'assistant'"),
    ({"chosen": [*TALK, TWO], "rejected": [TALK[0], THREE, TALK[2], TWO]},
     "chosen and rejected differ before their last message, at message 1; they must be the same up to"),
    ({"chosen": [*TALK, TWO], "rejected": TALK[:2]}, "differ before their last message, at message 1; "),
    ({"chosen": [USER, TWO], "rejected": [*TALK, THREE]}, "differ before their last message, at message 0; "),
    (JUDGED | {"response_1": None}, "column 'response_1' must be str or list, given NoneType None"),
    (JUDGED | {"better_response_id": "0"}, "better_response_id must be 0 or 1, or null for neither; given '0'"),
    (JUDGED | {"better_response_id": 2}, "better_response_id must be 0 or 1, or null for neither; given 2"),
    (JUDGED | {"better_response_id": True}, "better_response_id must be 0 or 1, or null for neither; given True"),
    (JUDGED | {"better_response_id": [0]}, "better_response_id must be 0 or 1, or null for neither; given [0]"),
    (JUDGED | {"safer_response_id": 0.5}, "safer_response_id must be 0 or 1, or null for neither; given 0.5"),
    (JUDGED | {"is_response_0_safe": "yes"}, "is_response_0_safe must be true or false, given 'yes'"),
    (JUDGED | {"is_response_1_safe": 2}, "is_response_1_safe must be true or false, given 2"),
])
def test_a_broken_row_is_named(load, row, told):
    with pytest.raises(DataError) as caught:
        load([ROW, row])
    assert "rows.jsonl:2: " in str(caught.value) and told in str(caught.value)


@pytest.mark.parametrize("row", [
    {"chosen": [*TALK, TWO], "rejected": [*TALK, THREE]}, ROW | {"prompt": TALK},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}])
def test_a_conversation_is_no_plain_text(load, row):
    with pytest.raises(DataError, match="rows.jsonl:1: data.format: text needs a column 'prompt' with one text, given a"
                                        " conversation of [24] messages; set data.format to chat"):
        load([row], format="text")


def test_a_template_that_refuses_or_ends_nothing_is_told(load):
    with pytest.raises(DataError, match=r"rows.jsonl:1: the chat template refuses the roles \['system', 'user'\]: no "):
        load([ROW], template=STRICT, system_prompt="x")
    once = STRICT.replace("m.role == 'system'", "m.role == 'assistant'")
    with pytest.raises(DataError, match=r"rows.jsonl:1: the chat template refuses an answer after the roles \['user'"):
        load([ROW], template=once)
    with pytest.raises(ModelError, match="writes no special token after the assistant's text, so an answer has no end"):
        load([ROW], template=STRICT.replace("<eos>", ""))
    with pytest.raises(DataError, match="rows.jsonl:1: the row already has a system message"):
        load([ROW | {"prompt": [message("system", "a"), USER]}], system_prompt="b")


def test_a_token_without_an_embedding_is_told(load):
    with pytest.raises(ModelError, match=r"rows.jsonl:2: the row needs token 'z'"):
        load([ROW, ROW | {"rejected": "z"}], embeddings=build_tokenizer().convert_tokens_to_ids("z"))


def test_held_out_pairs_are_apart_whatever_their_order(load):
    rows = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(20)]
    turned = {"prompt": "3", "chosen": "b", "rejected": "a"}
    found = load([*rows, turned], heldout=5)
    assert len(found.heldout) == 5
    assert not {pair.token_ids for pair in found.train} & {pair.token_ids for pair in found.heldout}
    again = load([turned, *rows[::-1]], heldout=5)
    assert [pair.uid for pair in again.heldout] == [pair.uid for pair in found.heldout]
    one, other = load([rows[3], turned]).train  # judged twice, in opposite ways: one item, two judgements
    assert one.uid == other.uid and one.token_ids == other.token_ids and one.first == other.second


def test_a_held_out_file_that_shares_pairs_is_refused_unless_allowed(load, tmp_path):
    rows = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(4)]
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "2", "chosen": "b", "rejected": "a"}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"1 of the 4 .*rows.jsonl:3, same as .*other.jsonl:1"):
        load(rows, heldout_path=str(other))
    removed = load(rows, heldout_path=str(other), heldout_overlap="remove")
    assert len(removed.train) == 3 and len(removed.heldout) == 1
    assert load(rows, heldout_path=str(other), heldout_overlap="keep").overlap == 1


def test_what_is_left_out_of_the_held_out_file_is_told_apart(load, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(ROW | {"prompt": "9", "rejected": each}) + "\n" for each in "27"))
    rows = [ROW | {"rejected": each} for each in "324"]
    found = load(rows, equal="drop", heldout_path=str(other), limit=2)
    assert found.skipped == {"both answers are equal (data.equal)": 1,
                             "both answers are equal (data.equal) (held-out file)": 1}
    assert (len(found.train), len(found.heldout)) == (1, 1)
