"""When the movement of parameters is checked, and what the checks of gradients and movement say."""
from types import SimpleNamespace

import numpy as np
import pytest

from frpo.errors import InvariantError
from frpo.run.checks import MovementWatch, check_gradient, check_movement
from frpo.types import TrainingSample


def update(advantage, weight=1.0):
    """One rank, one micro-batch, one sample."""
    return (((TrainingSample(
        sample_id=(0, 0, 0), token_ids=np.arange(3), loss_mask=np.arange(3) > 0, advantage=advantage,
        policy_weight=np.array([0.0, weight, weight]), kl_weight=np.zeros(3), kl_metric_weight=np.zeros(3),
        rollout_logprobs=np.zeros(3, dtype=np.float32)),),),)


def watch(check=True, lora=None):
    return MovementWatch(SimpleNamespace(
        checks=SimpleNamespace(parameters_move=check), model=SimpleNamespace(lora=lora)))


def test_the_first_update_with_a_signal_is_watched_and_no_other():
    movement = watch()
    assert [movement.due(u) for u in (update(0.0), update(1.0, weight=0.0), update(-1.0), update(1.0))] == [
        False, False, True, False]


def test_with_lora_it_is_the_second():
    movement = watch(lora=object())
    assert [movement.due(update(a)) for a in (1.0, 0.0, 1.0, 1.0)] == [False, False, True, False]


def test_the_check_can_be_switched_off():
    assert not any(watch(check=False).due(update(1.0)) for _ in range(3))


@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_is_an_error(norm):
    check_gradient(0.0, 6)
    with pytest.raises(InvariantError, match=f"the gradient of update 7 has the norm {norm}: "):
        check_gradient(norm, 7)


def test_tensors_without_gradient_and_tensors_that_stood_still_are_named():
    check_movement({"a": (True, True)})
    with pytest.raises(InvariantError, match="of 3 trainable tensors 1 got no gradient: b; 1 got a gradient but did "
                                             "not move: c"):
        check_movement({"a": (True, True), "b": (False, False), "c": (True, False)})
