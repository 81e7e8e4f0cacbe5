"""Rows of a data set: a local .jsonl file, a Hugging Face data set, or generated rows.

Knows where each row came from and says so in every error. Does not know what the columns mean, render or tokenize.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from frpo.data.arithmetic import problems
from frpo.data.constraints import heldout_rows, training_rows
from frpo.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Row:
    """One record; `origin` is where a user finds it, such as "train.jsonl:17"."""

    origin: str
    columns: Mapping[str, Any]


def read_rows(path: str, *, split: str, limit: int | None, seed: int, subset: str | None = None) -> list[Row]:
    """The first `limit` rows (all when None) of `path`, in their own order.

    path: a name in GENERATED, a local file *.jsonl, or what `datasets.load_dataset` takes (an id, or a local folder).
    split, subset: of a Hugging Face data set. seed: order of generated rows. Other sources ignore them.
    Raises DataError for a source that is missing, broken or empty, naming file and line where there is one.
    """
    if path in GENERATED:
        rows = [Row(origin=f"{path}:{number}", columns=columns)
                for number, columns in enumerate(GENERATED[path](limit, seed), start=1)]
    elif path.endswith(".jsonl"):
        rows = list(islice(_jsonl(Path(path)), limit))
    elif Path(path).is_file():
        raise DataError(f"data file {path!r} is no .jsonl; write one JSON object a line and name it *.jsonl")
    else:
        rows = list(islice(_hugging_face(path, subset, split), limit))
    if not rows:
        raise DataError(f"data set {path!r} has no rows; give one with at least one")
    return rows


def select(rows: list[Row], where: Mapping[str, Sequence[Any]], rename: Mapping[str, str]) -> list[Row]:
    """Rows whose columns have one of the wanted values, with columns renamed. Raises DataError if no row is left, or
    where a column is missing or its new name is taken."""
    kept = [row for row in rows if all(column(row, name, object) in values for name, values in where.items())]
    if not kept:
        raise DataError(f"data.where keeps none of {len(rows)} rows; given {dict(where)}, the first row has "
                        f"{ {name: rows[0].columns[name] for name in where} }")
    return [_renamed(row, rename) for row in kept] if rename else kept


def _renamed(row: Row, rename: Mapping[str, str]) -> Row:
    for old, new in rename.items():
        column(row, old, object)
        if new in row.columns:
            raise DataError(f"{row.origin}: data.rename gives {old!r} the name {new!r}, which the row already has")
    return Row(origin=row.origin, columns={rename.get(name, name): value for name, value in row.columns.items()})


def column(row: Row, name: str, *kinds: type) -> Any:
    """The value of column `name`, which must be of one of `kinds`. Raises DataError naming the row otherwise."""
    if name not in row.columns:
        raise DataError(f"{row.origin}: no column {name!r}; the row has {', '.join(map(repr, row.columns)) or 'none'}")
    value = row.columns[name]
    if not isinstance(value, kinds):
        allowed = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(f"{row.origin}: column {name!r} must be {allowed}, given {type(value).__name__} {value!r:.60}")
    return value


def _arithmetic(limit: int | None, seed: int) -> list[dict[str, str]]:
    """Every problem of the default difficulty, or `limit` of them."""
    return [{"prompt": question, "answer": answer} for question, answer in problems(limit, seed)]


GENERATED: Mapping[str, Callable[[int | None, int], list[dict[str, str]]]] = {
    "arithmetic": _arithmetic, "constraints": training_rows, "constraints_heldout": heldout_rows}
"""What `data.path` and `data.heldout_path` can name instead of a file: (limit, seed) -> columns of each row."""


def _jsonl(path: Path) -> Iterator[Row]:
    try:
        file = path.open("rb")  # bytes: a wrong encoding is then found on its own line
    except OSError as error:
        raise DataError(f"data file {str(path)!r} cannot be read: {error.strerror}; check data.path") from error
    with file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                origin = f"{path}:{number}"
                yield Row(origin=origin, columns=_json_object(line, origin))


def _json_object(line: bytes, origin: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: not UTF-8 ({error.reason} at byte {error.start}); save the file so") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: invalid JSON: {error.msg} at column {error.colno}; "
                        "each line must hold one whole JSON object") from error
    if not isinstance(value, dict):
        raise DataError(f"{origin}: expected a JSON object of columns, given {type(value).__name__}")
    return value


def _hugging_face(path: str, subset: str | None, split: str) -> Iterator[Row]:
    # `datasets` takes a second to import and only this source needs it.
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(path, name=subset, split=split)
    # OSError covers no network, offline mode and unknown ids; ValueError an unknown split or configuration.
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"data set {path!r}, split {split!r}, cannot be loaded: {error}; check data.path and "
                        "data.split, or give a local .jsonl file where the hub cannot be reached") from error
    for number, columns in enumerate(dataset):
        yield Row(origin=f"{path}[{split}]:{number}", columns=columns)
