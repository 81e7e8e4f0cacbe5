"""Fail-fast checks of a run: engine and learner are the same function, gradients are finite, and the first step moves
every tensor."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from frpo.builder import Parts
from frpo.config.loader import AnyRecipe
from frpo.errors import InvariantError
from frpo.types import RankBatches, RolloutGroup

DEFAULT_GAP = {"fp32": 1e-3, "bf16": 5e-2}
"""Mean |log-prob difference| in nats that rounding explains; wrong weights give tenths and more."""
PROBED_GROUPS = 4


def check_logprob_gap(parts: Parts, groups: Sequence[RolloutGroup], version: int) -> float:
    """Mean |log-prob difference| between every engine and the learner on sampled completions, in nats.

    Both score the given tokens at temperature 1 without truncation, so that sampling settings do not show.
    Raises InvariantError where it exceeds checks.max_logprob_gap (or the default of the precision).
    """
    probe = groups[:PROBED_GROUPS]
    scored = parts.learner.score_groups(probe, "policy", temperature=1.0)
    learner = np.concatenate([logprobs for group in scored for logprobs in group])
    sequences = [((*group.prompt.token_ids, *completion.token_ids.tolist()), len(group.prompt.token_ids))
                 for group in probe for completion in group.completions]
    limit = parts.recipe.checks.max_logprob_gap or DEFAULT_GAP[parts.recipe.model.dtype]
    worst = 0.0
    for index, scores in enumerate(parts.pool.score(sequences, version)):
        gap = float(np.abs(np.concatenate(scores) - learner).mean())
        worst = max(worst, gap)
        if not gap <= limit:
            raise InvariantError(
                f"rollout engine {index} and learner disagree: mean |log-prob difference| {gap:.3g} nats on "
                f"{len(sequences)} completions of version {version}, allowed {limit:g} (checks.max_logprob_gap); the "
                "engine does not serve the learner's weights, or the two compute different functions (precision, "
                "attention)")
    return worst


class MovementWatch:
    """When a run checks that every trainable tensor moves: once, in the first update that must move them all.

    That is the first update with a signal; with LoRA the second, since B starts at zero and while it is zero A has no
    gradient.
    """

    def __init__(self, recipe: AnyRecipe):
        self.signals_left = 0 if not recipe.checks.parameters_move else 1 if recipe.model.lora is None else 2

    def due(self, update: RankBatches) -> bool:
        """Whether `update`, which comes next, is the one to watch."""
        if self.signals_left == 0 or not has_signal(update):
            return False
        self.signals_left -= 1
        return self.signals_left == 0


def has_signal(update: RankBatches) -> bool:
    """Whether any sample of an update has a weight (and an advantage, if rewards decide), hence a gradient."""
    return any(getattr(sample, "advantage", 1.0) != 0 and getattr(sample, sample.WEIGHTS[0]).any()
               for rank in update for micro_batch in rank for sample in micro_batch)


def check_gradient(norm: float, version: int) -> None:
    """Raise InvariantError if the gradient of the update to `version` has no finite norm.

    Clipped, it would move nothing, or turn every weight into NaN.
    """
    if not np.isfinite(norm):
        raise InvariantError(f"the gradient of update {version} has the norm {norm}: a loss is not a number, or an "
                             "advantage too large for float32; scale the rewards down, or lower the learning rate and "
                             "go on from the last checkpoint")


def check_movement(report: Mapping[str, tuple[bool, bool]]) -> None:
    """Raise InvariantError naming the trainable tensors that got no gradient, or whose fp32 master did not move."""
    without = [name for name, (has_gradient, _) in report.items() if not has_gradient]
    still = [name for name, (has_gradient, moved) in report.items() if has_gradient and not moved]
    problems = []
    if without:
        problems.append(f"{len(without)} got no gradient: {_some(without)}")
    if still:
        problems.append(f"{len(still)} got a gradient but did not move: {_some(still)}")
    if problems:
        raise InvariantError(f"after a step with a signal, of {len(report)} trainable tensors "
                             f"{'; '.join(problems)}. Freeze them on purpose or fix the model; "
                             "checks.parameters_move=false goes on regardless")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
