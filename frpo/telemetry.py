"""Metrics, timers and files of lines: all arithmetic on metrics lives here.

Keys are `area/name`. It measures and writes, and decides nothing.
"""
from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from frpo.errors import CheckpointError
from frpo.progress import activity

REDUCTIONS = ("mean", "max", "sum")


class MetricSums:
    """Metrics as (sum, count) until the last moment, so that parts merge exactly.

    "mean" divides them, "sum" keeps the total, "max" the largest value (NaN is larger than any number).
    """

    def __init__(self):
        self.parts: dict[str, tuple[float, float, str]] = {}

    def add(self, name: str, total: float, count: float, reduction: str = "mean") -> None:
        """Fold one part in. Raises ValueError if `name` was added with another reduction."""
        old_total, old_count, old_reduction = self.parts.get(name, (None, 0.0, reduction))
        if reduction not in REDUCTIONS or reduction != old_reduction:
            raise ValueError(f"metric {name}: reduction {reduction!r}, was {old_reduction!r}; allowed {REDUCTIONS}")
        if old_total is None:
            merged = float(total)
        else:
            merged = _largest(old_total, float(total)) if reduction == "max" else old_total + float(total)
        self.parts[name] = (merged, old_count + float(count), reduction)

    def update(self, metrics: Mapping[str, tuple[Any, Any, str]] | MetricSums) -> None:
        """Fold in many parts: name -> (sum, count, reduction)."""
        items = metrics.parts if isinstance(metrics, MetricSums) else metrics
        for name, (total, count, reduction) in items.items():
            self.add(name, float(total), float(count), reduction)

    def result(self) -> dict[str, float]:
        """One number a metric; a mean over nothing is left out."""
        return {name: total / count if reduction == "mean" else total
                for name, (total, count, reduction) in self.parts.items() if reduction != "mean" or count > 0}


class PhaseTimer:
    """Seconds a phase takes, summed over a step, and the name of the phase that runs now (None between phases)."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.current: str | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer, self.current, started = self.current, name, time.perf_counter()
        try:
            with activity(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self.current = outer

    def collect(self) -> dict[str, float]:
        """`time/<phase>` in seconds since the last collect."""
        seconds, self.seconds = self.seconds, {}
        return {f"time/{name}": value for name, value in seconds.items()}


class JsonlFile:
    """An append-only file of one JSON object a line, flushed line by line; its size is what a checkpoint remembers.

    JSON has no NaN and no infinity: they are written as null.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        try:
            line = json.dumps(row, allow_nan=False)
        except ValueError:
            line = json.dumps(_finite(row), allow_nan=False)
        self.file.write(line + "\n")
        self.file.flush()

    def offset(self) -> int:
        """Bytes written so far."""
        self.file.flush()
        return self.path.stat().st_size

    def truncate(self, offset: int) -> None:
        """Forget what lies beyond `offset` bytes. Raises CheckpointError if the file is shorter than that."""
        size = self.path.stat().st_size
        if size < offset:
            raise CheckpointError(
                f"{self.path} has {size} bytes, the checkpoint remembers {offset}: the file was changed, or the run "
                "went back behind this checkpoint; resume from an earlier one (run.resume=PATH) or choose another "
                "run.dir")
        self.file.truncate(offset)

    def close(self) -> None:
        self.file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JsonlFile. A last line that is not whole, such as after a kill -9, is left out."""
    *whole, last = path.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in whole]
    with suppress(json.JSONDecodeError):
        rows.append(json.loads(last))
    return rows


T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 %, for 1 degree of freedom and more."""


def t_quantile(degrees: int) -> float:
    """Student's t at 97.5 %; beyond the table by its expansion in 1 / degrees, right to three decimals."""
    if degrees <= len(T_QUANTILES):
        return T_QUANTILES[degrees - 1]
    z = 1.959964
    return (z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3))


def mean_interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval by Student's t, NaN where one value gives none; NaN are left out."""
    kept = [value for value in values if not math.isnan(value)]
    if not kept:
        return math.nan, math.nan
    mean = sum(kept) / len(kept)
    if len(kept) == 1:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in kept) / (len(kept) - 1)
    return mean, t_quantile(len(kept) - 1) * math.sqrt(variance / len(kept))


def _largest(a: float, b: float) -> float:
    return a if a > b or math.isnan(a) else b


def _finite(value: Any) -> Any:
    """The same value with null for every float that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
