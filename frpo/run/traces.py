"""Write scored groups as JSON rows and read them back: for traces, and for the batches that a checkpoint keeps.

Numbers come back bit for bit. Values that JSON cannot hold, such as a date in a column, come back as text.
"""
from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frpo.data.plain import plain_columns
from frpo.data.text_files import json_object, text_lines
from frpo.errors import ConfigError, DataError
from frpo.types import AdvantagedGroup, Completion, Prompt, RolloutGroup, ScoredGroup, VersionSpan

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""Pattern of a surrogate in JSON. Two surrogates in a row are one character beyond 16 bits; a lone one is invalid."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """One group in the traces: its line number (from 1), and whether a step learned from the group."""

    line: int
    trained: bool
    scored: ScoredGroup

    @property
    def step(self) -> int:
        return self.scored.group.group_id[0]


def trace_rows(groups: Sequence[AdvantagedGroup], *, trained: bool = True) -> Iterator[dict[str, Any]]:
    """Yield one JSON object per group: its whole prompt and completions, reward components, advantages, statistics.

    trained: whether the step learned from these groups. Dynamic sampling replaces some groups.
    """
    for group in groups:
        row = scored_row(group.scored) | {"trained": trained, "stats": dict(group.stats)}
        for completion, advantage in zip(row["completions"], group.advantages_G, strict=True):
            completion["advantage"] = float(advantage)
        yield row


def scored_row(scored: ScoredGroup) -> dict[str, Any]:
    """Return the trace row of a group without advantages: prompt, completions, rewards and their components."""
    rollout = scored.group
    return {
        "group_id": list(rollout.group_id), "prompt_uid": rollout.prompt.uid,
        "messages": [dict(message) for message in rollout.prompt.messages],
        "prompt_token_ids": list(rollout.prompt.token_ids), "columns": plain(rollout.prompt.columns),
        "completions": [
            {"text": completion.text, "token_ids": completion.token_ids.tolist(),
             "logprobs": completion.logprobs.tolist(),
             "loss_mask": completion.loss_mask.astype(int).tolist(),
             "version_spans": [[span.policy_version, span.start, span.end] for span in completion.version_spans],
             "seed": completion.seed, "finish_reason": completion.finish_reason,
             "reward": _number(scored.rewards_G[i]),
             "terms": {name: _number(values[i]) for name, values in scored.terms.items()}}
            for i, completion in enumerate(rollout.completions)]}


def read_groups(path: Path) -> Iterator[Traced]:
    """Yield the groups in the order of the file.

    Raises DataError if there is no file, or if a line is no trace; the message names the line.
    """
    if not path.is_file():
        raise DataError(f"no traces at {str(path)!r}; give the traces.jsonl of a run with telemetry.traces: true")
    for number, line in text_lines(path):
        row = json_object(line, f"{path}:{number}")
        if SURROGATE.search(line):  # most lines have none, and thousands of numbers to walk through
            row = plain_columns(row, f"{path}:{number}")
        try:
            yield Traced(line=number, scored=scored_group(row), trained=row.get("trained", False))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            lacking = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{path}:{number}: not a trace of a rollout group ({lacking}); give the traces.jsonl of "
                            "a run, or the output of `frpo rollout` or `frpo evaluate`") from None


def new_file(path: Path) -> Path:
    """Return the path if a new file can be made there. Raises ConfigError, with an alternative, if not."""
    if path.exists():
        raise ConfigError(f"{path} exists already and is not overwritten; move it away, or give --output PATH")
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ConfigError(f"{path} cannot be written: {folder} is not a folder that you may write to; give "
                          "--output PATH")
    return path


def scored_group(row: Mapping[str, Any]) -> ScoredGroup:
    """Read the group from a row that `scored_row` made. Raises KeyError for a key that the row lacks."""
    prompt = Prompt(uid=row["prompt_uid"], messages=tuple(row["messages"]), columns={**row["columns"]},
                    token_ids=tuple(row["prompt_token_ids"]))
    completions = row["completions"]
    names = completions[0]["terms"] if completions else ()
    return ScoredGroup(
        group=RolloutGroup(group_id=tuple(row["group_id"]), prompt=prompt,
                           completions=tuple(map(_completion, completions))),
        rewards_G=_values(completion["reward"] for completion in completions),
        terms={name: _values(completion["terms"][name] for completion in completions) for name in names})


def _completion(row: Mapping[str, Any]) -> Completion:
    return Completion(
        text=row["text"], token_ids=row["token_ids"], logprobs=_values(row["logprobs"]),
        loss_mask=row["loss_mask"], seed=row["seed"], finish_reason=row["finish_reason"],
        version_spans=tuple(VersionSpan(policy_version=version, start=start, end=end)
                            for version, start, end in row["version_spans"]))


def _values(numbers: Iterable[float | None]) -> np.ndarray:
    """Make an array of numbers from JSON, where null stands for NaN."""
    return np.array([math.nan if number is None else number for number in numbers], dtype=np.float64)


def plain(columns: Any) -> Any:
    """Convert columns of a data set to JSON values. Other values, such as dates, become text."""
    return json.loads(json.dumps(dict(columns), default=str))


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
