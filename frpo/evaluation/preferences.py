"""Measure a reward model on held-out pairs: order, margin, calibration, and the sign of a cost.

Shape suffix: P pairs. Column 0 of the scores holds the answer that should score higher.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from frpo.telemetry.intervals import mean_interval
from frpo.types import Pair

BINS = 10
"""Number of bins of the calibration error, of equal width over a confidence of 0.5 to 1."""


Bin = tuple[float, float, int]
"""Pairs whose order is predicted with a similar confidence: mean confidence, share ordered rightly, number of pairs."""


def measure(scores_P2: np.ndarray, pairs: Sequence[Pair]) -> dict[str, float]:
    """Return the metrics of P pairs. A metric without a pair to measure is left out.

    Over the pairs with a preference: accuracy, the share whose better answer scores strictly higher, and the half-width
    of its 95 % interval; tied, the share with two equal scores; margin, the mean difference; order_nll, the mean
    -log sigmoid(difference); calibration_error, the mean |confidence - share right| over BINS, weighted by their pairs.
    sign_accuracy: share of answers with a known flag that are on the right side of 0. score_mean, score_sd: of all
    scores.
    """
    decided_P = np.array([pair.target != 0.5 for pair in pairs])
    sign_P2 = np.array([pair.signs for pair in pairs])
    difference = (scores_P2[:, 0] - scores_P2[:, 1])[decided_P]
    found = {"score_mean": float(scores_P2.mean()), "score_sd": float(scores_P2.std())}
    if difference.size:
        accuracy, interval = mean_interval((difference > 0).astype(float).tolist())
        found |= {"accuracy": accuracy, "interval": interval, "tied": float((difference == 0).mean()),
                  "margin": float(difference.mean()), "order_nll": float(np.logaddexp(0, -difference).mean()),
                  "calibration_error": sum(abs(confidence - right) * count for confidence, right, count
                                           in calibration(scores_P2, pairs)) / difference.size}
    if sign_P2.any():
        found["sign_accuracy"] = float((sign_P2 * scores_P2 > 0)[sign_P2 != 0].mean())
    return found


def calibration(scores_P2: np.ndarray, pairs: Sequence[Pair]) -> list[Bin]:
    """Return the bins that hold a pair, by rising confidence. The confidence in an order is sigmoid(|difference|)."""
    decided_P = np.array([pair.target != 0.5 for pair in pairs])
    difference = (scores_P2[:, 0] - scores_P2[:, 1])[decided_P]
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    place = np.minimum((2 * BINS * (confidence - 0.5)).astype(int), BINS - 1)
    return [(float(confidence[place == number].mean()), float((difference > 0)[place == number].mean()),
             int((place == number).sum())) for number in np.unique(place)]


def by_kind(scores_P2: np.ndarray, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    """Return the scores of harmful and of harmless answers, or of preferred and other answers if no flag is known."""
    sign_P2 = np.array([pair.signs for pair in pairs])
    if sign_P2.any():
        return {"harmful answers": scores_P2[sign_P2 == 1], "harmless answers": scores_P2[sign_P2 == -1]}
    return {"preferred answers": scores_P2[:, 0], "other answers": scores_P2[:, 1]}
