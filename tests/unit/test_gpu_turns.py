"""Whose turn it is on shared GPUs. The engines and the learner are stand-ins: on CPU, vLLM has no sleep.

Their methods are held against the signatures of the real ones, and vLLM's sleep against what the engine calls.
"""
import inspect
from itertools import pairwise

import pytest

from frpo.cluster.engine_pool import EnginePool
from frpo.cluster.gpu_turns import GpuTurns, NoTurns, Turn
from frpo.cluster.learner_group import LearnerGroup
from frpo.errors import EngineError


class Sharing:
    """Engines and learner in one: notes every call and refuses what no GPU could do."""

    def __init__(self):
        self.log, self.memory = [], {"learner"}

    def sleep(self):
        self.log.append("sleep")
        self.memory -= {"weights", "kv_cache"}

    def wake(self, tag):
        assert (tag == "weights") == ("weights" not in self.memory), "weights first, the cache after them"
        self.log.append(f"wake {tag}")
        self.memory.add(tag)

    def make_room(self, offload):
        self.log.append(f"make room{' and offload' if offload else ''}")
        self.memory.discard("learner")

    def take_room(self, offload):
        assert not self.memory & {"weights", "kv_cache"}, "engines are awake"
        self.log.append(f"take room{' and offload' if offload else ''}")
        self.memory.add("learner")

    def send(self):
        assert ("weights" in self.memory and "kv_cache" not in self.memory) or self.turns.turn is Turn.SAMPLING
        self.log.append("send")


@pytest.fixture(params=[False, True])
def sharing(request):
    sharing = Sharing()
    sharing.turns = GpuTurns(sharing, sharing, request.param)
    sharing.offload = " and offload" if request.param else ""
    return sharing


def test_a_step_goes_round(sharing):
    turns = sharing.turns
    for _ in range(3):
        turns.learn()
        turns.learn()
        turns.push(sharing.send)
        turns.sample()
        turns.sample()
    step = [f"make room{sharing.offload}", "wake weights", "send", "wake kv_cache"]
    between = ["sleep", f"take room{sharing.offload}"]
    assert sharing.log == step + between + step + between + step


def test_engines_that_are_to_sample_again_get_the_same_weights_again(sharing):
    """Such as after the learner has scored their samples, for the KL of an evaluation."""
    turns = sharing.turns
    turns.push(sharing.send)
    turns.sample()
    turns.learn()
    sharing.log.clear()
    turns.sample()
    assert sharing.log == [f"make room{sharing.offload}", "wake weights", "send", "wake kv_cache"]
    assert turns.turn is Turn.SAMPLING


def test_a_push_to_engines_that_sample_lets_nobody_sleep(sharing):
    sharing.turns.push(sharing.send)
    sharing.log.clear()
    sharing.turns.push(sharing.send)
    assert sharing.log == ["send"]


def test_a_push_that_breaks_off_can_be_tried_again_and_nothing_else(sharing):
    turns = sharing.turns

    def fail():
        raise EngineError("cut on purpose")

    with pytest.raises(EngineError, match="cut on purpose"):
        turns.push(fail)
    assert turns.turn is Turn.PUSHING
    for other in (turns.sample, turns.learn):
        with pytest.raises(EngineError, match="after it broke off; push again first"):
            other()
    turns.push(sharing.send)
    assert sharing.log[-3:] == ["wake weights", "send", "wake kv_cache"] and turns.turn is Turn.SAMPLING


def test_nothing_is_sampled_before_the_first_push(sharing):
    with pytest.raises(EngineError, match="before the first push"):
        sharing.turns.sample()


def test_where_nothing_is_shared_everything_goes_at_any_time():
    sent = []
    turns = NoTurns()
    turns.sample()
    turns.learn()
    turns.push(lambda: sent.append(1))
    assert sent == [1]


@pytest.mark.parametrize("name, real", [("sleep", EnginePool), ("wake", EnginePool), ("make_room", LearnerGroup),
                                        ("take_room", LearnerGroup)])
def test_the_stand_in_is_called_as_the_real_one(name, real):
    assert inspect.signature(getattr(Sharing, name)).parameters.keys() == inspect.signature(
        getattr(real, name)).parameters.keys()


def test_vllm_sleeps_and_wakes_as_the_engine_asks():
    from vllm import LLM

    from frpo.rollout.engine import CACHE, FORGET_WEIGHTS, WEIGHTS

    assert inspect.signature(LLM.sleep).bind(None, level=FORGET_WEIGHTS)
    assert inspect.signature(LLM.wake_up).bind(None, [WEIGHTS])
    text = inspect.getdoc(LLM.wake_up)
    assert all(tag in text for tag in (WEIGHTS, CACHE))


def test_turns_have_an_order():
    assert [(a.value, b.value) for a, b in pairwise(Turn)] == [("sampling", "learning"), ("learning", "pushing")]
