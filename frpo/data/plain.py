"""Convert the values of a row of any source to JSON's own types: rewards, traces and replays then get the same values.

A value with one obvious form in JSON is converted; any other value is refused. The meaning of a column does not matter.
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
"""Most levels of lists and objects in a value. Pickle and JSON recurse, and fail a few hundred levels deeper."""


def plain_columns(columns: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Convert the columns of the row at `origin` to JSON's types.

    Arrays and tuples become lists. Dates, times, decimal numbers and UUIDs become their text. Bytes become text,
    decoded as UTF-8. NaN, which tables have in place of missing values, becomes None.
    Raises DataError naming row and column for a lone surrogate, infinity, bytes that are no text, a type that JSON
    does not have, and a value nested more than MAX_DEPTH levels deep.
    """
    found = {}
    for name, value in columns.items():
        try:
            found[_text(name)] = _plain(value, 1)
        except _NoPlaceError as error:
            raise DataError(f"{origin}: column {name!r} {error}") from None
    return found


class _NoPlaceError(Exception):
    """JSON has no type for a value. The message continues the sentence after the column's name."""


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
    raise _NoPlaceError(f"holds {type(value).__name__}, a type that JSON does not have; store text, a number, a list "
                        "or an object, or leave the column out")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _NoPlaceError(f"has the key {value!r:.60} in an object; keys must be text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _NoPlaceError(f"holds the lone surrogate {value[error.start]!r} at character {error.start}, only half "
                            "of a character; write the whole character, or remove it") from None
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
