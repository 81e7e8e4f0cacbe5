"""Sum metrics so that parts merge exactly: over micro-batches, ranks and updates."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

REDUCTIONS = ("mean", "max", "sum")


class MetricSums:
    """Metrics kept as (sum, count) until `result`, so that parts merge exactly.

    "mean" divides sum by count, "sum" keeps the total, "max" keeps the largest value (NaN is larger than any number).
    """

    def __init__(self) -> None:
        self.parts: dict[str, tuple[float, float, str]] = {}

    def add(self, name: str, total: float, count: float, reduction: str = "mean") -> None:
        """Add one part. Raises ValueError for an unknown reduction, or if `name` was added with another reduction."""
        old_total, old_count, old_reduction = self.parts.get(name, (None, 0.0, reduction))
        if reduction not in REDUCTIONS or reduction != old_reduction:
            raise ValueError(f"metric {name}: reduction {reduction!r}, was {old_reduction!r}; allowed {REDUCTIONS}")
        if old_total is None:
            merged = float(total)
        else:
            merged = _largest(old_total, float(total)) if reduction == "max" else old_total + float(total)
        self.parts[name] = (merged, old_count + float(count), reduction)

    def update(self, metrics: Mapping[str, tuple[Any, Any, str]] | MetricSums) -> None:
        """Add many parts: name -> (sum, count, reduction)."""
        items = metrics.parts if isinstance(metrics, MetricSums) else metrics
        for name, (total, count, reduction) in items.items():
            self.add(name, float(total), float(count), reduction)

    def result(self) -> dict[str, float]:
        """Return one number per metric. A mean with count 0 is left out."""
        return {name: total / count if reduction == "mean" else total
                for name, (total, count, reduction) in self.parts.items() if reduction != "mean" or count > 0}


def _largest(a: float, b: float) -> float:
    return a if a > b or math.isnan(a) else b
