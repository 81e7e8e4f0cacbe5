"""Score how many words a completion shares with its reference text: ROUGE-1, the utility of summaries.

The reference is the column `answer`; the score is None (abstains) if it is missing. Words and stems are rouge-score's.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from frpo.rewards.verifiers import Completions, texts


def rouge1(completions: Completions, answer: Sequence[Any], measure: Literal["f1", "recall", "precision"] = "f1",
           stem: bool = True) -> list[float | None]:
    """Compute ROUGE-1 in [0, 1]: shared unigrams over those of the reference (recall) or completion (precision).

    measure: f1 combines both. stem: compare word stems (Porter). Raises ValueError for an unknown measure.
    """
    from rouge_score.rouge_scorer import RougeScorer  # a second to import

    if measure not in ("f1", "recall", "precision"):
        raise ValueError(f"measure must be f1, recall or precision, given {measure!r}")
    scorer, field = RougeScorer(["rouge1"], use_stemmer=stem), {"f1": "fmeasure"}.get(measure, measure)
    return [None if reference is None else float(getattr(scorer.score(str(reference), text)["rouge1"], field))
            for text, reference in zip(texts(completions), answer, strict=True)]
