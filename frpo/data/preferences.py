"""Load the pairs of answers of a run: tell the layout of each row by its columns, render and tokenize both answers.

Layouts:
    prompt, chosen, rejected (and margin): texts or lists of messages
    chosen, rejected: whole conversations with a common beginning, as messages or as "Human:" and "Assistant:" turns
    prompt, response_0, response_1, better_response_id, is_response_0_safe, ..., safer_response_id: PKU-SafeRLHF
This module does not batch or order the pairs.
"""
from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from frpo.data.answers import AnswerTokens
from frpo.data.chat import Messages, check_tokenizer, checked_messages, with_system
from frpo.data.heldout import Source, Split, content_hash, set_aside
from frpo.data.source import Row, column, read_rows, select
from frpo.data.vocabulary import check_vocabulary
from frpo.errors import DataError
from frpo.loading import did_you_mean
from frpo.types import Pair

if TYPE_CHECKING:
    from frpo.config.preference import PreferenceDataSection
    from frpo.objectives.preference import Compares

PairSet = Split[Pair]
"""All pairs of a run."""

LAYOUTS = ("prompt, chosen, rejected", "prompt, response_0, response_1, better_response_id")
SAFETY = ("is_response_0_safe", "is_response_1_safe", "safer_response_id")
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]*")


def load_pairs(data: PreferenceDataSection, tokenizer: PreTrainedTokenizerBase, max_length: int, compares: Compares,
               seed: int, embeddings: int | None = None) -> PairSet:
    """Read, render, tokenize and split the pairs that `data` describes.

    compares: the order of the answers that the loss needs. max_length: most tokens of a prompt with an answer;
    `data.too_long` decides about longer pairs. embeddings: number of the model's embeddings; None: do not check.
    `set_aside` decides which pairs are held out.
    Raises DataError naming a row that is broken, contradictory, equal or too long. Raises ModelError for a tokenizer
    that does not fit.
    """
    check_tokenizer(tokenizer, needs_chat=data.format == "chat")
    answers = AnswerTokens(tokenizer, data.format)
    train = _read(data, data.path, data.limit, answers, max_length, compares, seed)
    evaluation = (_read(data, data.heldout_path, None, answers, max_length, compares, seed)
                  if data.heldout_path else None)
    if embeddings is not None:
        check_vocabulary(filter(None, (train, evaluation)), tokenizer, embeddings)
    return set_aside(train, evaluation, data)


def _read(data: PreferenceDataSection, path: str, limit: int | None, answers: AnswerTokens, max_length: int,
          compares: Compares, seed: int) -> Source[Pair]:
    rows = select(read_rows(path, split=data.split, limit=limit, seed=seed, subset=data.subset), data.where,
                  data.rename)
    pairs, skipped = [], Counter[str]()
    for row in rows:
        try:
            pairs.append(_pair(row, data, answers, max_length, compares, skipped))
        except _LeftOutError as reason:
            skipped[str(reason)] += 1
    return Source(items=tuple(pairs), origins=tuple(pair.origin for pair in pairs), skipped=skipped)


class _LeftOutError(Exception):
    """A row is left out as the recipe asks. The message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A row in one form. better, safer: index of an answer, None for neither. safe: None where it is unknown."""

    prompt: Messages
    answers: tuple[str, str]
    better: int | None
    safer: int | None = None
    safe: tuple[bool | None, bool | None] = (None, None)
    margin: float = 0.0


def _pair(row: Row, data: PreferenceDataSection, answers: AnswerTokens, max_length: int, compares: Compares,
          counts: Counter[str]) -> Pair:
    """Return the pair of a row. counts: receives whether its answers were cut."""
    judged = judged_row(row, compares)
    _check_prompt(row, judged.prompt, data)
    if compares == "harm":
        _check_consistent(row, judged, data)
    chosen = judged.better if compares == "better" else None if judged.safer is None else 1 - judged.safer
    if chosen is None and data.ties == "drop":
        raise _LeftOutError("neither answer is preferred (data.ties)")
    order = (0, 1) if chosen != 1 else (1, 0)
    prompt = with_system(row.origin, judged.prompt, data.system_prompt)
    try:
        both = [answers.of(prompt, judged.answers[index]) for index in order]
    except DataError as error:
        raise type(error)(f"{row.origin}: {error}") from error
    if both[0] == both[1]:
        _refuse_or_drop(data.equal, "both answers are equal (data.equal)",
                        f"{row.origin}: both answers are the same text (same tokens), so neither can be preferred; "
                        "remove the row, or set data.equal to drop")
    longest = max(map(len, both))
    if longest > max_length and data.too_long != "cut":
        _refuse_or_drop(data.too_long, "longer than model.max_length",
                        f"{row.origin}: prompt and answer have {longest} tokens, model.max_length allows {max_length}; "
                        "raise it, or set data.too_long to cut (removes the end) or drop")
    first, second = (tuple(ids[:max_length]) for ids in both)
    if first == second:
        _refuse_or_drop(data.equal, "differ only where model.max_length cuts (data.equal)",
                        f"{row.origin}: the answers differ only after token {max_length}, where model.max_length cuts "
                        "them; raise it, or set data.too_long or data.equal to drop")
    if longest > max_length:
        counts["cut to fit model.max_length"] += 1
    signs = [_sign(judged.safe[index]) if compares == "harm" else 0 for index in order]
    return Pair(uid=content_hash([list(prompt), sorted(judged.answers)])[:16], origin=row.origin, first=first,
                second=second, target=0.5 if chosen is None else 1.0, margin=judged.margin,
                signs=(signs[0], signs[1]))


def _refuse_or_drop(choice: str, reason: str, message: str) -> None:
    raise DataError(message) if choice == "refuse" else _LeftOutError(reason)


def _sign(safe: bool | None) -> int:
    return 0 if safe is None else -1 if safe else 1


def _check_prompt(row: Row, prompt: Messages, data: PreferenceDataSection) -> None:
    if prompt[-1]["role"] not in ("user", "tool"):
        raise DataError(f"{row.origin}: the last message before an answer must be the user's or a tool's, given "
                        f"{prompt[-1]['role']!r}")
    if not any(message["content"].strip() for message in prompt):
        raise DataError(f"{row.origin}: the prompt has no text; remove the row")
    if data.format == "text" and ("prompt" not in row.columns or len(prompt) > 1):
        raise DataError(f"{row.origin}: data.format: text needs a column 'prompt' with one text, given a conversation "
                        f"of {len(prompt) + 1} messages; set data.format to chat, or write each prompt as one text")


def _check_consistent(row: Row, judged: Judged, data: PreferenceDataSection) -> None:
    safer = judged.safer
    if safer is None or judged.safe[safer] is not False or judged.safe[1 - safer] is not True:
        return
    _refuse_or_drop(data.contradictory, "contradictory flags (data.contradictory)",
                    f"{row.origin}: safer_response_id = {safer}, but response {safer} is flagged unsafe and response "
                    f"{1 - safer} safe; correct the row, or set data.contradictory to drop")


def judged_row(row: Row, compares: Compares) -> Judged:
    """Tell the layout of a row by its columns and return its content in one form.

    Raises DataError naming the row for columns of no layout or of two, for broken values, and if `compares` needs
    flags of safety that the row lacks.
    """
    names = row.columns.keys()
    numbered, named = ({*each} & names for each in (("response_0", "response_1"), ("chosen", "rejected")))
    if numbered and named:
        raise DataError(f"{row.origin}: the columns {', '.join(sorted(numbered | named))} belong to two layouts; keep "
                        "chosen and rejected, or response_0 and response_1 (data.rename gives a column another name)")
    if len(numbered) == 2:
        return _numbered_answers(row, compares)
    if compares == "harm":
        raise DataError(f"{row.origin}: objective cost needs response_0, response_1, {', '.join(SAFETY)}; the row has "
                        f"{', '.join(names)}; use bradley_terry for pairs without flags of safety")
    if len(named) == 2:
        return _chosen_rejected(row)
    wanted = {"chosen", "rejected"} - named if named else {"response_0", "response_1"} - numbered if numbered else {
        "chosen"}
    missing = min(wanted)
    raise DataError(f"{row.origin}: no column {missing!r}{_close(row, missing)}; preference rows have {LAYOUTS[0]}, or "
                    f"{LAYOUTS[1]}; the row has {', '.join(names) or 'none'} (data.rename gives a column another name)")


def _close(row: Row, missing: str) -> str:
    """Return a question about a column that may be `missing` under another name."""
    known = {*", ".join(LAYOUTS).split(", "), *SAFETY}
    return did_you_mean(missing, [name for name in row.columns if name not in known])


def _numbered_answers(row: Row, compares: Compares) -> Judged:
    needed = ("better_response_id",) if compares == "better" else SAFETY
    for name in needed:
        if name not in row.columns:
            why = "" if compares == "better" else f"; objective cost needs {', '.join(SAFETY)}"
            raise DataError(f"{row.origin}: no column {name!r}{_close(row, name)}; preference rows have "
                            f"{LAYOUTS[0]}, or {LAYOUTS[1]}{why}")
    safe = tuple(_flag(row, f"is_response_{index}_safe") for index in (0, 1))
    return Judged(prompt=_prompt(row), answers=(_answer(row, "response_0"), _answer(row, "response_1")),
                  better=_index(row, "better_response_id"), safer=_index(row, "safer_response_id"), margin=_margin(row),
                  safe=(safe[0], safe[1]))


def _chosen_rejected(row: Row) -> Judged:
    margin = _margin(row)
    chosen, rejected = (row.columns[name] for name in ("chosen", "rejected"))
    whole = "prompt" not in row.columns or all(_opens_with_prompt(each) for each in (chosen, rejected))
    if not whole:
        return Judged(prompt=_prompt(row), answers=(_answer(row, "chosen"), _answer(row, "rejected")), better=0,
                      margin=margin)
    better, worse = _conversation(row, "chosen"), _conversation(row, "rejected")
    if better[:-1] != worse[:-1]:
        place = next((number for number, (a, b) in enumerate(zip(better[:-1], worse[:-1])) if a != b),
                     min(len(better), len(worse)) - 1)
        raise DataError(f"{row.origin}: chosen and rejected differ before their last message, at message {place}; they "
                        "must be the same up to the assistant's last message")
    return Judged(prompt=better[:-1], answers=(better[-1]["content"], worse[-1]["content"]), better=0,
                  margin=margin)


def _margin(row: Row) -> float:
    if row.columns.get("margin") is None:
        return 0.0
    margin = column(row, "margin", float, int)
    if isinstance(margin, bool) or margin < 0:
        raise DataError(f"{row.origin}: margin must be a number of at least 0, or null; given {margin!r}")
    if margin > sys.float_info.max:
        raise DataError(f"{row.origin}: margin is beyond the largest number that a float holds; give a smaller one")
    return float(margin)


def _opens_with_prompt(value: Any) -> bool:
    """Return whether a list of messages holds the prompt too: it begins with another message than the assistant's."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and (
        value[0].get("role") != "assistant")


def _conversation(row: Row, name: str) -> Messages:
    """Return the messages of a whole conversation, which ends with the assistant."""
    value = column(row, name, list, str)
    messages = _turns(row, name, value) if isinstance(value, str) else _messages(row, name, value)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(f"{row.origin}: {name} must be a prompt and an answer of the assistant, given the roles "
                        f"{[message['role'] for message in messages]}; without a column 'prompt' it must hold both")
    return messages


def _turns(row: Row, name: str, text: str) -> Messages:
    """Split a text into its "Human:" and "Assistant:" turns, as in hh-rlhf. Two turns of one role are joined."""
    parts = TURN.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise DataError(f"{row.origin}: {name} is a text without \"Human:\" and \"Assistant:\" turns; give a column "
                        f"'prompt', or a list of messages, given {text!r:.60}")
    messages: list[dict[str, str]] = []
    for speaker, said in zip(parts[1::2], parts[2::2]):
        role = {"Human": "user", "Assistant": "assistant"}[speaker]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{said.strip()}"
        else:
            messages.append({"role": role, "content": said.strip()})
    return tuple(messages)


def _prompt(row: Row) -> Messages:
    value = column(row, "prompt", str, list)
    return ({"role": "user", "content": value},) if isinstance(value, str) else _messages(row, "prompt", value)


def _answer(row: Row, name: str) -> str:
    """Return an answer: a text, or a list with one message of the assistant."""
    value = column(row, name, str, list)
    if isinstance(value, str):
        return value
    messages = _messages(row, name, value) if value else ()
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise DataError(f"{row.origin}: {name} must be a text or one message of the assistant, given the roles "
                        f"{[message['role'] for message in messages]}")
    return messages[0]["content"]


def _messages(row: Row, name: str, value: list[Any]) -> Messages:
    return checked_messages(f"{row.origin}: column {name!r}", value)


def _index(row: Row, name: str) -> int | None:
    """Return the number of an answer, None for neither."""
    value = row.columns.get(name)
    if value is None or value == -1:
        return None
    if isinstance(value, bool) or value not in (0, 1):
        raise DataError(f"{row.origin}: {name} must be 0 or 1, or null for neither; given {value!r:.40}")
    return int(value)


def _flag(row: Row, name: str) -> bool | None:
    value = row.columns.get(name)
    if value is None or isinstance(value, bool):
        return value
    if value not in (0, 1):
        raise DataError(f"{row.origin}: {name} must be true or false, given {value!r:.40}")
    return bool(value)
