"""One engine for several callers: who gets which output, and when weights may change. The engine answers by rule."""
import threading
import time
from types import SimpleNamespace

import pytest

from frpo.errors import EngineError
from frpo.rollout.sharing import SharedEngine


class Engine:
    """Ends every request after `steps` steps; a step takes a moment."""

    def __init__(self, steps=3):
        self.steps, self.left, self.log, self.aborted = steps, {}, [], []

    def add_request(self, request_id, prompt, params):
        self.left[request_id] = self.steps

    def step(self):
        self.log.append("step")
        time.sleep(0.002)
        outputs = []
        for request_id in list(self.left):
            self.left[request_id] -= 1
            outputs.append(SimpleNamespace(request_id=request_id, finished=self.left[request_id] == 0))
            if self.left[request_id] == 0:
                del self.left[request_id]
        return outputs

    def abort_request(self, request_ids, internal):
        self.aborted += request_ids
        for request_id in request_ids:
            del self.left[request_id]


def sample(shared, keys):
    found = []
    with shared.caller() as caller:
        caller.add(lambda: dict.fromkeys(keys, (None, None)))
        while caller.unfinished:
            found += [key for key, _ in caller.outputs()]
    return found


def test_a_caller_gets_its_own_outputs_under_its_own_keys():
    shared = SharedEngine(Engine(), 20)
    with shared.caller() as first, shared.caller() as second:
        first.add(lambda: {"a": (None, None), "b": (None, None)})
        second.add(lambda: {"a": (None, None)})
        while first.unfinished:
            got = first.outputs()
        assert [key for key, _ in got] == ["a", "b"]
        steps = len(shared.engine.log)
        assert [key for key, _ in second.outputs()] == ["a"]  # it had arrived while the other stepped
        assert len(shared.engine.log) == steps


def test_many_threads_at_once_lose_nothing():
    shared, found = SharedEngine(Engine(), 20), {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: sample(shared, list("abcd"))})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == {i: list("abcd") for i in range(8)} and shared.engine.left == {}


def test_who_leaves_early_leaves_no_request_behind():
    shared = SharedEngine(Engine(), 20)
    with pytest.raises(ZeroDivisionError), shared.caller() as caller:
        caller.add(lambda: {"a": (None, None)})
        caller.outputs()
        1 / 0  # noqa: B018
    assert shared.engine.aborted == ["0/a"] and shared.engine.left == {}


def test_nothing_is_added_if_making_the_requests_raises():
    shared = SharedEngine(Engine(), 20)
    with pytest.raises(KeyError), shared.caller() as caller:
        caller.add(lambda: {}["another version"])
    assert shared.engine.left == {} and shared.engine.aborted == []


def test_a_turn_comes_between_two_steps_and_before_the_next_one():
    shared = SharedEngine(Engine(steps=400), 20)
    sampler = threading.Thread(target=sample, args=(shared, ["a"]))
    sampler.start()
    while len(shared.engine.log) < 5:
        time.sleep(0.001)
    for _ in range(20):
        with shared.turn():
            shared.engine.log.append("push")
            steps = len(shared.engine.log)
            time.sleep(0.005)
            assert len(shared.engine.log) == steps
    sampler.join(20)
    log = shared.engine.log
    assert log.count("step") == 400
    assert max(len(run) for run in "".join(entry[0] for entry in log[log.index("push"):]).rstrip("s").split("p")) < 50


def test_a_held_engine_does_not_step_until_it_is_released_from_another_thread():
    shared = SharedEngine(Engine(), 20)
    shared.hold()
    with shared.turn_of_update():
        pass  # one of the calls between
    sampler = threading.Thread(target=sample, args=(shared, ["a"]))
    sampler.start()
    time.sleep(0.05)
    held = shared.engine.log.count("step")
    releaser = threading.Thread(target=shared.release)
    releaser.start()
    sampler.join(20)
    assert (held, shared.engine.log.count("step")) == (0, 3)


def test_an_engine_that_nobody_releases_is_an_error_and_no_hang():
    shared = SharedEngine(Engine(), 0.1)
    shared.hold()  # by a sender that dies
    with pytest.raises(EngineError, match="not free within 0.1 s .* began but did not finish"):
        sample(shared, ["a"])
    shared.release()
    assert sample(shared, ["a"]) == ["a"]
