"""JSON Lines, JSON and CSV: what is read, at which place, and the message for each way in which a file is broken."""
import gzip

import pytest

from frpo.data.text_files import delimited, json_lines, json_list, json_object
from frpo.errors import DataError

READ = {"jsonl": json_lines, "json": json_list, "csv": lambda path: delimited(path, ","),
        "tsv": lambda path: delimited(path, "\t")}
GOOD = b'{"p": "a"}\n'


def read(folder, name, content):
    """Records, each by the part of its origin behind the file's name."""
    path = folder / name
    path.write_bytes(content)
    records = list(READ[name.removesuffix(".gz").rpartition(".")[2]](path))
    assert all(origin.startswith(f"{path}:") for origin, _ in records)
    return [(int(origin.rpartition(":")[2]), columns) for origin, columns in records]


@pytest.mark.parametrize("name, content, expected", [
    ("r.jsonl", GOOD + b"\n \n" + GOOD, [(1, {"p": "a"}), (4, {"p": "a"})]),
    ("r.jsonl", b"\xef\xbb\xbf" + GOOD + b"\xef\xbb\xbf" + GOOD, [(1, {"p": "a"}), (2, {"p": "a"})]),
    ("r.jsonl", 2 * GOOD.replace(b"\n", b"\r\n"), [(1, {"p": "a"}), (2, {"p": "a"})]),
    ("r.jsonl", 2 * GOOD.replace(b"\n", b"\r"), [(1, {"p": "a"}), (2, {"p": "a"})]),
    ("r.jsonl", '{"p": "a\u2028b\u0085c"}'.encode(), [(1, {"p": "a\u2028b\u0085c"})]),
    ("r.jsonl", rb'{"p": "\ud83d\ude00\u0000"}', [(1, {"p": "\U0001f600\0"})]),
    ("r.jsonl.gz", gzip.compress(2 * GOOD, mtime=0), [(1, {"p": "a"}), (2, {"p": "a"})]),
    ("r.json", b' [ {"p": 1},\n\n{"p":\n 2}\n]\n', [(1, {"p": 1}), (2, {"p": 2})]),
    ("r.json", b"\xef\xbb\xbf[]", []),
    ("r.json", GOOD + GOOD, [(1, {"p": "a"}), (2, {"p": "a"})]),
    ("r.csv", b'\xef\xbb\xbfp,q\r\n"a, b","1\r\n""2"""\r\n\r\n,3', [(2, {"p": "a, b", "q": '1\r\n"2"'}),
                                                                     (5, {"p": "", "q": "3"})]),
    ("r.csv", b",p\r0,a\r", [(2, {"": "0", "p": "a"})]),
    ("r.csv", b"p\n" + 200_000 * b"x", [(2, {"p": 200_000 * "x"})]),
    ("r.tsv", b"p\tq\na,b\t1\n", [(2, {"p": "a,b", "q": "1"})]),
    ("r.csv.gz", gzip.compress(b"p,q\n1,2\n", mtime=0), [(2, {"p": "1", "q": "2"})]),
])
def test_records_and_their_places(tmp_path, name, content, expected):
    assert read(tmp_path, name, content) == expected


DEEP = b'{"p": ' + 3000 * b"[" + 3000 * b"]" + b"}"
DIGITS = b'{"p": ' + 5000 * b"9" + b"}"
BROKEN = {
    "not an object": (b"[1]", "expected a JSON object of columns, given list; each .* one whole JSON object"),
    "control character": (b'{"p": "a\tb"}', "invalid JSON: Invalid control character at (line 2, )?column"),
    "single quotes": (b"{'p': 1}", "invalid JSON: Expecting property name .* at .*column"),
    "digits": (DIGITS, "an integer of more than 4300 digits; write it as text"),
    "NaN": (b'{"p": [NaN]}', "NaN is not a JSON number; write null"),
    "Infinity": (b'{"p": -Infinity}', "-Infinity is not a JSON number"),
    "twice": (b'{"p": 1, "q": 2, "p": 3}', "the key 'p' is given twice in one object; remove one"),
    "twice inside": (rb'{"p": [{"q": 1, "\u0071": 2}]}', "the key 'q' is given twice"),
    "deep": (DEEP, "lists and objects are nested too deeply; make them flatter"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_is_named_by_its_line_or_its_number(tmp_path, case):
    row, message = BROKEN[case]
    with pytest.raises(DataError, match=rf"r\.jsonl:3: {message}"):
        read(tmp_path, "r.jsonl", GOOD + b"\n" + row + b"\n" + GOOD)
    with pytest.raises(DataError, match=rf"r\.json:2: {message}"):
        read(tmp_path, "r.json", b"[" + GOOD + b"," + row + b"]")


@pytest.mark.parametrize("name, content, message", [
    ("r.jsonl", GOOD + b'{"p": "a', r"r\.jsonl:2: invalid JSON: Unterminated string .*; each line must hold one whole"),
    ("r.jsonl", GOOD + b'{"p": "\xc3', r"r\.jsonl:2: not UTF-8 \(unexpected end of data at byte 7\); save the file as"),
    ("r.jsonl", GOOD + b'{"p": "\xed\xa0\x80"}', r"r\.jsonl:2: not UTF-8 \(invalid continuation byte at byte 7\)"),
    ("r.jsonl", GOOD + GOOD[:-1] + GOOD, r"r\.jsonl:2: invalid JSON: Extra data at column 11"),
    ("r.jsonl", GOOD + 9 * b"\0", r"r\.jsonl:2: the line has NUL bytes, so the file is damaged or UTF-16; save"),
    ("r.jsonl", GOOD.decode().encode("utf-16"), r"r\.jsonl' is UTF-16; save it as UTF-8"),
    ("r.jsonl", GOOD.decode().encode("utf-16-le"), r"r\.jsonl:1: the line has NUL bytes"),
    ("r.jsonl", GOOD.decode().encode("utf-32"), r"r\.jsonl' is UTF-32; save it as UTF-8"),
    ("r.csv", b"PAR1\n\0\n", r"r\.csv' is Parquet; end its name in \.parquet"),
    ("r.jsonl", gzip.compress(GOOD, mtime=0), r"r\.jsonl' is gzip; end its name in \.gz"),
    ("r.csv", b"PK\x03\x04\0\0", r"r\.csv' is a zip archive or a workbook; unpack it, or export it as CSV"),
    ("r.jsonl.gz", GOOD, r"r\.jsonl\.gz' cannot be read: Not a gzipped file"),
    ("r.jsonl.gz", gzip.compress(GOOD, mtime=0)[:-8], r"r\.jsonl\.gz' cannot be read: Compressed file ended before"),
    ("r.json", b'[{"p": 1},\n {"p": 2}', r"r\.json: the list does not end with \] after object 2"),
    ("r.json", b'[{"p": 1} {"p": 2}]', r"r\.json: the list does not end with \] after object 1"),
    ("r.json", b"[]\n[]", r"r\.json: the list does not end"),
    ("r.json", b'[{"p": 1},\n {"p": 2', r"r\.json:2: invalid JSON: .* at line 2, column 9; each row must be"),
    ("r.json", b'[{"p": 1},]', r"r\.json:2: invalid JSON: Expecting value at column 11"),
    ("r.json", b'{"data": [\n{"p": 1}]}',
     r"r\.json:1: .*; the file must hold one list of objects, or one object per line"),
    ("r.jsonl.gz", gzip.compress(GOOD, mtime=0) + b"x", r"cannot be read: .*; the file is damaged; make it again"),
    ("r.csv", b"p;q\n1;2\n", r"r\.csv:1: the only column name is 'p;q' and has ';' in it, but this .* delimiter ','"),
    ("r.tsv", b"p,q\n1,2\n", r"r\.tsv:1: the only column name is 'p,q' and has ',' in it"),
    ("r.csv", b"p,q,p\n1,2,3", r"r\.csv:1: the column name 'p' is given twice; rename one"),
    ("r.csv", b'p,q\n"a\nb",1\n2\n', r"r\.csv:4: 1 cells, but 2 column names; give each row a cell for every name"),
    ("r.csv", b"p,q\n1,2,3\n", r"r\.csv:2: 3 cells, but 2 column names"),
    ("r.csv", b'p,q\n1,2\n"3,4\n5,6\n', r"r\.csv:3: unexpected end of data; put a cell with a quote"),
    ("r.csv", b'p,q\n1,2\n"3"x,4\n', r"r\.csv:3: ',' expected after '\"'; put a cell with a quote"),
    ("r.csv", b"p\ncaf\xe9\n", r"r\.csv:2: not UTF-8 \(invalid continuation byte at byte 3\)"),
])
def test_a_broken_file_is_named_with_the_place_and_what_to_change(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, name, content)


def test_records_before_the_broken_one_are_given_first(tmp_path):
    for name, content in (("r.jsonl", GOOD + b"{"), ("r.json", b"[" + GOOD + b", {"), ("r.csv", b'p\na\n"b')):
        (tmp_path / name).write_bytes(content)
        assert next(READ[name[2:]](tmp_path / name))[1] == {"p": "a"}


def test_json_of_another_origin(tmp_path):
    assert json_object(' {"p": [1e5]} ', "here") == {"p": [100000.0]}
    with pytest.raises(DataError, match="^here: invalid JSON: .*; each line must hold one whole JSON object$"):
        json_object("{", "here")
