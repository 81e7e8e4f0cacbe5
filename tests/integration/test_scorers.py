"""Reward functions in Ray actors: the same values as in worker processes, deaths, time limits, and places."""
import json
import os
import signal
import threading
import time

import numpy as np
import pytest
import ray

from frpo.cluster.placement import reward_gpus
from frpo.cluster.scorers import ActorWorker, check_actors, workers_of
from frpo.config.loader import load_recipe
from frpo.errors import ConfigError, RewardError
from frpo.rewards import RewardCallError, RewardSpec, RewardSuite, ScoreStream
from frpo.rewards.protocol import ActorSpec
from frpo.rewards.stop import Stop
from frpo.types import Completion, Prompt, RolloutGroup

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("ray_cluster")]

SOURCE = '''
import asyncio, os, threading, time

calls = 0

def length(prompts, completions, completion_ids, answer):
    global calls
    calls += 1
    return [None if not text else len(prompt) + len(text) + sum(ids) + (one or 0)
            for prompt, text, ids, one in zip(prompts, completions, completion_ids, answer)]

async def later(completions):
    await asyncio.sleep(0.01)
    return [float(len(text)) for text in completions]

def act(completions, file):
    """Does what the first completion says."""
    if completions[0] == "raise":
        raise ValueError("cannot judge this")
    if completions[0] == "wait":
        open(file + ".part", "w").write(str(os.getpid()))
        os.rename(file + ".part", file)
        time.sleep(60)
    return [float(threading.current_thread() is threading.main_thread()) for _ in completions]

def here(completions):
    return [float(os.getpid())] * len(completions)
'''


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "user_rewards.py"
    path.write_text(SOURCE)
    return path


def group(number, *texts):
    prompt = Prompt(uid=f"p{number}", token_ids=(7,), messages=({"role": "user", "content": f"say {number}"},),
                    columns={"answer": number} if number % 2 else {})
    return RolloutGroup(group_id=(0, number), prompt=prompt, completions=tuple(Completion(
        text=text, token_ids=np.arange(len(text)), logprobs=np.zeros(len(text)), loss_mask=np.ones(len(text), bool),
        version_spans=(), seed=0, finish_reason="stop") for text in texts))


def spec(source, function, name="scored", count=1, **changes):
    return RewardSpec(name=name, function=f"{source}:{function}", actor=ActorSpec(cpus=0, count=count),
                      **{"timeout_s": 60, **changes})


def values(report):
    return [scored.rewards_G.tolist() for scored in report.groups]


def test_values_are_those_of_worker_processes(source):
    groups = [group(0, "a", "bb"), group(1, "", "cccc"), group(2, "d", "eeeee")]
    specs = [spec(source, "length", name="length", count=2), spec(source, "later", name="later", weight=0.5)]
    with RewardSuite(specs, columns=["answer"], workers=workers_of) as suite:
        assert suite.processes == 2
        found = suite.score(groups)
        with ScoreStream(suite) as stream:
            for each in groups:
                stream.add(each)
            streamed = stream.result()
    with RewardSuite(specs, columns=["answer"]) as suite:
        expected = suite.score(groups)
    np.testing.assert_equal(values(found), values(expected))
    np.testing.assert_equal(values(streamed), values(expected))
    assert found.counts == expected.counts and found.counts["reward/length/abstained"] == 1


def wait_for_file(path):
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    return path.read_text()


def test_a_killed_actor_is_an_abstention_and_the_next_call_works(source, tmp_path):
    file = tmp_path / "pid"
    waiting = spec(source, "act", on_error="abstain", kwargs={"file": str(file)})
    with RewardSuite([waiting], workers=workers_of) as suite:
        killer = threading.Thread(target=lambda: os.kill(int(wait_for_file(file)), signal.SIGKILL))
        killer.start()
        report = suite.score([group(0, "wait", "b")])
        killer.join()
        assert np.isnan(report.groups[0].rewards_G).all()
        assert report.counts == {"reward/scored/abstained": 2, "reward/scored/nonfinite": 0,
                                 "reward/scored/failed": 1, "reward/scored/timed_out": 0}
        assert values(suite.score([group(0, "on", "b")])) == [[1.0, 1.0]]  # 1: on the main thread


def test_errors_name_the_cause(source, tmp_path):
    file = tmp_path / "pid"
    act = spec(source, "act", kwargs={"file": str(file)})
    with RewardSuite([act], workers=workers_of) as suite:
        with pytest.raises(RewardCallError, match=r"reward 'scored' .* raised ValueError: cannot judge this(?s:.*)p0"):
            suite.score([group(0, "raise")])
        killer = threading.Thread(target=lambda: os.kill(int(wait_for_file(file)), signal.SIGKILL))
        killer.start()
        with pytest.raises(RewardCallError, match="its actor failed during the call: .*died.*; its log: .*worker-"):
            suite.score([group(0, "wait")])
        killer.join()
    with pytest.raises(RewardError, match="has no 'lengths'"), RewardSuite(
            [spec(source, "lengths")], workers=workers_of):
        pass


def test_a_call_beyond_its_limit_is_timed_out_and_the_next_call_works(source, tmp_path):
    slow = spec(source, "act", on_error="abstain", timeout_s=3.0, kwargs={"file": str(tmp_path / "pid")})
    with RewardSuite([slow], workers=workers_of) as suite:
        report = suite.score([group(0, "wait", "b")])
        assert report.counts["reward/scored/timed_out"] == 1 and np.isnan(report.groups[0].rewards_G).all()
        assert values(suite.score([group(0, "on")])) == [[1.0]]


def test_a_stop_ends_a_running_call(source, tmp_path):
    file, stop = tmp_path / "pid", Stop()
    waiting = spec(source, "act", on_error="abstain", kwargs={"file": str(file)})
    with RewardSuite([waiting], workers=workers_of) as suite:
        stopper = threading.Thread(target=lambda: (wait_for_file(file), stop.set()))
        stopper.start()
        with pytest.raises(RewardCallError, match="the call was stopped from outside"):
            suite.score([group(0, "wait")], stop)
        stopper.join()


def test_an_actor_that_died_between_calls_and_a_closed_suite_are_started_again(source, caplog):
    suite = RewardSuite([spec(source, "here")], workers=workers_of)
    first = values(suite.score([group(0, "a")]))[0][0]
    os.kill(int(first), signal.SIGKILL)
    second = values(suite.score([group(0, "a")]))[0][0]
    assert second != first
    assert "its worker died" in caplog.text and "between calls; starting another" in caplog.text
    suite.close()
    until = time.monotonic() + 60
    while os.path.exists(f"/proc/{int(second)}"):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert values(suite.score([group(0, "a")]))[0][0] != second
    suite.close()


def test_an_actor_without_a_place_is_told(source):
    actor = ActorSpec(cpus=ray.cluster_resources()["CPU"] + 1)
    worker = ActorWorker(name="large", function=f"{source}:here", timeout_s=1, actor=actor)
    worker._startup_timeout_s = 1
    with pytest.raises(RewardError, match=r"did not start its actor within 1 s; it reserves 0 GPU\(s\) and \d+ CPU"):
        worker.start()


def test_more_than_the_cluster_has_is_refused():
    def asked(**actor):
        reward = {"name": "length", "function": "frpo.rewards.length:soft_overlong", "actor": actor}
        return load_recipe("smoke", [f"rewards={json.dumps([reward])}"])

    check_actors(asked(cpus=0.5))
    assert reward_gpus(asked(gpus=0.5, count=3)) == 2
    with pytest.raises(ConfigError, match=r"actor.gpus: .* need 2 GPU\(s\) \(length: 3 x 0.5\), but the cluster has 0"):
        check_actors(asked(gpus=0.5, count=3))
    with pytest.raises(ConfigError, match=r"actor.cpus: the actors of rewards need 900 CPU\(s\)"):
        check_actors(asked(cpus=300, count=3))
