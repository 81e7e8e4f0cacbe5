"""Read the rows of a data set: a local file or folder, a Hugging Face data set, or generated rows.

Every row has its origin, and every error names it. This module does not interpret columns, render or tokenize.
"""
from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from frpo.data import tables
from frpo.data.hub import unreachable
from frpo.data.plain import plain_columns
from frpo.data.sets.arithmetic import problems
from frpo.data.sets.constraints import heldout_rows, training_rows
from frpo.data.text_files import Record, delimited, json_lines, json_list
from frpo.errors import DataError, here
from frpo.types import is_one_of

Reader = Callable[[Path], Iterator[Record]]

TEXT_FILES: Mapping[str, Reader] = {
    ".jsonl": json_lines, ".ndjson": json_lines, ".json": json_list, ".csv": partial(delimited, delimiter=","),
    ".tsv": partial(delimited, delimiter="\t")}
"""Suffix -> reader; a .gz may follow the suffix."""

READERS: Mapping[str, Reader] = {
    **TEXT_FILES, **{f"{suffix}.gz": reader for suffix, reader in TEXT_FILES.items()}, ".parquet": tables.parquet}

NO_ROWS = ("config.json", "dataset_info.json", "dataset_infos.json", "state.json")
"""Files of a folder that hold no rows."""

ALLOWED = f"{', '.join(TEXT_FILES)} (each also with .gz at the end) or .parquet"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One record, with values of JSON's types. origin: the place where a user finds it, such as "train.jsonl:17".

    The number in an origin is a line number (JSON Lines, CSV) or a row number (JSON, Parquet), from 1 on. For data sets
    of `datasets` it is their index, from 0 on.
    """

    origin: str
    columns: Mapping[str, Any]


def read_rows(path: str, *, split: str, limit: int | None, seed: int, subset: str | None = None) -> list[Row]:
    """Read the first `limit` rows (all if None) of `path`, in their own order.

    path: a name in GENERATED; a local file with a suffix of READERS; a local folder, saved by `datasets` or with such
        files; or the id of a Hugging Face data set.
    split, subset: of a folder or a Hugging Face data set. seed: order of generated rows. Other sources ignore these
        arguments.
    Raises DataError for a source that is missing, broken or empty, naming file and line if possible.
    """
    records = _generated(path, limit, seed) if path in GENERATED else _records(path, subset, split)
    rows = [Row(origin=origin, columns=plain_columns(columns, origin)) for origin, columns in islice(records, limit)]
    if not rows:
        raise DataError(f"data set {path!r} has no rows; give a data set with at least one row")
    return rows


def looks_local(path: str) -> bool:
    """Check whether a path that does not exist here is no hub id either. Hub ids are `name` or `owner/name`."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or ("/" in path and Path(path).parent.is_dir())


def select(rows: list[Row], where: Mapping[str, Sequence[Any]], rename: Mapping[str, str]) -> list[Row]:
    """Keep the rows whose columns have one of the wanted values, and rename columns.

    Raises DataError if no row is left, if a column is missing or if its new name is taken.
    """
    kept = [row for row in rows if all(is_one_of(column(row, name, object), values) for name, values in where.items())]
    if len(set(rename.values())) < len(rename):
        raise DataError("data.rename gives two columns the same name, so one would be lost; rename one differently; "
                        f"given {dict(rename)}")
    if not kept:
        raise DataError(f"data.where keeps none of {len(rows)} rows; given {dict(where)}, the first row has "
                        f"{ {name: rows[0].columns[name] for name in where} }; give values that rows have")
    return [_renamed(row, rename) for row in kept] if rename else kept


def _renamed(row: Row, rename: Mapping[str, str]) -> Row:
    for old, new in rename.items():
        column(row, old, object)
        if new in row.columns:
            raise DataError(f"{row.origin}: data.rename gives {old!r} the name {new!r}, but the row already has this "
                            "column; choose another name")
    return Row(origin=row.origin, columns={rename.get(name, name): value for name, value in row.columns.items()})


def column(row: Row, name: str, *kinds: type, key: str = "") -> Any:
    """Return the value of column `name`, which must be of one of `kinds`. key: the recipe's key that names the column.

    Raises DataError naming the row if the column is missing or of another type.
    """
    if name not in row.columns:
        raise DataError(f"{row.origin}: no column {name!r}; the row has "
                        f"{', '.join(map(repr, row.columns)) or 'none'}{key and f'; set {key} to one of them'}")
    value = row.columns[name]
    if not isinstance(value, kinds):
        allowed = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(f"{row.origin}: column {name!r} must be {allowed}, given {type(value).__name__} {value!r:.60}")
    return value


def _arithmetic(limit: int | None, seed: int) -> list[dict[str, str]]:
    """Return rows of every problem of the default difficulty, or `limit` of them."""
    return [{"prompt": question, "answer": answer} for question, answer in problems(limit, seed)]


GENERATED: Mapping[str, Callable[[int | None, int], list[dict[str, str]]]] = {
    "arithmetic": _arithmetic, "constraints": training_rows, "constraints_heldout": heldout_rows}
"""Sources that `data.path` and `data.heldout_path` can name instead of a file: (limit, seed) -> columns of each row."""


def _generated(name: str, limit: int | None, seed: int) -> Iterator[Record]:
    for number, columns in enumerate(GENERATED[name](limit, seed), start=1):
        yield f"{name}:{number}", columns


def _records(path: str, subset: str | None, split: str) -> Iterable[Record]:
    place, reader = Path(path), _reader(path)
    if not path.strip():
        raise DataError(f"data set {path!r}: no path is given; give a file, a folder or the id of a data set")
    try:
        is_folder, exists = place.is_dir(), place.exists()
    except OSError as error:  # a name too long, a folder above it that may not be entered
        raise DataError(f"data set {path!r:.200} cannot be found: {error.strerror}; check the path") from error
    if is_folder:
        return _folder(path, subset, split)
    if not exists and ("://" in path or set("*?") & set(path)):
        raise DataError(f"data set {path!r}: addresses and patterns are not supported; download the files into a "
                        "folder and give the folder, or a file in it")
    if reader is not None:
        return reader(place)
    if exists:
        raise DataError(f"data file {path!r} has no known suffix; rename it; allowed: {ALLOWED}")
    if looks_local(path) or ("/" not in path and place.suffix[1:].isalpha()):
        raise DataError(f"data set {path!r}: there is no such file or folder ({here()}); give a file ({ALLOWED}), a "
                        "folder, or the id of a Hugging Face data set, such as owner/name (~ is not expanded)")
    if reason := unreachable(path, "dataset", "README.md"):
        raise DataError(f"data set {path!r}: there is no such file or folder ({here()}), and {reason}; correct "
                        "data.path, or give a local file")
    return tables.hugging_face(path, subset, split)


def _folder(path: str, subset: str | None, split: str) -> Iterable[Record]:
    """Read a folder: a saved data set, or files.

    Files with a known suffix are read by READERS, which keep line numbers and values. `datasets` may change the values
    of such a file ("007" becomes 7).
    """
    if tables.is_saved(Path(path)):
        return tables.saved(path, split)
    splits = tables.split_files(path, subset)
    files = [file for each in splits.values() for file in each]
    _check_all_taken(Path(path), files)
    unknown = [file for file in files if not (file.is_file() and _reader(file.name))]
    if len(unknown) == len(files):
        return tables.hugging_face(path, subset, split)
    if unknown:
        raise DataError(f"data set {path!r}: its file {unknown[0]} has no known suffix; move it out of the folder, or "
                        f"give it a suffix ({ALLOWED})")
    return tables.of_split(path, {name: chain.from_iterable(map(_records_of, each))
                                  for name, each in splits.items()}, split)


def _records_of(file: Path) -> Iterator[Record]:
    reader = _reader(file.name)
    assert reader is not None  # files that have none are refused before
    return reader(file)


def _check_all_taken(folder: Path, files: Sequence[Path]) -> None:
    """Raise DataError for a file of rows that belongs to no split, unless README.md lists the files of each split."""
    readme = folder / "README.md"
    if readme.is_file() and re.search("^configs:", readme.read_text(encoding="utf-8", errors="replace"), re.MULTILINE):
        return
    taken = {os.path.realpath(file) for file in files}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        ours = _reader(file.name) and file.name not in NO_ROWS and not file.is_dir()
        hidden = any(part.startswith((".", "__")) for part in name.parts)
        if ours and not hidden and os.path.realpath(file) not in taken:
            raise DataError(f"data set {str(folder)!r}: {name} would be left out. `datasets` reads files of one type "
                            "only; if some are named after a split, it reads only those. Write and name the file like "
                            "the others (train-2.jsonl), move it out of the folder, or set data.path to one file")


def _reader(name: str) -> Reader | None:
    return next((reader for suffix, reader in READERS.items() if name.lower().endswith(suffix)), None)
