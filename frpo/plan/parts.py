"""Define the parts of memory: named sizes in bytes, each with its arithmetic as text."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Part:
    """A named part of memory. size: bytes. how: the arithmetic, in words and numbers."""

    name: str
    size: float
    how: str


def total(parts: Iterable[Part]) -> float:
    return sum(part.size for part in parts)


def in_gb(size: float) -> str:
    """Format bytes as GB: with one decimal, or with two digits below 1 GB."""
    value = size / GB
    return f"{value:,.1f}" if value >= 1 or value == 0 else f"{value:.2g}"


def counted(number: float) -> str:
    """Format a number of parameters, such as 7.616e9 or 161.5e6."""
    if number < 1e6:
        return f"{number:,.0f}"
    return f"{number / 1e9:.4g}e9" if number >= 1e9 else f"{number / 1e6:.4g}e6"


def joined(parts: Iterable[Part]) -> str:
    """Format the sum, such as "13.5 weights + 27.0 gradients", with the largest part first."""
    largest_first = sorted(parts, key=lambda part: -part.size)
    return " + ".join(f"{in_gb(part.size)} {part.name}" for part in largest_first if part.size)
