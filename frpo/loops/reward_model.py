"""The loop of reward and cost models: score both answers of each pair, compute the loss, update, repeat.

Updates, checkpoints and evaluations are those of fine-tuning. The export is an ordinary sequence classifier, which this
module loads back and compares before the run ends. The loss is in `objectives.preference`.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from frpo.data.batcher import pack_pairs
from frpo.evaluation.preferences import by_kind, calibration, measure
from frpo.learner.model import load_tokenizer
from frpo.learner.score_export import plain_scores
from frpo.loops.sft import FineTuner
from frpo.report.calibration import draw_calibration
from frpo.rewards.scorer_facts import ScorerFacts, template_digest
from frpo.run import checks
from frpo.telemetry.progress import phase
from frpo.telemetry.sums import MetricSums
from frpo.types import Pair, RankBatches, RunState

COMPARED = 16
"""Number of pairs whose scores are compared between the learner and the export."""


class RewardModelTrainer(FineTuner):
    """Drive the training of a reward or cost model from its first or restored update to its last."""

    def packed(self, batch: list[tuple[int, Pair]]) -> RankBatches:
        return pack_pairs(batch, self.learner.layout)

    def learned(self, packed: RankBatches, state: RunState, watch: bool) -> MetricSums:
        return self.learner.preference_forward_backward(packed, watch_movement=watch)

    def counts(self, batch: list[tuple[int, Pair]]) -> dict[str, float]:
        return {"data/tokens": float(sum(len(pair.first) + len(pair.second) for _, pair in batch))}

    def heldout_metrics(self, state: RunState) -> dict[str, float]:
        with self.parts.timer.phase("evaluate"):
            return {f"eval/{name}": value for name, value in measure(self.scores(self.heldout), self.heldout).items()}

    def scores(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Return the scores (P, 2) of the current model."""
        found = self.learner.scores(self.packed(list(enumerate(pairs))))
        return np.array([found[0, place, place] for place in range(len(pairs))])

    def provide_reference(self) -> None:
        """Do nothing: a reward model has no reference."""

    def export(self, state: RunState) -> None:
        """Write the model and the facts about it, load it back and compare its scores. Draw the calibration.

        Raises ModelError if the scores differ by more than rounding.
        """
        super().export(state)
        recipe, folder = self.recipe, self.parts.run_dir / "export"
        tokenizer, heldout_P2 = load_tokenizer(str(folder)), self.scores(self.heldout) if self.heldout else None
        chat = recipe.data.format == "chat"
        ScorerFacts(
            kind="cost" if recipe.objective.compares == "harm" else "bradley_terry", format=recipe.data.format,
            template=template_digest(tokenizer.chat_template) if chat else "",
            system_prompt=recipe.data.system_prompt, max_length=recipe.model.max_length, dtype=recipe.model.dtype,
            heldout={} if heldout_P2 is None else measure(heldout_P2, self.heldout),
            data=self.parts.examples.digest).write(folder)
        if heldout_P2 is not None:
            draw_calibration(calibration(heldout_P2, self.heldout), by_kind(heldout_P2, self.heldout),
                             self.parts.run_dir / "calibration.png")
        if recipe.checks.same_function:
            with phase("comparing the export with the learner"):
                self.compare_export(str(folder), tokenizer.pad_token_id)

    def compare_export(self, folder: str, pad_id: int) -> None:
        pairs = (self.heldout or self.train)[:COMPARED]
        expected = self.scores(pairs).flatten()
        alone, padded = plain_scores(folder, [ids for pair in pairs for ids in (pair.first, pair.second)],
                                     self.recipe.model.dtype, pad_id)
        checks.check_export_scores(self.recipe, folder, expected, {"alone": alone, "in a padded batch": padded})
