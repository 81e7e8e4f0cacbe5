"""Rows changed at random: what they hold is loaded and what is left out is counted, or one FrpoError tells of them."""
from __future__ import annotations

import csv
import functools
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_templates import FAMILIES, tokenizer_of
from frpo.config.preference import PreferenceDataSection
from frpo.config.sections import DataSection
from frpo.config.supervised import SupervisedDataSection
from frpo.data.examples import load_examples
from frpo.data.preferences import load_pairs
from frpo.data.prompts import load_prompts
from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.data.source import read_rows
from frpo.errors import DataError, FrpoError, ModelError
from frpo.inputs import path_of
from odd_values import LONG, PLAIN, any_values, assert_plain, fuzzed, plain_values


def message(role, content):
    return {"role": role, "content": content}


TALK = [message("system", "be brief"), message("user", "1+1="), message("assistant", "2"), message("user", "2+2=")]
ANSWERED = [*TALK[1:], message("assistant", "4")]
GOOD = {
    "prompts": [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+3=", "answer": "5"}, {"prompt": TALK, "answer": "4"},
                {"question": "How?", "answer": "<<1+2=3>> so 3\n#### 3"}, {"prompt": "é\t\n 7", "task": {"kind": 7}}],
    "examples": [{"prompt": "1+1=", "response": "2"}, {"messages": ANSWERED}, {"prompt": TALK, "response": "4"},
                 {"prompt": "say a", "response": "a"}, {"messages": ANSWERED[:2], "prompt": None}],
    "pairs": [{"prompt": "1+1=", "chosen": "2", "rejected": "3"},
              {"chosen": ANSWERED, "rejected": [*TALK[1:], message("assistant", "5")]},
              {"chosen": "\n\nHuman: 1+1\n\nAssistant: 2", "rejected": "\n\nHuman: 1+1\n\nAssistant: 3"},
              {"prompt": "how", "response_0": "so", "response_1": "no", "better_response_id": 0, "safer_response_id": 1,
               "is_response_0_safe": False, "is_response_1_safe": True},
              {"prompt": TALK, "chosen": [message("assistant", "4")], "rejected": "5", "margin": 0.5}]}
"""Rows of each kind that are right, in every layout."""

ROLES = ["system", "user", "assistant", "tool", "human", "gpt", "", "User", None, 3]
TURNS = st.lists(st.builds(message, st.sampled_from(ROLES[:4] * 3 + ROLES),
                           st.sampled_from(["1", "2+2=", "", " ", "\n", None, 3, ["x"], "<eos>", "<assistant>", "é",
                                            "\uf8ff", "\ue000", "<think>\n</think>", "x" * LONG])), max_size=5)
CELLS = st.one_of(plain_values, TURNS, TURNS.map(lambda turns: [*turns, TALK[1]]),
                  TURNS.map(lambda turns: [*turns, *ANSWERED[:2]]),
                  TURNS.map(lambda turns: [turn | {"name": None} for turn in turns]),
                  TURNS.map(lambda turns: [{"tool_calls": []} | turn for turn in turns]), st.text(max_size=6),
                  st.sampled_from(["\n\nHuman:", "\n\nAssistant: x", "Human: a\n\nAssistant:", "<eos>", "<user>",
                                   "<<1+=2>>", "<<1+1=2>>", "#### ", "<<" + "9" * 400 + "*9=1>>", "<<1/0=1>>", -1, 2,
                                   "0", "true"]))
NAMES = sorted({name for rows in GOOD.values() for row in rows for name in row}
               | {"", " ", "promt", "x" * 300, "é", "\0", "a.b"})

PIECES = [b"", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xe9", b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"PAR1", b"{",
          b"}", b"[", b"]", b",", b":", b'"', b'""', b"\\", b"\t", b";", b"NaN", b"-Infinity", b"1e999", b"1" * 5000,
          b"null", b"x", b"\\ud800", b"[" * 3000, b'{"a":' * 3000, b'{"a": 1, "a": 2}', b"{}", b"[]", b"// comment",
          b"'", b"\x1a", b"\xe2\x80\xa8", b"\x85", b"\x0b", b"\x0c", b" "]
ENCODINGS = ["utf-8"] * 40 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252"]
SUFFIXES = ["jsonl"] * 12 + [
    "json", "json", "csv", "tsv", "ndjson", "jsonl.gz", "csv.gz", "parquet", "parquet", "txt", "JSONL"]


@functools.cache
def tokenizers():
    strict = build_tokenizer()
    strict.chat_template = ("{% for m in messages %}"
                            "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
                            "<{{ m.role }}>{{ m.content | trim }}<eos>{% endfor %}"
                            "{% if add_generation_prompt %}<assistant>{% endif %}")
    return (build_tokenizer(), build_tokenizer(), strict, tokenizer_of(FAMILIES["Qwen3"], "byte-level"),
            tokenizer_of(FAMILIES["Llama-2"], "sentencepiece"), tokenizer_of(FAMILIES["Gemma"], "sentencepiece"))


@st.composite
def tables(draw, kind):
    """A few rows of a kind, right ones and changed ones."""
    rows = []
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 2, 3]))):
        row = dict(draw(st.sampled_from(GOOD[kind][:draw(st.sampled_from([1, 5]))])))
        for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
            how = draw(st.sampled_from(["set"] * 8 + ["drop", "rename", "add", "add"]))
            name = draw(st.sampled_from(sorted(row))) if row else "prompt"
            if how == "set":
                row[name] = draw(CELLS)
            elif how == "drop":
                row.pop(name, None)
            elif how == "rename":
                row[draw(st.sampled_from(NAMES))] = row.pop(name, None)
            else:
                row[draw(st.sampled_from(NAMES))] = draw(CELLS)
        rows.append(row)
    return rows


def as_lines(rows):
    return "\n".join(json.dumps(row, ensure_ascii=len(rows) % 2 == 0) for row in rows)


def as_cells(rows, delimiter):
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, delimiter=delimiter, escapechar="\\", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_parquet(rows):
    """The rows as a Parquet file; columns of mixed types, which Arrow does not take, as JSON text."""
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError, ValueError, TypeError):
            columns[name] = pa.array([json.dumps(value) for value in values])
    file = io.BytesIO()
    try:
        pq.write_table(pa.table(columns), file)
    except pa.ArrowNotImplementedError:  # an object without keys
        return b"PAR1"
    return file.getvalue()


@st.composite
def contents(draw, rows, suffix):
    """The bytes of a file of this suffix, sometimes in another encoding, changed in a place or cut."""
    plain = suffix.removesuffix(".gz")
    if plain == "parquet":
        content = as_parquet(rows)
    else:
        text = (json.dumps(rows) if plain == "json" else as_cells(rows, ",") if plain == "csv" else
                as_cells(rows, "\t") if plain == "tsv" else as_lines(rows))
        content = text.encode(draw(st.sampled_from(ENCODINGS)), "replace")
    if draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, len(content)))
        until = place + draw(st.sampled_from([0, 0, 1, 9]))
        content = content[:place] + draw(st.sampled_from(PIECES)) + content[until:]
    packed = gzip.compress(content, mtime=0) if suffix.endswith(".gz") else content
    cut = draw(st.sampled_from([0] * 20 + [1, 4, 9, len(packed) // 2]))
    return packed[:max(0, len(packed) - cut)]


def shared_keys(draw, kind, path):
    keys = {"path": path, "heldout": draw(st.sampled_from([0, 0, 0, 1, 5])),
            "format": draw(st.sampled_from(["chat", "chat", "text"]))}
    if draw(st.integers(0, 9)) == 0:
        keys["where"] = {draw(st.sampled_from(NAMES)): draw(st.lists(st.sampled_from(PLAIN), max_size=2))}
    if draw(st.integers(0, 5)) == 0:
        keys["limit"] = draw(st.integers(1, 3))
    if draw(st.integers(0, 8)) == 0:
        keys["split"] = draw(st.sampled_from(["train", "all", "x", "", "train[:1]"]))
    if draw(st.integers(0, 6)) == 0:
        keys |= {"heldout_path": path, "heldout_overlap": draw(st.sampled_from(["refuse", "remove", "keep"]))}
    if draw(st.integers(0, 6)) == 0 and keys["format"] == "chat":
        keys["system_prompt"] = draw(st.sampled_from(["be brief", "", " ", "é", "\uf8ff"]))
    if draw(st.integers(0, 9)) == 0 and kind != "examples":
        keys["rename"] = draw(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(NAMES), max_size=2))
    return keys


def loaded(draw, kind, path):
    """Load the rows of a file by settings drawn at random. Returns the split, and the keys."""
    keys, tokenizer = shared_keys(draw, kind, path), draw(st.sampled_from(tokenizers()))
    embeddings = draw(st.sampled_from([None, None, len(tokenizer), len(tokenizer), 104, 20]))
    most = draw(st.sampled_from([64, 64, 4096, 8]))
    if kind == "prompts":
        keys["format"] = draw(st.sampled_from([keys["format"]] * 5 + ["calculator"]))
        keys["prompt_column"] = draw(st.sampled_from(["prompt"] * 7 + ["question"]))
        section = DataSection(max_prompt_tokens=most, **keys)
        return lambda: load_prompts(section, tokenizer, 0, embeddings), section
    too_long = draw(st.sampled_from(["refuse", "cut", "drop"]))
    drop = [draw(st.sampled_from(["refuse", "drop"])) for _ in range(2)]
    if kind == "examples":
        section = SupervisedDataSection(too_long=too_long, unknown_tokens=drop[0], train_on=draw(
            st.sampled_from(["all", "last"])), **keys)
        return lambda: load_examples(section, tokenizer, most, 0, embeddings), section
    section = PreferenceDataSection(too_long=too_long, equal=drop[0], contradictory=drop[1], ties=draw(
        st.sampled_from(["half", "drop"])), **keys)
    compares = draw(st.sampled_from(["better", "better", "harm"]))
    return lambda: load_pairs(section, tokenizer, most, compares, 0, embeddings), section


def rows_case(place, data):
    """A file of changed rows: loaded with every row kept or counted, or refused by one message."""
    kind = data.draw(st.sampled_from(sorted(GOOD)))
    rows = data.draw(tables(kind))
    suffix = data.draw(st.sampled_from(SUFFIXES))
    path = place / f"rows.{suffix}"
    path.write_bytes(data.draw(contents(rows, suffix)))
    load, section = loaded(data.draw, kind, str(path))
    try:
        split = load()
    except (DataError, ModelError) as error:
        assert_plain(str(error))
        return
    assert split.train
    assert all(item.token_ids for part in (split.train, split.heldout) for item in part)
    read = read_rows(str(path), split=section.split, limit=section.limit, seed=0)
    assert_json(read)
    if not section.where and section.format != "calculator":
        counted = sum(count for reason, count in split.skipped.items() if not reason.startswith("cut"))
        total = len(split.train) + len(split.heldout) + counted
        assert total == len(read) or section.heldout_path
    assert split.summary("rows", section)


def assert_json(rows):
    """Every column comes in JSON's types, and so survives being written into traces."""
    for row in rows:
        text = json.dumps(row.columns, allow_nan=False)
        assert json.loads(text) == row.columns


def given_case(place, data):
    """Rows given as objects of Python, any at all."""
    kind = data.draw(st.sampled_from(sorted(GOOD)))
    rows = data.draw(tables(kind))
    for row in rows:
        if row and data.draw(st.integers(0, 2)) == 0:
            row[data.draw(st.sampled_from(sorted(row)))] = data.draw(any_values)
    forms = st.sampled_from([rows, rows, rows, tuple(rows), {"train": rows}])
    given_rows = data.draw(forms if rows else any_values)
    try:
        read_rows(path_of(given_rows), split="train", limit=None, seed=0)
    except FrpoError as error:
        assert_plain(str(error))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@fuzzed(900)
@given(st.data())
def test_changed_rows_are_loaded_or_told_of_in_one_message(place, data):
    rows_case(place, data)


@fuzzed(100)
@given(st.data())
def test_rows_given_as_objects_too(place, data):
    given_case(place, data)
