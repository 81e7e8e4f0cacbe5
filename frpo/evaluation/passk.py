"""pass@k: the probability that at least one of k completions of a prompt passes, estimated from n >= k completions.

The caller decides which completions pass, and averages over prompts.
"""
from __future__ import annotations

import math


def pass_at_k(n: int, c: int, k: int) -> float:
    """Compute 1 - C(n - c, k) / C(n, k) for n completions of which c pass.

    The estimate is unbiased (Chen et al. 2021, arXiv:2107.03374, eq. 1). It is the share of all k-subsets that contain
    a completion that passes, computed from whole numbers, so that no digits cancel.
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, given n = {n}, c = {c}, k = {k}")
    subsets = math.comb(n, k)
    return (subsets - math.comb(n - c, k)) / subsets
