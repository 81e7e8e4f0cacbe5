"""The controller of the KL coefficient: its moves by hand, that it holds a plant at its target, and what is refused."""
from __future__ import annotations

import math

import pytest

from frpo.config.loader import load_recipe
from frpo.errors import ConfigError
from frpo.objectives.kl_control import AVERAGE, COEF, STEPS, KLControl


def test_moves_by_hand():
    control = KLControl(target=2.0, gain=0.1, smoothing=0.5, warmup_steps=1)
    record = control.after({}, 0.2, 4.0)
    assert record == {COEF: 0.2, AVERAGE: 4.0, STEPS: 1.0}  # the first step is only measured
    record = control.after(record, record[COEF], 2.0)
    assert record == {COEF: pytest.approx(0.2 * math.exp(0.1 * 0.5)), AVERAGE: 3.0, STEPS: 2.0}
    far = control.after({AVERAGE: 100.0, STEPS: 5.0}, 1.0, 100.0)
    assert far[COEF] == pytest.approx(math.exp(0.1))  # at most one gain up
    near = control.after({AVERAGE: 0.0, STEPS: 5.0}, 1.0, 0.0)
    assert near[COEF] == pytest.approx(math.exp(-0.05))  # and half of one down


def test_a_step_without_a_watched_prompt_changes_nothing_but_is_remembered():
    control = KLControl(target=1.0, where={"kind": ["hard", 3]})
    record = {COEF: 0.5, AVERAGE: 0.9, STEPS: 20.0}
    assert control.after(record, 0.5, math.nan) == record
    assert control.after({}, 0.5, math.nan) == {COEF: 0.5}
    assert control.watches({"kind": "hard"}) and control.watches({"kind": 3})
    assert not control.watches({"kind": "easy"}) and not control.watches({})
    assert KLControl(target=1.0).watches({})


@pytest.mark.parametrize("start", [0.002, 20.0])
def test_it_holds_a_policy_whose_kl_answers_its_coefficient(start):
    """KL = 1 / coef, reached by a tenth of the way a step: a plant as slow as training."""
    control, record, kl = KLControl(target=0.8), {COEF: start}, 0.0
    for _ in range(1500):
        kl += 0.1 * (1 / record[COEF] - kl)
        record = control.after(record, record[COEF], kl)
    assert kl == pytest.approx(0.8, rel=0.02)


@pytest.mark.parametrize("overrides, message", [
    (["objective.kl_control={target: 0.0}"], "kl_control.target: .*greater than 0, given 0.0"),
    (["objective.kl_control={target: 1.0, wher: {}}"], "unknown key 'objective.kl_control.wher'; did you mean 'where'"),
    (["objective.kl_control={target: 1.0}", "objective.kl_coef=0.0"], "needs a first value above 0, given kl_coef = 0"),
    (["objective.kl_estimator=full", "objective.surrogate={name: gspo}"], "but surrogate gspo or the correction"),
    (["objective.kl_estimator=full", "objective.correction={level: sequence}"], "correction.level: token"),
    (["objective.kl_estimator=exact"], "kl_estimator: should be 'k1', 'k2', 'k3' or 'full', given 'exact'"),
])
def test_what_cannot_be_controlled_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("smoke", overrides)
