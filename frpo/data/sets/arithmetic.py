"""Generate arithmetic that resembles GSM8K's calculator annotations: `48/2=` -> `24`.

Problems have exact integers only and one operation each. This module does not tokenize and does not evaluate given
expressions.
"""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from frpo.errors import DataError

ALPHABET = "0123456789+-*/=.()% "
"""Every character of a generated problem and of a GSM8K calculator expression."""

MAX_FACTOR = 12
"""Largest second operand of * and /: a small model cannot generalise beyond the multiplication table."""


def problems(count: int | None, seed: int, *, max_operand: int = 50, operations: str = "+-*/") -> list[tuple[str, str]]:
    """Return `count` distinct (question, answer) pairs in seeded order, such as ("48/2=", "24").

    count: None means all pairs.
    max_operand: the difficulty; operands lie in 1..max_operand, the second operand of * and / in 2..MAX_FACTOR.
    operations: the signs to draw from, equally often until a sign is used up (there are far fewer divisions).
    Raises DataError if fewer than `count` distinct problems exist, or for a sign that is not one of + - * /.
    """
    unknown = set(operations) - set("+-*/")
    if unknown or not operations:
        raise DataError(f"operations must be some of + - * /, given {operations!r}")
    random = np.random.Generator(np.random.PCG64(seed))
    pools = [list(_all_problems(sign, max_operand)) for sign in sorted(set(operations))]
    total = sum(map(len, pools))
    if count is None:
        count = total
    if count > total:
        raise DataError(f"{count} distinct problems are requested, but operands up to {max_operand} with "
                        f"{operations!r} give only {total}; lower data.limit or raise the largest operand")
    shuffled = [[pool[i] for i in random.permutation(len(pool))] for pool in pools]
    drawn: list[tuple[str, str]] = []
    while len(drawn) < count:
        shuffled = [pool for pool in shuffled if pool]
        drawn.append(shuffled[random.integers(len(shuffled))].pop())
    return drawn


def comparisons(count: int, seed: int, *, max_operand: int = 99) -> list[tuple[str, str]]:
    """Return `count` (question, answer) pairs on the larger of two numbers: ("(34 17)=", "34"). Pairs may repeat."""
    pairs = np.random.Generator(np.random.PCG64(seed)).integers(1, max_operand + 1, size=(count, 2)).tolist()
    return [(f"({a} {b})=", str(max(a, b))) for a, b in pairs]


def _all_problems(sign: str, max_operand: int) -> Iterator[tuple[str, str]]:
    """Yield every problem of one operation, in a fixed order. Differences are positive, divisions exact."""
    operands = range(1, max_operand + 1)
    factors = range(2, min(max_operand, MAX_FACTOR) + 1)
    for a in operands:
        for b in operands if sign in "+-" else factors:
            if sign == "+":
                yield f"{a}+{b}=", str(a + b)
            elif sign == "-" and a > b:
                yield f"{a}-{b}=", str(a - b)
            elif sign == "*":
                yield f"{a}*{b}=", str(a * b)
            elif sign == "/" and a % b == 0:
                yield f"{a}/{b}=", str(a // b)
