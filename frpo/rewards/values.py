"""Make the return value of a reward function portable in its worker, and check the value in the run.

No reward is summed here. The worker sends only numbers, None and descriptions of anything else. So the run never has to
import a user's class to find that a return value was wrong.
"""
from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from frpo.errors import RewardError
from frpo.types import LARGEST_REWARD


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """Description of a value that is not a number: its type and its `repr` (shortened)."""

    type_name: str
    text: str


PortableValue = float | None | Foreign


def portable(result: Any) -> list[PortableValue] | Foreign:
    """Turn a function's return value into plain numbers, in the worker.

    Sequences and 1-d arrays or tensors become lists; Python, numpy and 0-d tensor numbers and bools become floats.
    Everything else becomes `Foreign`.
    """
    if getattr(result, "ndim", None) == 1 and hasattr(result, "tolist"):
        result = result.tolist()
    if isinstance(result, (str, bytes)) or not isinstance(result, Sequence):
        return _foreign(result)
    return [_portable_value(value) for value in result]


def _portable_value(value: Any) -> PortableValue:
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if value is None:
        return None
    if isinstance(value, numbers.Real | Decimal):
        try:
            return float(value)
        except OverflowError:  # an integer beyond the range of a double
            return -math.inf if value < 0 else math.inf
    return _foreign(value)


def _foreign(value: Any) -> Foreign:
    try:
        text = repr(value)
    except Exception as error:  # a user's __repr__ may raise anything
        text = f"<repr raised {type(error).__name__}>"
    return Foreign(type_name=type(value).__name__, text=text if len(text) <= 80 else text[:77] + "...")


def check_values(result: list[PortableValue] | Foreign, uids: Sequence[str], first: int = 0) -> np.ndarray:
    """Check one call's portable values against the prompt uids of its N completions. Errors count from `first` on.

    Returns N float64; NaN if the function abstained, or returned a number that `unusable` finds.
    Raises RewardError if the return value is not a sequence, has another length than N, or holds anything but numbers
    and None.
    """
    if isinstance(result, Foreign):
        raise RewardError(
            f"returned {result.type_name} {result.text}; return a list of {len(uids)} numbers or None, "
            "one for each completion")
    if len(result) != len(uids):
        raise RewardError(
            f"returned {len(result)} values for {len(uids)} completions; return one number or None for each completion")
    for index, value in enumerate(result):
        if isinstance(value, Foreign):
            raise RewardError(
                f"value {first + index} (prompt {uids[index]!r}) is {value.type_name} {value.text}; "
                "return a number, or None to abstain")
    return np.array([value if _usable(value) else math.nan for value in result])


def unusable(result: list[PortableValue]) -> list[int]:
    """Find the indices of NaN, infinity and numbers beyond LARGEST_REWARD (not of None).

    result: values that `check_values` accepted.
    """
    return [index for index, value in enumerate(result) if value is not None and not _usable(value)]


def _usable(value: PortableValue) -> bool:
    return value is not None and not isinstance(value, Foreign) and abs(value) <= LARGEST_REWARD  # false for NaN
