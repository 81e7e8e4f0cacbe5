"""Values of a row in JSON's own types, whatever source they come from: rewards, traces and replays then see the same.

It changes what has one obvious form in JSON and refuses the rest. It does not know what a column means.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np

from frpo.errors import DataError

MAX_DEPTH = 100
"""Levels of lists and objects in a value. Pickle and JSON recurse, and fail a few hundred levels further on."""


def plain_columns(columns: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The columns of the row at `origin` in JSON's types.

    Arrays and tuples become lists; dates, times, decimal numbers and UUIDs their text; bytes the text that they are in
    UTF-8; NaN, which tables have in the place of missing values, None.
    Raises DataError naming row and column for a lone surrogate, infinity, bytes that are no text, a value that JSON
    has no place for, and one that is nested more than MAX_DEPTH levels deep.
    """
    found = {}
    for name, value in columns.items():
        try:
            found[_text(name)] = _plain(value, 1)
        except _NoPlaceError as error:
            raise DataError(f"{origin}: column {name!r} {error}") from None
    return found


class _NoPlaceError(Exception):
    """JSON has no place for a value; the message goes on after the column's name."""


def _plain(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return _text(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist(), depth)
    if isinstance(value, Mapping | list | tuple):
        if depth > MAX_DEPTH:
            raise _NoPlaceError(f"is nested more than {MAX_DEPTH} levels deep; make it flatter")
        if isinstance(value, Mapping):
            return {_text(key): _plain(item, depth + 1) for key, item in value.items()}
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, bytes):
        return _decoded(value)
    if isinstance(value, date | time | timedelta | Decimal | UUID):
        return str(value)
    raise _NoPlaceError(f"holds {type(value).__name__}, which JSON has no place for; store text, a number, a list or "
                        "an object, or leave the column out")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _NoPlaceError(f"has the key {value!r:.60} in an object; keys must be text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _NoPlaceError(f"holds the lone surrogate {value[error.start]!r} at character {error.start}, half a "
                            "character that no text may have; write the whole character, or remove it") from None
    return str(value)


def _number(value: float) -> float | None:
    if math.isinf(value):
        raise _NoPlaceError(f"holds a number beyond the largest float ({value}); write a smaller one, or text")
    return None if math.isnan(value) else float(value)


def _decoded(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _NoPlaceError(f"holds bytes that are not UTF-8 text ({error.reason} at byte {error.start}); store text, "
                            "or leave the column out") from None
