"""Instruction constraints: sentences that ask for a form of the answer, and how far a completion follows them.

Everything is read from the text by rules. Nothing here judges whether an answer is true, or good English.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from frpo.rewards.verifiers import Completions, texts

MOST_WORDS = 12
OPENING, CLOSING = "Certainly", "That is all."
PARTIAL = 0.3
"""Credit for a dictated phrase in another place: a model that never begins with it has something to climb from."""
OWN_WORDS = 4
"""Distinct words, besides a dictated phrase, below which a completion is no answer and earns nothing."""

WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
BULLET = re.compile(r"^[ \t]*[-*\u2022][ \t]+\S", re.MULTILINE)
QUOTES = '"\u201c\u201d'


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """instruction: the sentence of a prompt. degree: text -> how far it is followed, 1.0 if, and only if, it is."""

    instruction: str
    degree: Callable[[str], float]


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
    """Half for each mark in its place; all of it only if no others stand between them."""
    ends = (text[:1] in QUOTES) + (len(text) > 1 and text[-1] in QUOTES) if text else 0
    return 0.5 if ends == 2 and any(mark in text[1:-1] for mark in QUOTES) else ends / 2


CONSTRAINTS: Mapping[str, Constraint] = {
    "no_commas": Constraint(instruction="Use no commas.", degree=_no_commas),
    "few_words": Constraint(instruction=f"Use at most {MOST_WORDS} words.", degree=_few_words),
    "two_bullets": Constraint(instruction="Write exactly two bullet points.", degree=_two_bullets),
    "opening": Constraint(instruction=f"Begin with the word {OPENING}.", degree=_opening),
    "closing": Constraint(instruction=f'End with "{CLOSING}"', degree=_closing),
    "quoted": Constraint(instruction="Write it as a quotation in quotation marks.", degree=_quoted),
}


def follows(completions: Completions, constraint: Sequence[str | None], graded: bool = True) -> list[float | None]:
    """How far each completion follows the constraint that its prompt names in the column `constraint`, 0.0 to 1.0.

    graded: false gives 1.0 where it is followed and 0.0 elsewhere. What is no answer (OWN_WORDS) has 0.0. None where
    the row has no constraint. Raises ValueError for a name that is not in CONSTRAINTS.
    """
    unknown = {name for name in constraint if name is not None} - {*CONSTRAINTS}
    if unknown:
        raise ValueError(f"constraint {min(unknown)!r} is not one of {', '.join(CONSTRAINTS)}")
    degrees = [None if name is None else CONSTRAINTS[name].degree(text.strip()) * is_answer(text)
               for text, name in zip(texts(completions), constraint, strict=True)]
    return degrees if graded else [None if degree is None else float(degree == 1.0) for degree in degrees]


def names_topic(completions: Completions, topic: Sequence[str | None]) -> list[float | None]:
    """1.0 where an answer contains the word of the column `topic`, singular or plural in s; 0.0 elsewhere."""
    return [None if word is None else
            float(is_answer(text) and bool(re.search(rf"\b{re.escape(word.removesuffix('s'))}(?:s|es)?\b", text, re.I)))
            for text, word in zip(texts(completions), topic, strict=True)]


def is_answer(text: str) -> bool:
    """Whether there is enough text of the model's own."""
    own = re.sub(rf"{re.escape(CLOSING.rstrip('.'))}|\b{OPENING}\b", " ", text, flags=re.I)
    return len({word.lower() for word in WORD.findall(own)}) >= OWN_WORDS
