"""Turn GSM8K rows into small verifiable problems: the annotation `<<48/2=24>>` asks `48/2=` and expects `24`.

The expression stays as written, except for spaces and thousands commas. The value gets one spelling per number, so
that "9.00", "9." and "9" are one answer. Expressions are not computed: a wrong annotation stays wrong.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from frpo.data.sets.arithmetic import ALPHABET
from frpo.data.source import Row, column

MAX_EXPRESSION_CHARS = 32
"""Longer expressions are skipped; the longest of GSM8K has 30 characters."""

_ANNOTATION = re.compile(r"<<([^<>]*)>>")
_NUMBER = re.compile(r"(?P<sign>-?)(?=\.?\d)(?P<whole>\d*)(?:\.(?P<fraction>\d*))?", re.ASCII)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_OPERATION = re.compile(r"[\d.)]%?[-+*/]")  # a leading minus alone is no operation


def calculator_rows(rows: Iterable[Row], *, max_chars: int = MAX_EXPRESSION_CHARS) -> tuple[list[Row], dict[str, int]]:
    """Return the problems of all annotations in column `answer`, and the number of skipped ones by reason.

    Each row of the result has the columns prompt and answer, and the origin of its source row. A prompt that occurred
    before is skipped, so the first of several spellings of its value is kept.
    Raises DataError for a row without a text column `answer`.
    """
    problems: list[Row] = []
    skipped: Counter[str] = Counter()
    seen: set[str] = set()
    for row in rows:
        text = column(row, "answer", str)
        annotations = _ANNOTATION.findall(text)
        skipped["annotation not closed"] += text.count("<<") - len(annotations)
        for annotation in annotations:
            problem = parse_annotation(annotation, max_chars)
            if isinstance(problem, str):
                skipped[problem] += 1
            elif problem[0] in seen:
                skipped["duplicate"] += 1
            else:
                seen.add(problem[0])
                problems.append(Row(origin=row.origin, columns={"prompt": problem[0], "answer": problem[1]}))
    return problems, dict(+skipped)


def parse_annotation(annotation: str, max_chars: int = MAX_EXPRESSION_CHARS) -> tuple[str, str] | str:
    """Return (prompt, answer) of the text between << and >>, or the reason why the text is no problem."""
    expression, equals, value = _THOUSANDS.sub("", annotation.replace(" ", "")).rpartition("=")
    if not equals:
        return "no '='"
    if "=" in expression:
        return "more than one '='"
    if set(expression) - set(ALPHABET):
        return "character outside the alphabet"
    if len(expression) > max_chars:
        return f"expression over {max_chars} characters"
    if not _OPERATION.search(expression):
        return "nothing to compute"  # <<12=12>>: a copy, not a problem
    answer = normalise_number(value)
    return "value is not a decimal number" if answer is None else (f"{expression}=", answer)


def normalise_number(text: str) -> str | None:
    """Return the one spelling of a decimal number: ".50" -> "0.5", "9.00" -> "9", "007" -> "7", "-0" -> "0".

    Returns None for a text that is no decimal number.
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    whole = match["whole"].lstrip("0") or "0"
    fraction = (match["fraction"] or "").rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return number if number == "0" else match["sign"] + number
