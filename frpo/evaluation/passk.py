"""pass@k: the chance that at least one of k completions of a prompt passes, from n >= k of them.

It counts; what passes is the caller's decision, and so is the average over prompts.
"""
from __future__ import annotations

import math


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k), unbiased (Chen et al. 2021, arXiv:2107.03374, eq. 1): n completions, c of which pass.

    It is the share of all k-subsets with a completion that passes, from whole numbers, so that nothing cancels.
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, given n = {n}, c = {c}, k = {k}")
    subsets = math.comb(n, k)
    return (subsets - math.comb(n - c, k)) / subsets
