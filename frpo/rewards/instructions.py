r"""Check instructions on the form of an answer by exact rules, as the public data set IFEval does.

A row of IFEval serves as it is: the columns `instruction_id_list` and `kwargs`, whose fields may be null. The column
`kwargs` is an argument of `follows_all` and no setting of the recipe (`rewards[].kwargs`), so it needs no other name.

The rules give IFEval's results, with two exceptions: keywords are plain texts here and no regular expressions, and the
language is not checked, also not by change_case:english_*. Not here are instructions that need a model of language or
sentences: language:response_language, length_constraints:number_sentences, change_case:capital_word_frequency.
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from frpo.loading import did_you_mean, parameters_of
from frpo.rewards.verifiers import Completions, texts

Ids = Sequence[str]
Values = Mapping[str, Any]

RELATIONS = ("at least", "less than")
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
"""Answers of which detectable_format:constrained_response wants one."""


def follows_all(completions: Completions, instruction_id_list: Sequence[Ids | None],
                kwargs: Sequence[Sequence[Values | None] | None], strict: bool = True, graded: bool = False,
                unknown: Literal["refuse", "abstain"] = "refuse") -> list[float | None]:
    """Score 1.0 if the completion follows every instruction of its row, else 0.0. A row without instructions abstains.

    kwargs: for each instruction its values by name, such as {num_words: 100, relation: at least}.
    strict: False also accepts a completion without its first line, last line, both, or any asterisk. Each instruction
    takes the form that suits it (IFEval's loose accuracy). graded: score the share of instructions that are followed.
    unknown: `abstain` gives None to rows with an instruction that is not in CHECKS.
    Raises ValueError for such an instruction under `refuse`, for a value that is missing or wrong, and for an unknown
    setting.
    """
    if unknown not in ("refuse", "abstain"):
        raise ValueError(f"unknown must be refuse or abstain, given {unknown!r}")
    scores: list[float | None] = []
    for text, ids, values in zip(texts(completions), instruction_id_list, kwargs, strict=True):
        if not ids or (unknown == "abstain" and not {*ids} <= CHECKS.keys()):
            scores.append(None)
            continue
        forms = [form for form in ([text] if strict else _loose_forms(text)) if form.strip()]
        held = [any(check(form, **known) for form in forms) for check, known in _checks(ids, values)]
        scores.append(sum(held) / len(held) if graded else float(all(held)))
    return scores


def _checks(ids: Ids, values: Sequence[Values | None] | None) -> list[tuple[Callable[..., bool], dict[str, Any]]]:
    """Return the check of each instruction, with the values that it needs. Raises ValueError for an unusable row."""
    values = [None] * len(ids) if values is None else values
    if isinstance(ids, str) or isinstance(values, str | Mapping) or len(ids) != len(values):
        raise ValueError(f"instruction_id_list and kwargs must be two lists of the same length, given {ids!r} and "
                         f"{values!r}")
    found = []
    for name, given in zip(ids, values):
        if name not in CHECKS:
            raise ValueError(f"instruction {name!r} is not known{did_you_mean(name, CHECKS)}; known are "
                             f"{', '.join(CHECKS)}; set unknown: abstain to leave such rows out")
        needed = [key for key in parameters_of(CHECKS[name]).named if key != "text"]
        found.append((CHECKS[name], {key: _value(name, key, (given or {}).get(key)) for key in needed}))
    return found


def _value(instruction: str, key: str, value: Any) -> Any:
    """Return the value of an instruction's key, texts without white space around. Raises ValueError for another kind.

    A whole number may be a float, since tables with nulls hold floats.
    """
    if key.startswith(("num_", "nth_")) or key.endswith("frequency"):
        wanted = "a whole number, not negative"
        right = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value == value // 1
        value = int(value) if right else value
    elif key.endswith("relation"):
        wanted, right = " or ".join(RELATIONS), value in RELATIONS
    elif key in ("keywords", "forbidden_words"):
        wanted = "a list of texts, not empty"
        right = isinstance(value, list | tuple) and bool(value) and all(isinstance(one, str) and one for one in value)
    else:
        wanted = "one character" if key == "letter" else "a text, not blank"
        value = value.strip() if isinstance(value, str) else value
        right = isinstance(value, str) and bool(value) and (key != "letter" or len(value) == 1)
    if not right:
        raise ValueError(f"instruction {instruction!r} needs {key} in its kwargs: {wanted}; given {value!r}")
    return value


def _loose_forms(text: str) -> list[str]:
    lines = text.split("\n")
    forms = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*forms, *(form.replace("*", "") for form in forms)]


def _compare(count: int, relation: str, threshold: int) -> bool:
    return count >= threshold if relation == "at least" else count < threshold


def _occurrences(word: str, text: str, whole: bool = False) -> int:
    return len(re.findall(rf"\b{re.escape(word)}\b" if whole else re.escape(word), text, re.IGNORECASE))


def _existence(text: str, keywords: Sequence[str]) -> bool:
    return all(_occurrences(word, text) for word in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(_occurrences(keyword, text), relation, frequency)


def _forbidden(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(_occurrences(word, text, whole=True) for word in forbidden_words)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def _words(text: str, num_words: int, relation: str) -> bool:
    return _compare(len(re.findall(r"\w+", text)), relation, num_words)


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs lie between dividers ***. A blank one counts as none at either end, and is wrong in the middle."""
    first, *others = [bool(part.strip()) for part in text.split("***")]
    return all(others[:-1]) and sum([first, *others]) == num_paragraphs


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs lie between two line ends; blank ones are not counted. A word ends at punctuation."""
    parts = [part.split() for part in text.split("\n\n")]
    count = sum(map(bool, parts))
    if count != num_paragraphs or not 1 <= nth_paragraph <= count or not parts[nth_paragraph - 1]:
        return False
    start = parts[nth_paragraph - 1][0].lstrip("'").lstrip('"')
    return re.split(r"""[.,?!'"]""", start)[0].lower() == first_word.lower()


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    pattern = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}.get(postscript_marker)
    return re.search(pattern or re.escape(postscript_marker), text, re.IGNORECASE) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    """A bullet is a line that begins with - or with a single *."""
    return sum(len(re.findall(rf"^\s*{mark}.*", text, re.MULTILINE)) for mark in (r"\*[^*]", "-")) == num_bullets


def _options(text: str) -> bool:
    return any(option in text for option in OPTIONS)


def _highlights(text: str, num_highlights: int) -> bool:
    """A highlight is *text* or **text** in one line, and not blank."""
    marked = re.findall(r"\*([^\n*]*)\*", text) + re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(inside.strip()) for inside in marked) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections


def _json(text: str) -> bool:
    """Python's JSON, which has NaN and takes a key twice. `structured.json_answer` is stricter."""
    try:
        json.loads(re.sub(r"\A```(?:json|Json|JSON)?|```\Z", "", text.strip()).strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def _repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.lower())


def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.lower())


def _quotation(text: str) -> bool:
    return re.fullmatch(r'".*"', text.strip(), re.DOTALL) is not None


def _no_comma(text: str) -> bool:
    return "," not in text


CHECKS: Mapping[str, Callable[..., bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "length_constraints:number_words": _words,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _options,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "punctuation:no_comma": _no_comma,
}
"""Instruction of IFEval -> its check of a text. The check's other arguments are the names in the column `kwargs`."""
