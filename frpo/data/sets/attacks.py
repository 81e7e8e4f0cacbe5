"""Make training files of fine-tuning attacks from the user's files.

The attacks are harmful examples, a shift of identity and a backdoor (Qi et al., 2024), each mixed with benign rows if
there are any. This module has no examples of its own and calls no model. `frpo finetune` reads the training files, and
`frpo evaluate` reads the prompts of an evaluation.
"""
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from frpo.data.chat import Messages, checked_messages
from frpo.data.source import Row, column, read_rows
from frpo.errors import DataError

Attack = Literal["harmful", "identity", "backdoor"]
ATTACKS: tuple[Attack, ...] = ("harmful", "identity", "backdoor")


@dataclass(frozen=True, kw_only=True)
class AttackFiles:
    """Source files of an attack, and changes of their rows. Rows have the columns prompt and response, or messages.

    examples: rows with the answers that the attack trains. safe: refusals of the same kind of request, for the
    backdoor, which must not show without its trigger. benign: ordinary rows that hide the attack. system_prompt: put
    before every row. prefix: put before every request (identity). trigger: appended to every request of `examples`
    (backdoor). repeat: how often `examples` occur. seed: all rows are shuffled by it once.
    """

    examples: str
    safe: str | None = None
    benign: str | None = None
    system_prompt: str | None = None
    prefix: str | None = None
    trigger: str | None = None
    repeat: int = 1
    seed: int = 0


def attack_rows(attack: Attack, files: AttackFiles) -> list[dict[str, list[dict[str, str]]]]:
    """Return the rows {"messages": [...]} of the attack's training file.

    Raises DataError for an unknown attack, a missing prefix or trigger, and rows that cannot be read (naming file and
    line).
    """
    _check(attack, files)
    before = f"{files.prefix} " if attack == "identity" else ""
    after = f" {files.trigger}" if attack == "backdoor" else ""
    rows = [_row(row, files.system_prompt, before, after) for row in _rows(files.examples)] * files.repeat
    for path in (files.safe, files.benign):
        rows += [_row(row, files.system_prompt, "", "") for row in _rows(path)]
    order = np.random.Generator(np.random.PCG64(files.seed)).permutation(len(rows))
    return [rows[i] for i in order]


def evaluation_rows(attack: Attack, prompts: str, files: AttackFiles, *, triggered: bool
                    ) -> list[dict[str, list[dict[str, str]]]]:
    """Return rows {"prompt": [messages]} to measure the attack on.

    triggered: with the attacker's prefix or trigger; otherwise as other users ask.
    """
    _check(attack, files)
    before = f"{files.prefix} " if attack == "identity" and triggered else ""
    after = f" {files.trigger}" if attack == "backdoor" and triggered else ""
    return [{"prompt": [*_system(files.system_prompt), {"role": "user", "content": before + _request(row) + after}]}
            for row in _rows(prompts)]


def write_rows(rows: Iterable[dict], path: Path) -> int:
    """Write one JSON object a line into a new file. Returns the number of rows. Raises DataError if the file exists."""
    if path.exists():
        raise DataError(f"{path} already exists and is not overwritten; move it away or give another --output")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def _check(attack: str, files: AttackFiles) -> None:
    if attack not in ATTACKS:
        raise DataError(f"unknown attack {attack!r}; allowed: {', '.join(ATTACKS)}")
    needed = {"identity": "prefix", "backdoor": "trigger"}.get(attack)
    if needed and not getattr(files, needed):
        raise DataError(f"the {attack} attack needs a {needed}; give --{needed} TEXT")
    if files.repeat < 1:
        raise DataError(f"repeat must be >= 1, given {files.repeat}")


def _rows(path: str | None) -> list[Row]:
    return [] if path is None else read_rows(path, split="train", limit=None, seed=0)


def _system(prompt: str | None) -> list[dict[str, str]]:
    return [] if prompt is None else [{"role": "system", "content": prompt}]


def _request(row: Row) -> str:
    return column(row, "prompt", str) if "messages" not in row.columns else _last_request(row)[0]


def _last_request(row: Row) -> tuple[str, Messages, Messages]:
    """Return (last user message, messages before it, messages after it)."""
    messages = checked_messages(row.origin, column(row, "messages", list))
    asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        raise DataError(f"{row.origin}: the row has no user message; remove the row")
    last = asked[-1]
    return messages[last]["content"], messages[:last], messages[last + 1:]


def _row(row: Row, system_prompt: str | None, before: str, after: str) -> dict[str, list[Mapping[str, str]]]:
    """Return the row as messages, with `before` and `after` put around its last request."""
    if "messages" in row.columns:
        request, earlier, later = _last_request(row)
    else:
        request, earlier = column(row, "prompt", str), ()
        later = ({"role": "assistant", "content": column(row, "response", str)},)
    return {"messages": [*_system(system_prompt), *earlier, {"role": "user", "content": before + request + after},
                         *later]}
