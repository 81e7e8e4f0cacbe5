"""Values in JSON's types: what has one form there, and the message for what has none."""
import json
from collections import OrderedDict
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from uuid import UUID

import numpy as np
import pytest

from frpo.data.plain import MAX_DEPTH, plain_columns
from frpo.errors import DataError


def plain(value):
    return plain_columns({"x": value}, "f:1")["x"]


@pytest.mark.parametrize("value, expected", [
    ("\U0001f600\u2028\0", "\U0001f600\u2028\0"), (True, True), (None, None), (10**4000, 10**4000), (1.5, 1.5),
    (float("nan"), None), (b"caf\xc3\xa9", "caf\u00e9"), (Decimal("1.10"), "1.10"), (date(2024, 1, 2), "2024-01-02"),
    (datetime(2024, 1, 2, 3), "2024-01-02 03:00:00"), (time(1, 2), "01:02:00"), (timedelta(days=1), "1 day, 0:00:00"),
    (UUID(int=1), "00000000-0000-0000-0000-000000000001"), ((1, (2,)), [1, [2]]), (OrderedDict(a=b"b"), {"a": "b"}),
    (np.array([[1, 2]]), [[1, 2]]), (np.float32(0.5), 0.5), (np.int64(3), 3), (np.bool_(True), True),
    (np.str_("a"), "a"), (np.array(["a", None], dtype=object), ["a", None])])
def test_every_value_survives_json(value, expected):
    found = plain(value)
    assert found == expected and type(found) is type(expected)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def deep(levels):
    value = 0
    for _ in range(levels):
        value = [value]
    return value


def test_depth_is_limited_where_pickle_and_json_still_work():
    assert plain(deep(MAX_DEPTH)) == deep(MAX_DEPTH)
    with pytest.raises(DataError, match="f:1: column 'x' is nested more than 100 levels deep; make it flatter"):
        plain(deep(MAX_DEPTH + 1))


@pytest.mark.parametrize("value, message", [
    ("a\ud800", r"f:1: column 'x' holds the lone surrogate '\\ud800' at character 1"),
    ([{"y": ["\udfff"]}], r"holds the lone surrogate '\\udfff' at character 0"),
    ({"\ud800": 1}, "holds the lone surrogate"), (float("inf"), r"beyond the largest float \(inf\)"),
    ([-np.inf], r"beyond the largest float \(-inf\)"), (np.array([np.inf]), "beyond the largest float"),
    (b"\xff", "holds bytes that are not UTF-8 text .* at byte 0"), ({1: 2}, "has the key 1 in an object; keys must be"),
    ({1, 2}, "holds set, a type that JSON does not have"), (np.array([1j]), "holds complex")])
def test_what_has_no_place_names_row_and_column(value, message):
    with pytest.raises(DataError, match=message):
        plain(value)


def test_a_column_name_is_text_too():
    with pytest.raises(DataError, match=r"f:1: column '\\ud800' holds the lone surrogate"):
        plain_columns({"\ud800": 1}, "f:1")
