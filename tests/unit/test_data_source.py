"""Rows from files, from `datasets` and from the generator, and the message for each way in which they can be broken."""
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from frpo.data.sets.arithmetic import ALPHABET, problems
from frpo.data.source import Row, column, looks_local, read_rows, select
from frpo.errors import DataError


def read(path, limit=None, split="train", seed=0):
    return read_rows(str(path), split=split, limit=limit, seed=seed)


def write(folder, *lines: bytes):
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def test_rows_keep_physical_line_numbers(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + b'{"prompt": "a"}', b"", b"  ", b'{"prompt": "b", "answer": 2}', b"")
    assert read(path) == [Row(origin=f"{path}:1", columns={"prompt": "a"}),
                          Row(origin=f"{path}:4", columns={"prompt": "b", "answer": 2})]


def test_limit_reads_no_further(tmp_path):
    path = write(tmp_path, b'{"prompt": "a"}', b'{"prompt": "b"}', b"broken")
    assert [row.columns["prompt"] for row in read(path, limit=2)] == ["a", "b"]


@pytest.mark.parametrize("line, wrong", [
    (b'{"prompt": "a"', r"invalid JSON: Expecting ',' delimiter at column 15"),
    (b'["a"]', "expected a JSON object of columns, given list"),
    (b'{"prompt": "\xff"}', "not UTF-8 .* at byte 12"),
])
def test_broken_line_is_named(tmp_path, line, wrong):
    path = write(tmp_path, b'{"prompt": "a"}', b"", line)
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: {wrong}"):
        read(path)


def test_missing_empty_and_foreign_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl' cannot be read: No such file"):
        read(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match=r"rows\.jsonl' has no rows"):
        read(write(tmp_path, b"", b" "))
    text = tmp_path / "rows.txt"
    text.write_text("prompt\na\n")
    with pytest.raises(DataError, match=r"rows\.txt' has no known suffix; rename it; allowed: \.jsonl, .*parquet"):
        read(text)


@pytest.mark.parametrize("path", ["./rows", "~/rows", "/none/rows", "a/b/c", "here/rows", "rows.jsnl"])
def test_a_local_path_that_leads_nowhere_is_told_at_once(tmp_path, monkeypatch, path):
    """Without asking the hub, which takes half a minute where it cannot be reached."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    with pytest.raises(DataError, match=f"data set '{path}': there is no such file or folder .*; give a file"):
        read(path)


def test_hub_ids_do_not_look_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not any(map(looks_local, ("gsm8k", "openai/gsm8k", "owner/name-v1.1")))


@pytest.mark.parametrize("name, content", [
    ("R.JSONL", '{"p": "a"}'), ("r.ndjson", '{"p": "a"}'), ("r.json", '[{"p": "a"}]'), ("r.csv", "p\na"),
    ("r.tsv", "p\tq\na\t"), ("r.parquet", None)])
def test_the_suffix_says_how_a_file_is_read(tmp_path, name, content):
    if content is None:
        pq.write_table(pa.table({"p": ["a"]}), tmp_path / name)
    else:
        (tmp_path / name).write_text(content)
    assert [row.columns["p"] for row in read(tmp_path / name, split="ignored")] == ["a"]
    if name in ("r.csv", "r.json"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        assert [row.columns["p"] for row in read(tmp_path / f"{name}.gz")] == ["a"]


def test_every_source_gives_plain_values(tmp_path):
    """Beyond a float, and half a character: Python's JSON takes both."""
    path = write(tmp_path, b'{"p": 1}', rb'{"p": {"q": ["\ud800"]}}')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: column 'p' holds the lone surrogate"):
        read(path)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: column 'p' holds a number beyond the largest float"):
        read(write(tmp_path, b'{"p": 1e999}'))


def test_column_names_what_the_row_has():
    row = Row(origin="train.jsonl:17", columns={"question": "a", "answer": 3})
    assert column(row, "answer", int, str) == 3
    with pytest.raises(DataError, match="train.jsonl:17: no column 'prompt'; the row has 'question', 'answer'"):
        column(row, "prompt", str)
    with pytest.raises(DataError, match="train.jsonl:17: column 'answer' must be str or list, given int 3"):
        column(row, "answer", str, list)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def test_files_of_a_folder_are_those_of_the_split_and_keep_their_lines(folder):
    for name, prompts in (("train-0.jsonl", "ab"), ("train-1.jsonl", "c"), ("test.jsonl", "de")):
        (folder / name).write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    assert [(row.origin, row.columns["prompt"]) for row in read(folder)] == [
        (f"{folder / 'train-0.jsonl'}:1", "a"), (f"{folder / 'train-0.jsonl'}:2", "b"),
        (f"{folder / 'train-1.jsonl'}:1", "c")]
    assert read(folder, limit=1, split="test") == [Row(origin=f"{folder / 'test.jsonl'}:1", columns={"prompt": "d"})]
    (folder / "test.jsonl").write_text('{"prompt": "a", "prompt": "b"}')
    with pytest.raises(DataError, match=r"test\.jsonl:1: the key 'prompt' is given twice"):
        read(folder, split="test")
    with pytest.raises(DataError, match="set' has no split 'dev'; it has: 'train', 'test'; set data.split to one"):
        read(folder, split="dev")


def test_the_rest_of_what_load_dataset_takes(folder):
    """The real one, on a local folder since the hub cannot be reached: text files, and a slice of a split."""
    with pytest.raises(DataError, match="set' cannot be loaded: .*doesn't contain any data files; check data.path"):
        read(folder)
    (folder / "test.txt").write_text("a\nb\nc\n")
    assert read(folder, limit=2, split="test") == [
        Row(origin=f"{folder}[test]:{i}", columns={"text": p}) for i, p in enumerate("ab")]
    assert [row.columns["text"] for row in read(folder, split="test[1:]")] == ["b", "c"]


@pytest.mark.parametrize("split, expected", [
    ("all", "abcde"), ("train[1:]", "bc"), ("train[-1:]", "c"), ("test+train[:1]", "dea"), ("train[:67%]", "ab")])
def test_parts_of_splits_are_read_as_written_too(folder, split, expected):
    """`datasets` makes numbers and dates of text, and takes a key given twice."""
    (folder / "train.jsonl").write_text("".join(f'{{"p": "{p}", "day": "2024-01-02"}}\n' for p in "abc"))
    (folder / "test.jsonl").write_text("".join(f'{{"p": "{p}", "day": "2024-01-02"}}\n' for p in "de"))
    rows = read(folder, split=split)
    assert "".join(row.columns["p"] for row in rows) == expected
    assert {row.columns["day"] for row in rows} == {"2024-01-02"}
    assert rows[0].origin.endswith(f".jsonl:{1 + 'abc'.find(expected[0]) if expected[0] in 'abc' else 1}")
    (folder / "test.jsonl").write_text('{"p": 1, "p": 2}\n')
    with pytest.raises(DataError, match=r"test\.jsonl:1: the key 'p' is given twice"):
        read(folder, split=split)


@pytest.mark.parametrize("split", ["train[:x]", "train+dev", ""])
def test_an_expression_that_cannot_be_read(folder, split):
    (folder / "train.jsonl").write_text('{"p": 1}\n')
    with pytest.raises(DataError, match=r"data.split .* cannot be read: .*; give a split, or parts of splits such as"):
        read(folder, split=split)


@pytest.mark.parametrize("names, message", [
    (("a.csv", "b.jsonl"), "a.csv would be left out"), (("a.jsonl", "b.txt", "c.txt"), "a.jsonl would be left out"),
    (("train.jsonl", "more.jsonl"), "more.jsonl would be left out. .* Write and name the file like the others"),
    (("a.jsonl", "a.jsonl.bak"), "a.jsonl.bak has no known suffix; move it out of the folder")])
def test_no_file_of_a_folder_is_left_out_or_guessed_in_silence(folder, names, message):
    for name in names:
        (folder / name).write_text('{"p": 1}\n')
    with pytest.raises(DataError, match=message):
        read(folder)


def test_files_that_are_left_out_on_purpose(folder, monkeypatch):
    for name in ("rows.jsonl", "more.csv", ".hidden.jsonl"):
        (folder / name).write_text('{"p": 1}\n')
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: rows.jsonl\n---\n")
    assert len(read(folder)) == 1
    (folder / "README.md").unlink()
    (folder / "more.csv").rename(folder / "dataset_infos.json")
    (folder / "dataset_infos.json").write_text("{}")
    (folder.parent / "link").symlink_to(folder)
    assert len(read(folder.parent / "link")) == 1
    monkeypatch.chdir(folder)
    assert len(read(".")) == 1


@pytest.mark.parametrize("path, message", [
    ("", "no path is given"), (" ", "no path is given"),
    ("rows/*.jsonl", "patterns are not supported; download the files"),
    ("https://x.org/rows.jsonl", "'https://x.org/rows.jsonl': addresses"), ("x" * 300, "cannot be found: File name")])
def test_paths_that_are_none(path, message):
    with pytest.raises(DataError, match=message):
        read(path)


def test_generated_rows_and_their_limit():
    rows = read("arithmetic", limit=3, seed=5)
    assert [row.origin for row in rows] == ["arithmetic:1", "arithmetic:2", "arithmetic:3"]
    assert [(row.columns["prompt"], row.columns["answer"]) for row in rows] == problems(3, 5)


def test_every_problem_is_right_distinct_and_within_its_difficulty():
    drawn = problems(None, 0, max_operand=6)
    # +: 6 x 6; -: a > b; *: a x {2..6}; /: 2|2,4,6, 3|3,6, 4|4, 5|5, 6|6.
    assert len(drawn) == len(set(drawn)) == 36 + 15 + 30 + 8
    assert {("6/3=", "2"), ("6-1=", "5"), ("1*6=", "6"), ("6+6=", "12")} <= set(drawn)
    for question, answer in drawn:
        assert question[-1] == "=" and set(question + answer) <= set(ALPHABET)
        assert eval(question[:-1]) == int(answer) > 0
    wide = [question for question, _ in problems(None, 0)]
    assert len(wide) == 50 * 50 + 50 * 49 // 2 + 50 * 11 + sum(50 // b for b in range(2, 13))


def test_seed_decides_the_order_and_operations_are_balanced():
    assert problems(50, 1) == problems(200, 1)[:50] != problems(50, 2)
    signs = [next(sign for sign in "+-*/" if sign in question) for question, _ in problems(400, 3)]
    assert all(70 < signs.count(sign) < 130 for sign in "+-*/")  # 100 expected, standard deviation 9
    assert {question[-3] for question, _ in problems(None, 0, max_operand=5, operations="/")} == {"/"}


def test_more_problems_than_exist_is_refused():
    with pytest.raises(DataError, match=r"90 distinct problems are requested.*give only 89; lower data.limit"):
        problems(90, 0, max_operand=6)
    with pytest.raises(DataError, match="given '\\^'"):
        problems(1, 0, operations="^")


def test_select_keeps_wanted_rows_and_renames_columns():
    rows = [Row(origin=f"f:{i}", columns={"level": level, "solution": str(i)}) for i, level in enumerate("abca")]
    kept = select(rows, {"level": ["a", "c"]}, {"solution": "answer"})
    assert [(row.origin, dict(row.columns)) for row in kept] == [
        ("f:0", {"level": "a", "answer": "0"}), ("f:2", {"level": "c", "answer": "2"}),
        ("f:3", {"level": "a", "answer": "3"})]


def test_true_is_not_one():
    rows = [Row(origin="f", columns={"k": value}) for value in (1, True, 1.0, "1", 0, False)]
    assert [row.columns["k"] for row in select(rows, {"k": [1]}, {})] == [1, 1.0]
    assert [row.columns["k"] for row in select(rows, {"k": [False]}, {})] == [False]


@pytest.mark.parametrize("where, rename, message", [
    ({"level": ["z"]}, {}, "data.where keeps none of 1 rows"),
    ({"grade": [1]}, {}, "f:0: no column 'grade'"),
    ({}, {"answer": "x"}, "f:0: no column 'answer'"),
    ({}, {"level": "solution"}, "f:0: data.rename gives 'level' the name 'solution', but the row already has"),
    ({}, {"level": "x", "solution": "x"}, "data.rename gives two columns the same name, so one would be lost"),
])
def test_select_refuses(where, rename, message):
    with pytest.raises(DataError, match=message):
        select([Row(origin="f:0", columns={"level": "a", "solution": "1"})], where, rename)
