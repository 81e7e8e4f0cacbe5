"""Compute means and their 95 % intervals by Student's t."""
from __future__ import annotations

import math
from collections.abc import Iterable

T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 %, for 1 to 10 degrees of freedom."""


def t_quantile(degrees: int) -> float:
    """Return Student's t at 97.5 %. Beyond the table, use its expansion in 1 / degrees, right to three decimals."""
    if degrees <= len(T_QUANTILES):
        return T_QUANTILES[degrees - 1]
    z = 1.959964
    return (z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3))


def mean_interval(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean and the half-width of its 95 % interval by Student's t. NaN values are left out.

    The half-width of a single value is NaN. Without values both are NaN.
    """
    kept = [value for value in values if not math.isnan(value)]
    if not kept:
        return math.nan, math.nan
    mean = sum(kept) / len(kept)
    if len(kept) == 1:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in kept) / (len(kept) - 1)
    return mean, t_quantile(len(kept) - 1) * math.sqrt(variance / len(kept))
