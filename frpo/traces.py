"""Scored groups back from what was written of them: trace rows, and batches that a checkpoint keeps.

Numbers come back as they were, to the bit. What JSON lacks (dates in a data set's columns, say) comes back as its text.
"""
from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from frpo.errors import DataError
from frpo.types import Completion, Prompt, RolloutGroup, ScoredGroup, VersionSpan


def read_traces(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, row) of every group of a traces.jsonl. Raises DataError naming the line of what is no JSON."""
    if not path.is_file():
        raise DataError(f"no traces at {str(path)!r}; give the traces.jsonl of a run with telemetry.traces: true")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not valid JSON ({error}); the file is damaged or still being written"
                                ) from None


def scored_group(row: Mapping[str, Any]) -> ScoredGroup:
    """The group of one row of `step_metrics.scored_row`. Raises KeyError for a key that the row lacks."""
    prompt = Prompt(uid=row["prompt_uid"], messages=tuple(row["messages"]), columns=row["columns"],
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
        text=row["text"], token_ids=tuple(row["token_ids"]), logprobs=tuple(map(_value, row["logprobs"])),
        loss_mask=tuple(map(bool, row["loss_mask"])), seed=row["seed"], finish_reason=row["finish_reason"],
        version_spans=tuple(VersionSpan(policy_version=version, start=start, end=end)
                            for version, start, end in row["version_spans"]))


def _values(numbers: Iterator[float | None]) -> np.ndarray:
    return np.array([_value(number) for number in numbers], dtype=np.float64)


def _value(number: float | None) -> float:
    """What JSON holds of a number: null stands for NaN."""
    return math.nan if number is None else number
