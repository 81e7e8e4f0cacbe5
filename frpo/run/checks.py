"""Fail-fast checks of a run.

The learner computes the same function as plain transformers. Engines and learner compute the same function. Gradients
are finite. The first update moves every trainable tensor.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from frpo.cluster.engine_pool import EnginePool
from frpo.cluster.learner_group import LearnerGroup
from frpo.cluster.recovery import RecoveringEngines
from frpo.config.loader import AnyRecipe
from frpo.config.preference import RewardModelRecipe
from frpo.config.sections import Recipe
from frpo.data.heldout import Split
from frpo.errors import InvariantError, ModelError
from frpo.objectives.constraint import UNJUDGED, UNJUDGED_STEPS, Constraint
from frpo.types import Comparison, Gap, RankBatches, RolloutGroup

DEFAULT_GAP = {"fp32": 1e-3, "bf16": 1e-1}
"""Largest mean |log-prob difference| in nats that rounding explains. Wrong weights give tenths of a nat and more.

bf16: DeepSpeed and vLLM on GPUs differ by 0.032 (root of the mean square) with an fp32 head in the engine, as here.
With a bf16 head they differ by 0.041. Source: Fast-LLM, pull request 525, Qwen2.5-0.5B. The difference is larger at
high entropy.
"""
PROBED_GROUPS = 4
CHECKED_PUSHES = 2
"""Number of weight pushes to check. The first push may carry the weights that the engine has loaded anyway. Only the
second push shows that all weights are replaced."""


SAME_FUNCTION: Mapping[str, Gap] = {"fp32": (2e-4, 1e-2), "bf16": (1e-1, 2.0)}
"""Largest |log-prob difference| in nats that rounding explains between two ways to compute the same function: mean and
largest over all tokens. bf16: SmolLM2-135M on a CPU differs by 0.050 and 0.58."""
EXPORT_GAP = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest difference of scores that rounding explains, where the largest score is 1 or less."""
PROBED_SEQUENCES, PROBED_TOKENS = 3, 512


def check_same_function(learner: LearnerGroup, recipe: AnyRecipe, items: Split[Any]) -> None:
    """Compare policy and reference on every rank with plain transformers, on a few sequences of different lengths.

    Raises ModelError if they differ by more than rounding. The message names the likely cause and the key to change.
    """
    if not recipe.checks.same_function:
        return
    sequences = probe_sequences([item.token_ids for item in items.heldout or items.train], recipe.model.max_length)
    mean, largest = SAME_FUNCTION[recipe.model.dtype]
    for rank, found in enumerate(learner.compare(sequences)):
        for each in found:
            problem = _difference(each, lambda gap: not (gap[0] <= mean and gap[1] <= largest))
            if problem:
                raise ModelError(
                    f"the {each.model} on learner rank {rank} {problem} Compared on {len(sequences)} sequences with "
                    f"plain transformers: mean and largest difference of {each.values} {each.together[0]:.3g} "
                    f"and {each.together[1]:.3g} {'sd' if each.values == 'scores' else 'nats'}, allowed {mean:g} and "
                    f"{largest:g}. Set "
                    "checks.same_function=false to skip this check")


def check_judged(constraint: Constraint, record: Mapping[str, float]) -> None:
    """Raise InvariantError if no watched completion had a cost for UNJUDGED_STEPS steps in a row."""
    if record.get(UNJUDGED, 0.0) >= UNJUDGED_STEPS:
        raise InvariantError(f"reward {constraint.cost!r} gave no cost to any watched completion for {UNJUDGED_STEPS} "
                             "steps, so objective.constraint is not held; mend the reward function, or set "
                             "objective.constraint to null")


def check_export_scores(recipe: RewardModelRecipe, folder: str, expected: np.ndarray, found: Mapping[str, np.ndarray]
                        ) -> None:
    """Raise ModelError if an exported reward model scores answers otherwise than the learner, beyond rounding.

    expected: scores of the learner. found: way of computing -> scores of plain transformers.
    """
    limit = EXPORT_GAP[recipe.model.dtype] * max(1.0, float(np.abs(expected).max()))
    for way, scores in found.items():
        gap = float(np.nan_to_num(np.abs(scores - expected), nan=np.inf).max())
        if not gap <= limit:
            raise ModelError(f"the export {folder!r}, loaded back by transformers, scores an answer {way} otherwise "
                             f"than the learner: largest difference {gap:.3g} of {len(expected)} answers, allowed "
                             f"{limit:.3g}. Check the padding token and config.json of the model; set "
                             "checks.same_function=false to skip this check")


def probe_sequences(items: Sequence[Sequence[int]], longest: int) -> list[list[int]]:
    """Return token ids of the shortest, a middle and the longest of `items`, and of several items joined.

    Each sequence has at least two tokens. No sequence is longer than `longest` or PROBED_TOKENS.
    """
    limit = min(longest, PROBED_TOKENS)
    ordered = sorted((list(item[:limit]) for item in items if len(item) > 1), key=len)
    places = {round(place) for place in np.linspace(0, len(ordered) - 1, PROBED_SEQUENCES)} if ordered else ()
    chosen = [ordered[place] for place in sorted(places)]
    joined = [token for item in (chosen or items) for token in item] * limit
    return [*chosen, joined[:limit]]


def _difference(found: Comparison, differs: Callable[[Gap], bool]) -> str | None:
    """Describe the difference and the change that is needed; None if there is no difference."""
    separate = ("Set learner.packing to false." if found.packed else
                "Sequences of a padded micro-batch change each other; frpo cannot train it in batches.")
    if found.fails_alone:
        return f"cannot compute one sequence ({found.failure}); frpo cannot train it. Check its config.json."
    if found.failure is not None:
        return f"cannot compute several sequences at once ({found.failure}). {separate}"
    if differs(found.repeated):
        return (f"gives different {found.values} in two equal passes: it draws random numbers although it is not in "
                "training mode (dropout, router jitter); frpo cannot train it.")
    if differs(found.before):
        return (f"is no causal language model: its {found.values} of a token change with later tokens. Check its "
                "config.json (is_decoder, use_bidirectional_attention and the like).")
    if differs(found.alone):
        return ("computes another function in the learner than in plain transformers, even for a single sequence. "
                "Likely causes are its attention (try model.attn_implementation: eager) or its logits.")
    if found.packed and found.layers_apart < found.layers:
        return (f"mixes the sequences of a pack: only {found.layers_apart} of its {found.layers} layers have "
                f"attention that keeps them apart. {separate}")
    if differs(found.together):
        return f"gives a sequence other {found.values} in a micro-batch than alone. {separate}"
    return None


def check_logprob_gap(recipe: Recipe, learner: LearnerGroup, engines: EnginePool | RecoveringEngines,
                      groups: Sequence[RolloutGroup], version: int) -> float:
    """Compute the mean |log-prob difference| between each engine and the learner on sampled completions, in nats.

    Returns the largest mean of all engines. Both sides score the given tokens at temperature 1 without truncation, so
    that sampling settings have no effect. Tokens that the policy did not choose do not count: the learner gives them no
    log-probability. Raises InvariantError if the mean of an engine exceeds checks.max_logprob_gap. Without that key the
    limit is the default of the coarser of two precisions: of `recipe`, used for sampling, and of the learner's recipe.
    """
    probe = groups[:PROBED_GROUPS]
    learned = learner.score_groups(probe, "policy", temperature=1.0)
    expected = np.concatenate([logprobs for group in learned for logprobs in group])
    chosen = np.concatenate([completion.loss_mask for group in probe for completion in group.completions])
    if not chosen.any():
        return 0.0
    sequences = [((*group.prompt.token_ids, *completion.token_ids.tolist()), len(group.prompt.token_ids))
                 for group in probe for completion in group.completions]
    limit = recipe.checks.max_logprob_gap or max(
        DEFAULT_GAP[each.model.dtype] for each in (recipe, learner.recipe))
    worst = 0.0
    for index, scores in enumerate(engines.score(sequences, version)):
        gap = float(np.abs(np.concatenate(scores) - expected)[chosen].mean())
        worst = max(worst, gap)
        if not gap <= limit:
            raise InvariantError(
                f"rollout engine {index} and learner disagree: mean |log-prob difference| {gap:.3g} nats on "
                f"{len(sequences)} completions of version {version}, allowed {limit:g} (checks.max_logprob_gap); the "
                "engine does not serve the learner's weights, or the two compute different functions (precision, "
                "attention)")
    return worst


class MovementWatch:
    """Decide when a run checks that every trainable tensor moves: once, in the first update that must move them all.

    That is the first update with a signal. With LoRA it is the second, because B starts at zero, and A has no gradient
    while B is zero.
    """

    def __init__(self, recipe: AnyRecipe):
        self.signals_left = 0 if not recipe.checks.parameters_move else 1 if recipe.model.lora is None else 2

    def due(self, update: RankBatches) -> bool:
        """Return whether to watch `update`, the next update."""
        if self.signals_left == 0 or not has_signal(update):
            return False
        self.signals_left -= 1
        return self.signals_left == 0


def has_signal(update: RankBatches) -> bool:
    """Return whether any sample of an update has a gradient: a weight and, in RL, an advantage that are not zero."""
    return any(getattr(sample, "advantage", 1.0) != 0 and getattr(sample, sample.WEIGHTS[0]).any()
               for rank in update for micro_batch in rank for sample in micro_batch)


def check_gradient(norm: float, version: int) -> None:
    """Raise InvariantError if the gradient of the update to `version` has no finite norm.

    After clipping, such a gradient would change no weight, or turn every weight into NaN.
    """
    if not np.isfinite(norm):
        raise InvariantError(f"the gradient of update {version} has the norm {norm}: a loss is not a number, or an "
                             "advantage is too large for float32; scale the rewards down, or lower the learning rate "
                             "and resume from the last checkpoint")


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
                             f"{'; '.join(problems)}. Freeze them on purpose (LoRA: leave them out of "
                             "model.lora.targets), fix the model, or set checks.parameters_move=false to skip this "
                             "check")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
