"""Score how far completions follow constraints, which ask for a form of the answer.

Rules on the text decide all scores. No score depends on whether an answer is true, or good English.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from frpo.data.sets.constraints import CLOSING, INSTRUCTIONS, MOST_WORDS, OPENING
from frpo.rewards.verifiers import Completions, texts

PARTIAL = 0.3
"""Credit for a dictated phrase in another place, so that a model which never begins with the phrase can still learn."""
OWN_WORDS = 4
"""Least number of distinct words, besides a dictated phrase, of an answer. A shorter completion scores 0."""

WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
BULLET = re.compile(r"^[ \t]*[-*\u2022][ \t]+\S", re.MULTILINE)
QUOTES = '"\u201c\u201d'


def _no_commas(text: str) -> float:
    return 1 / (1 + text.count(","))


def _few_words(text: str) -> float:
    return min(1.0, MOST_WORDS / max(1, len(WORD.findall(text))))


def _two_bullets(text: str) -> float:
    return {2: 1.0, 1: 0.5, 3: 0.5}.get(len(BULLET.findall(text)), 0.0)


def _opening(text: str) -> float:
    if re.match(rf"{OPENING}\b", text):
        return 1.0
    return PARTIAL if OPENING.lower() in text.lower() else 0.0


def _closing(text: str) -> float:
    if text.endswith(CLOSING):
        return 1.0
    return PARTIAL if CLOSING.rstrip(".").lower() in text.lower() else 0.0


def _quoted(text: str) -> float:
    """Return 0.5 for each quotation mark in its place, and 1.0 only if no other marks are between the two."""
    ends = (text[:1] in QUOTES) + (len(text) > 1 and text[-1] in QUOTES) if text else 0
    return 0.5 if ends == 2 and any(mark in text[1:-1] for mark in QUOTES) else ends / 2


DEGREES: Mapping[str, Callable[[str], float]] = {
    "no_commas": _no_commas, "few_words": _few_words, "two_bullets": _two_bullets, "opening": _opening,
    "closing": _closing, "quoted": _quoted}
"""Name of a constraint -> function (text) -> how far it follows the instruction; 1.0 only if it follows fully."""
assert {*DEGREES} == {*INSTRUCTIONS}


def follows(completions: Completions, constraint: Sequence[str | None], graded: bool = True) -> list[float | None]:
    """Score, from 0.0 to 1.0, how far each completion follows the constraint named in its row's column `constraint`.

    graded: False gives 1.0 if the constraint is fully followed, else 0.0. A completion that is no answer (OWN_WORDS)
    scores 0.0. The score is None if the row has no constraint. Raises ValueError for a name that is not in DEGREES.
    """
    unknown = {name for name in constraint if name is not None} - {*DEGREES}
    if unknown:
        raise ValueError(f"constraint {min(unknown)!r} is not one of {', '.join(DEGREES)}")
    degrees = [None if name is None else DEGREES[name](text.strip()) * is_answer(text)
               for text, name in zip(texts(completions), constraint, strict=True)]
    return degrees if graded else [None if degree is None else float(degree == 1.0) for degree in degrees]


def names_topic(completions: Completions, topic: Sequence[str | None]) -> list[float | None]:
    """Score 1.0 if an answer contains the word of the column `topic`, singular or plural in s; else 0.0.

    The score is None if the row has no topic.
    """
    return [None if word is None else
            float(is_answer(text) and bool(re.search(rf"\b{re.escape(word.removesuffix('s'))}(?:s|es)?\b", text, re.I)))
            for text, word in zip(texts(completions), topic, strict=True)]


def is_answer(text: str) -> bool:
    """Check whether the text has at least OWN_WORDS distinct words besides dictated phrases."""
    own = re.sub(rf"{re.escape(CLOSING.rstrip('.'))}|\b{OPENING}\b", " ", text, flags=re.I)
    return len({word.lower() for word in WORD.findall(own)}) >= OWN_WORDS
