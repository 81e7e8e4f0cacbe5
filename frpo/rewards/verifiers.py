r"""Compare a completion with its reference answer, or with a required form: ready reward functions.

Each function returns 1.0 or 0.0 a completion, and None (abstains) if the reference answer is missing. The reference is
the column `answer`. No function here judges reasoning, style or safety.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import product
from typing import Any

from frpo.rewards.protocol import Message

Completions = Sequence[str] | Sequence[list[Message]]

_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)])[-−+])?\$?(?P<top>{_UNSIGNED})(?:[eE](?P<exponent>[-+]?[0-9]{{1,3}})(?![\w.]*[0-9]))?"
    rf"(?:/(?P<bottom>{_UNSIGNED}))?")
_LONGEST_NUMBER = 300  # digits; a degenerate completion may hold thousands, which Python refuses to convert


def exact_answer(completions: Completions, answer: Sequence[Any], pattern: str | None = None) -> list[float | None]:
    """Score 1.0 if the stripped completion equals the stripped reference `str(answer)` character by character.

    pattern: compare group 1 of its *last* match instead of the whole completion (`.` matches newlines); no match
    scores 0.0. Raises ValueError if the pattern has no group.
    """
    wanted = re.compile(pattern, re.DOTALL) if pattern is not None else None
    if wanted is not None and not wanted.groups:
        raise ValueError(f"pattern {pattern!r} has no group; put parentheses around the answer")
    return [_equal_text(text, reference, wanted) for text, reference in zip(texts(completions), answer, strict=True)]


def numeric_answer(
    completions: Completions, answer: Sequence[Any], tolerance: float = 0.0,
) -> list[float | None]:
    """Score 1.0 if the completion's number equals the reference's by value, within the absolute `tolerance`.

    The completion's number is the first number after the last "####", or without "####" the last number of the text. A
    reference that is a text is read in the same way. "1,234", "$72", "-5", ".5", "1/2", "2e3" and a sentence's period
    are understood; a per cent sign and units are ignored. A completion without a number scores 0.0.
    Raises ValueError naming the reference that holds no number.
    """
    slack = _as_fraction(tolerance)
    scores: list[float | None] = []
    for text, reference in zip(texts(completions), answer, strict=True):
        if reference is None:
            scores.append(None)
            continue
        expected = _reference_number(reference)
        given = find_number(text)
        scores.append(float(given is not None and abs(given - expected) <= slack))
    return scores


def math_answer(completions: Completions, answer: Sequence[Any], limit_s: int = 5) -> list[float | None]:
    r"""Score 1.0 if math-verify finds an expression in the completion equal to the reference (LaTeX or plain).

    limit_s: whole seconds for each parsing and each comparison. A completion that exceeds this limit abstains (None),
    and the others are still scored. 0 leaves only the time-out of the whole call. A reference without LaTeX delimiters
    is read as if inside `$...$`. A completion that math-verify cannot parse or compare scores 0.0.
    Raises ValueError naming the reference that math-verify cannot parse, and off the main thread unless limit_s is 0.
    """
    parsed: dict[str, list[Any]] = {}  # the completions of a group share their reference
    scores: list[float | None] = []
    for text, reference in zip(texts(completions), answer, strict=True):
        if reference is None:
            scores.append(None)
            continue
        key = str(reference)
        if key not in parsed:
            parsed[key] = _parse_reference(key, limit_s)
        scores.append(_compare_expressions(parsed[key], text, limit_s))
    return scores


def boxed_format(completions: Completions) -> list[float | None]:
    r"""Score 1.0 if the completion has exactly one `\boxed{...}`, with balanced braces and not blank inside."""
    return [float(_has_one_box(text)) for text in texts(completions)]


def regex_format(completions: Completions, pattern: str) -> list[float | None]:
    """Score 1.0 if `pattern` is found in the completion (`.` matches newlines; use \\A and \\Z to match the whole)."""
    wanted = re.compile(pattern, re.DOTALL)
    return [float(wanted.search(text) is not None) for text in texts(completions)]


def texts(completions: Completions) -> Iterable[str]:
    """Return the text of each completion: the string itself, or the content of the last message of a chat."""
    return (completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions)


def find_number(text: str) -> Fraction | None:
    """Find the first number after the last "####", or without "####" the last number of the text.

    Returns None if there is no number.
    """
    _, marker, tail = text.rpartition("####")
    matches = list(_NUMBER.finditer(tail))
    if not matches:
        return None
    return _value(matches[0] if marker else matches[-1])


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > _LONGEST_NUMBER:
        return None
    top = Fraction(match["top"].replace(",", "")) * Fraction(10) ** int(match["exponent"] or 0)
    bottom = Fraction((match["bottom"] or "1").replace(",", ""))
    if bottom == 0:
        return None
    return (-top if match["sign"] in ("-", "−") else top) / bottom


def _equal_text(text: str, reference: Any, wanted: re.Pattern[str] | None) -> float | None:
    if reference is None:
        return None
    if wanted is not None:
        found = list(wanted.finditer(text))
        if not found or found[-1][1] is None:
            return 0.0
        text = found[-1][1]
    return float(text.strip() == str(reference).strip())


def _as_fraction(number: float) -> Fraction:
    # Through the decimal text: the reference 0.1 in a JSON file means 1/10, not the nearest double.
    return Fraction(str(number))


def _reference_number(reference: Any) -> Fraction:
    if isinstance(reference, str):
        found = find_number(reference)
        if found is None:
            raise ValueError(f"reference answer {reference!r} holds no number; give one")
        return found
    if isinstance(reference, bool) or not isinstance(reference, (int, float)):
        kind = type(reference).__name__
        raise ValueError(f"reference answer {reference!r} is {kind}; give a number, or a text that holds one")
    return _as_fraction(reference)


def _parse_reference(reference: str, limit_s: int) -> list[Any]:
    from math_verify import parse  # half a second of sympy, which the other verifiers do without

    # Undelimited, math-verify reads the plain number 2 from 2^{10} and 1 from 1+x.
    delimited = any(mark in reference for mark in ("$", r"\(", r"\[", r"\boxed"))
    parsed = parse(reference if delimited else f"${reference}$", parsing_timeout=limit_s)
    if parsed:
        return parsed
    raise ValueError(f"math-verify cannot parse the reference answer {reference!r}")


def _compare_expressions(reference: list[Any], text: str, limit_s: int) -> float | None:
    """Return 1.0, 0.0, or None after a time-out.

    Pairs are compared one by one: an error on one pair must not hide that another pair is equal.
    """
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    timed_out = False
    try:
        found = parse(text, parsing_timeout=limit_s, raise_on_error=True)
    except TimeoutException:
        return None
    except Exception:  # sympy and antlr raise anything on malformed text of a model
        return 0.0
    for expected, given in product(reference, found):
        try:
            if verify(expected, given, timeout_seconds=limit_s, raise_on_error=True):
                return 1.0
        except TimeoutException:
            timed_out = True
        except Exception:  # as above: not comparable
            continue
    return None if timed_out else 0.0


def _has_one_box(text: str) -> bool:
    start = text.find(r"\boxed{")
    if start < 0 or text.count(r"\boxed") != 1:
        return False
    inside = start + len(r"\boxed{")
    depth = 1
    for position in range(inside, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return bool(text[inside:position].strip())
    return False
