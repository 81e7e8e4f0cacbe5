"""Compute means and their 95 % intervals by Student's t."""
from __future__ import annotations

import math
from collections.abc import Iterable

T_TABLE = {
    0.975: (1.959964, (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)),
    0.95: (1.644854, (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)),
}
"""Per level: the normal quantile, and Student's t for 1 to 10 degrees of freedom."""


def t_quantile(degrees: int, level: float = 0.975) -> float:
    """Return Student's t at 97.5 or 95 %. Beyond the table, use its expansion in 1 / degrees, right to three decimals.
    """
    z, table = T_TABLE[level]
    if degrees <= len(table):
        return table[degrees - 1]
    return (z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3))


def upper_bound(values: Iterable[float]) -> float:
    """Return the upper end of the one-sided 95 % interval of the mean, by Student's t. NaN values are left out.

    NaN for fewer than two values.
    """
    mean, half_width = mean_interval(kept := [value for value in values if not math.isnan(value)])
    if len(kept) < 2:
        return math.nan
    return mean + half_width * t_quantile(len(kept) - 1, 0.95) / t_quantile(len(kept) - 1)


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
