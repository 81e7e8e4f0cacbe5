"""Masters, moments and parameters in CPU memory are only elsewhere: the same steps, the same checkpoints.

Here all memory is the CPU's, so this holds the code path and its numbers to account, not the transfers.
"""
from __future__ import annotations

import numpy as np
import pytest

from learner_state import assert_same, distances, on_all, recipe_for, state_of, train
from loop import flat, hand_made_groups, random_model

UPDATES = 4
KL_COEF = 0.3


def offloaded(actor):
    """Inside a rank: (the optimizer is the CPU's, parameters are, AdamW is torch's fused one)."""
    engine = actor.learner.engine
    return (engine.zero_cpu_offload(), bool(engine.zero_offload_param()),
            type(engine.optimizer.optimizer).__name__, engine.optimizer.param_groups[0]["fused"])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_steps_are_the_same(learner_of, tmp_path, stage):
    path = random_model(tmp_path / "model", "qwen2", tied=True)
    groups = [group.scored.group for group in hand_made_groups()]

    learner = learner_of(recipe_for(tmp_path, path, f"zero{stage}", 2, kl_coef=KL_COEF), path)
    reference = flat(learner.score_groups(groups, "reference"))
    train(learner, range(0, UPDATES))
    resident, scores = state_of(learner), flat(learner.score_groups(groups, "policy"))

    recipe = recipe_for(tmp_path, path, f"zero{stage}_offload", 2, kl_coef=KL_COEF)
    learner = learner_of(recipe, path)
    assert on_all(learner, offloaded) == 2 * [(True, stage == 3, "AdamW", True)]
    assert np.array_equal(flat(learner.score_groups(groups, "reference")), reference)
    train(learner, range(0, UPDATES - 1))
    learner.save(str(tmp_path / "saved"))
    saved = state_of(learner)
    train(learner, range(UPDATES - 1, UPDATES))
    state = state_of(learner)

    away = distances(state, resident)
    gap = np.abs(flat(learner.score_groups(groups, "policy")) - scores).max()
    print(f"\nZeRO-{stage}: " + ", ".join(f"{kind} {value:.1e}" for kind, value in away.items()) +
          f" of the largest; log-probs {gap:.1e} nats")
    assert state["steps"].tolist() == resident["steps"].tolist() == len(state["steps"]) * [UPDATES]
    assert max(away.values()) < 1e-5 and gap < 1e-4
    assert np.abs(scores - reference).max() > 0.01

    learner = learner_of(recipe, path)
    assert learner.load(str(tmp_path / "saved")) == UPDATES - 1
    assert_same(state_of(learner), saved)
    train(learner, range(UPDATES - 1, UPDATES))
    assert_same(state_of(learner), state)
