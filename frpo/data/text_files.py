"""Read the records of text files: JSON Lines, JSON and delimited (CSV), each with the place where a user finds it.

The readers are strict: a run would silently learn from rows that a lenient reader repairs. This module does not check
the values of a record.
"""
from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from frpo.errors import DataError, here

Record = tuple[str, dict[str, Any]]
"""Origin, such as "train.jsonl:17", and columns by name."""

FOREIGN = {
    b"\x1f\x8b": "gzip; end its name in .gz", b"PAR1": "Parquet; end its name in .parquet",
    b"\xff\xfe\0\0": "UTF-32; save it as UTF-8", b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"PK\x03\x04": "a zip archive or a workbook; unpack it, or export it as CSV",
    b"\x28\xb5\x2f\xfd": "zstandard; unpack it", b"BZh": "bzip2; unpack it", b"\xfd7zXZ": "xz; unpack it",
    b"ARROW1": "Arrow; save it as Parquet"}
"""First bytes of files that are no UTF-8 text -> what such a file is, and how to fix it."""

FIELD_CHARS = 2**31 - 1
"""Largest cell of a delimited file; Python's own limit is 131,072 characters."""

LINE = "each line must hold one whole JSON object"

_SPACE = re.compile(r"[ \t\n\r]*")


class _RefusedError(Exception):
    """Error for JSON that Python's decoder would accept, but this module refuses."""


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number (from 1 on) and text of every line of a UTF-8 file. The text keeps its line end (LF, CRLF or CR).

    *.gz is unpacked. Raises DataError for a file that cannot be read, and naming a line that is not UTF-8.
    """
    unpacked = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        # Bytes that are not UTF-8 come as surrogates, so that a wrong encoding is found on its own line.
        with unpacked(path, "rt", encoding="utf-8", errors="surrogateescape", newline="") as file:
            start = b""
            for number, line in enumerate(file, start=1):
                raw = line.encode("utf-8", "surrogateescape")
                start = start or raw
                _check_text(path, number, raw, start)
                yield number, line.removeprefix("\ufeff") if number == 1 else line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data file {str(path)!r} cannot be read{_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Describe why a file cannot be read, and how to fix it."""
    system = getattr(error, "strerror", None)
    if system is None:
        return f": {error}; the file is damaged; make it again"
    return f": {system}{f' ({here()})' if isinstance(error, FileNotFoundError) else ''}; check the path"


def json_lines(path: Path, remedy: str = LINE) -> Iterator[Record]:
    """Yield one JSON object a line. Blank lines are skipped. Raises DataError naming the line of anything else."""
    for number, line in text_lines(path):
        if line.strip():
            origin = f"{path}:{number}"
            yield origin, json_object(line, origin, remedy)


def json_list(path: Path) -> Iterator[Record]:
    """Yield the objects of a JSON list, numbered from 1 on, or one object a line, as in many files with this suffix.

    Raises DataError naming the row, or the line, of anything else.
    """
    text, remedy = "".join(line for _, line in text_lines(path)), "each row must be one whole JSON object"
    start = _past_space(text)
    if not text.startswith("[", start):
        yield from json_lines(path, "the file must hold one list of objects, or one object per line")
        return
    position = _past_space(text, start + 1)
    for number in count(1):
        if text.startswith("]", position) and number == 1:
            break
        origin = f"{path}:{number}"
        with _strictly(origin, remedy):
            value, position = _DECODER.raw_decode(text, position)
        yield origin, _columns(value, origin, remedy)
        position = _past_space(text, position)
        if not text.startswith(",", position):
            break
        position = _past_space(text, position + 1)
    if text[position:].strip() != "]":
        raise DataError(f"{path}: the list does not end with ] after object {number}; the file is cut off, or holds "
                        "more than one list; write it as one list")


def _past_space(text: str, position: int = 0) -> int:
    """Find the end of the white space that begins at `position`."""
    found = _SPACE.match(text, position)
    assert found is not None  # no white space is a match too
    return found.end()


def json_object(text: str, origin: str, remedy: str = LINE) -> dict[str, Any]:
    """Decode `text`, which must be exactly one JSON object.

    Raises DataError, which begins with `origin` and includes `remedy`, if the text is no such object. NaN, Infinity and
    a key given twice are refused too, although Python's decoder accepts them.
    """
    with _strictly(origin, remedy):
        value = _DECODER.decode(text.lstrip("\ufeff"))
    return _columns(value, origin, remedy)


def delimited(path: Path, delimiter: str) -> Iterator[Record]:
    """Yield the rows after a line of column names, as RFC 4180 defines them.

    Every value is text. The origin of a row is the line at which the row begins.
    Raises DataError naming the line for names with another delimiter, a name given twice, too few or too many cells,
    and broken quotes.
    """
    csv.field_size_limit(FIELD_CHARS)
    reader = csv.reader((line for _, line in text_lines(path)), delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        origin = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{origin}: {error}; put a cell with a quote, a delimiter or a line end into double quotes "
                            "and double the quotes in it") from error
        if cells and names:
            yield origin, _under(names, cells, origin)
        elif cells:
            names = cells
            other = set(";,\t") & set(names[0])
            if len(names) == 1 and other:
                raise DataError(f"{origin}: the only column name is {names[0]!r:.60} and has {other.pop()!r} in it, "
                                f"but this suffix needs the delimiter {delimiter!r}; write the file with {delimiter!r}")
            if len(set(names)) < len(names):
                raise DataError(f"{origin}: the column name {_twice(names)!r} is given twice; rename one")


def _under(names: Sequence[str], cells: Sequence[str], origin: str) -> dict[str, str]:
    if len(cells) != len(names):
        raise DataError(f"{origin}: {len(cells)} cells, but {len(names)} column names; give each row a cell for every "
                        "name, and put a cell that holds the delimiter into double quotes")
    return dict(zip(names, cells))


def _check_text(path: Path, number: int, raw: bytes, start: bytes) -> None:
    """Raise DataError for a line with bytes that are not UTF-8, or with NUL bytes. start: the file's first line."""
    try:
        raw.decode("utf-8")
        wrong = "the line has NUL bytes, so the file is damaged or UTF-16" if b"\0" in raw else None
    except UnicodeDecodeError as error:
        wrong = f"not UTF-8 ({error.reason} at byte {error.start})"
    if wrong is not None:
        for mark, what in FOREIGN.items():
            if start.startswith(mark):
                raise DataError(f"data file {str(path)!r} is {what}")
        raise DataError(f"{path}:{number}: {wrong}; save the file as UTF-8")


@contextmanager
def _strictly(origin: str, remedy: str) -> Iterator[None]:
    """Raise any error of decoding JSON within this context as a DataError."""
    try:
        yield
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in error.doc.strip() else ""
        message = error.msg.removesuffix(" at")
        raise DataError(f"{origin}: invalid JSON: {message} at {line}column {error.colno}; {remedy}") from error
    except _RefusedError as error:
        raise DataError(f"{origin}: {error}") from None
    except RecursionError:
        raise DataError(f"{origin}: lists and objects are nested too deeply; make them flatter") from None
    except ValueError:  # the only other one that Python's decoder raises
        raise DataError(f"{origin}: an integer of more than {sys.get_int_max_str_digits()} digits; write it as text, "
                        "in quotes") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RefusedError(f"the key {_twice([name for name, _ in pairs])!r} is given twice in one object; remove one")
    return found


def _no_number(name: str) -> None:
    raise _RefusedError(f"{name} is not a JSON number; write null, or text in quotes")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number)


def _columns(value: Any, origin: str, remedy: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{origin}: expected a JSON object of columns, given {type(value).__name__}; {remedy}")
    return value


def _twice(names: Sequence[str]) -> str:
    """Return the first name that occurs more than once."""
    return next(name for name in names if names.count(name) > 1)
