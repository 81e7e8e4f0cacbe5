"""Draw how far the confidence of a reward model can be trusted, and how its scores are spread."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from frpo.report.curve import plt


def draw_calibration(bins: Sequence[tuple[float, float, int]], scores: Mapping[str, np.ndarray], picture: Path) -> Path:
    """Draw the share of rightly ordered pairs against the confidence in their order, and histograms of scores.

    bins: confidence, share ordered rightly, and number of pairs. scores: name of a kind of answers -> their scores.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot([0.5, 1], [0.5, 1], color="grey", linewidth=1, linestyle="dotted", label="perfect calibration")
    if bins:
        confidence, right_share, counts = map(np.array, zip(*bins))
        left.errorbar(confidence, right_share, yerr=_wilson(right_share, counts), marker="o", markersize=4, capsize=3,
                      label="held-out pairs")
    left.set(xlabel="confidence in the order, sigmoid of the difference", ylabel="share of pairs ordered rightly")
    left.legend(frameon=False, fontsize=8)
    edges = np.histogram_bin_edges(np.concatenate([*scores.values()]), bins=30).tolist()
    for name, values in scores.items():
        right.hist(values, bins=edges, alpha=0.55, label=name)
    right.set(xlabel="score", ylabel="held-out answers")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    return picture


def _wilson(share_B: np.ndarray, count_B: np.ndarray) -> np.ndarray:
    """Return the distances (2, B) from shares to the ends of their 95 % intervals by Wilson, which stay in [0, 1]."""
    z2 = 1.96**2
    middle_B = (share_B + z2 / (2 * count_B)) / (1 + z2 / count_B)
    half_B = np.sqrt(z2 * (share_B * (1 - share_B) / count_B + z2 / (4 * count_B**2))) / (1 + z2 / count_B)
    return np.stack([share_B - middle_B + half_B, middle_B + half_B - share_B]).clip(0)
