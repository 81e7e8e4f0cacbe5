"""Values that people and programs put where another one belongs, for tests that draw inputs at random."""
from __future__ import annotations

import datetime

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LONG = 3000
"""Characters of a long text: more than any message should repeat."""


def nested(depth, inner=1):
    """A list in a list in a list, to this depth."""
    for _ in range(depth):
        inner = [inner]
    return inner


NUMBERS = [0, 1, -1, 2, 3, 1.0, 0.5, -0.0, 2**31, 2**63, 2**64, -2**63 - 1, 10**30, 10**400, -10**400, 1e-300, 5e-324,
           1e308, -1e308, float("nan"), float("inf"), float("-inf")]
TEXTS = ["", " ", "\t", "\n", "\0", "a\0b", "é", "日本", "\u202e", "\ufeff", "\x1b[31m", "\U0001f600", "x" * LONG,
         "x" * LONG + ".py:f", "x" * LONG + ".pkl", "1", "1e-6", "1e-3x", ".nan", "null", "~", "true", "/", "..", ".",
         "../..", "~/x", "//", "a/b/c", "/none/rows.jsonl", ":", "a:b", "a.b:c", ".a:b", "a..b:c", "a\0.py:f",
         "~no-such-user/x.py:f", "a\0.pkl", "\0:f", "os:getcwd", "os:path", "frpo.errors:FrpoError", "x.py:f", ".py:f",
         "x.pkl", ".pkl", "{", "}", "[", "$seed", "$", "%s", "{}", "{name: x}", "a,b", "x=y", "*", "*.jsonl",
         "file://x", "train[:10%]", "train+", "all", "name", "frpo", "clip", "cost"]
PLAIN = [None, True, False, *NUMBERS, *TEXTS, [], [[]], [None], [0], [1, 2], ["a", "a"], [{}], {}, {"": 1},
         {"name": None}, {"name": "x"}, {"name": ["x"]}, {"name": {}}, {"a": {"b": {"c": 1}}}, {"x" * LONG: 1},
         nested(50), nested(150), {"a": [1]}, {"": [None]}, {"a": [1, "1"]}, {"learner.lr": [0.1, [1], {}]},
         {"a": [None, 1]}, {"a": []}, [["a", "b"]], [["frpo", "frpo"]], [{"prompt": "1+1=", "answer": "2"}],
         [{"prompt": None}, {"x": [1]}], {"a": "b", "b": "b"}]
"""Values of JSON's types."""
FOREIGN = [{1: 2}, {None: None}, {True: 1}, {1.5: 1}, {("a", "b"): 1}, {1: [2]}, {"a": [object]}, {"a": ["\ud800"]},
           {"a": [{1}]}, [{"prompt": object}], [{1: 2}], b"", b"\xff", (1, 2), (), {1}, set(), "\ud800", "\ud800.py:f",
           "a\udfffb", {"\ud800": 1}, datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1), 1j, object, object(),
           len, lambda: 0, nested(3000), 10**5000, {"k": 10**5000}]
"""Values that JSON or a recipe's file cannot hold, but Python can."""

plain_values = st.one_of(
    st.sampled_from(PLAIN), st.sampled_from(NUMBERS), st.text(max_size=8),
    st.integers(), st.floats(),
    st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.sampled_from(TEXTS)),
                 lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=3),
                 max_leaves=6))
any_values = st.one_of(plain_values, st.sampled_from(FOREIGN))


def assert_plain(message, limit=20_000):
    """A message that a person can read: text of a bounded length, without a traceback or another library's address."""
    assert message.strip(), "an empty message"
    message.encode("utf-8")  # a lone surrogate could not be printed
    strange = [char for char in message if not char.isprintable() and char not in "\n\t"]
    assert not strange, f"control characters {strange[:3]} in {message[:300]!r}"
    for sign in ("errors.pydantic.dev", "validation error", "Traceback"):
        assert sign not in message, f"{sign!r} in {message[:300]!r}"
    assert len(message) <= limit, f"a message of {len(message)} characters: {message[:300]!r}"


def fuzzed(cases):
    """Draw the same cases in every run, and shrink the first one that fails."""
    return settings(max_examples=cases, deadline=None, derandomize=True, database=None,
                    suppress_health_check=[*HealthCheck])
