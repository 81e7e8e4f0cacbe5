"""Groups scored while others arrive, on real workers."""
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from frpo.errors import RewardError
from frpo.rewards import RewardCallError, RewardSpec, RewardSuite, ScoreStream
from frpo.types import Completion, Prompt, RolloutGroup

pytestmark = pytest.mark.timeout(30)

SOURCE = '''
import os, time

def length(completions, log, **kwargs):
    with open(log, "a") as file:
        file.write(f"{len(completions)}\\n")
    return [float(len(text)) if text else None for text in completions]

def held(completions, log, gate, **kwargs):
    length(completions, log)
    while not os.path.exists(gate): time.sleep(0.01)
    return [1.0] * len(completions)

def picky(completions, **kwargs):
    if "bad" in completions: raise ValueError("cannot judge this")
    return [1.0] * len(completions)

def moody(completions, log, **kwargs):
    """Fine until a completion says how to misbehave."""
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    for text in completions:
        if text == "raise": raise ValueError("cannot judge this")
        if text == "exit": os._exit(3)
        if text == "sleep": time.sleep(60)
        if text == "scalar": return 1.0
        if text == "short": return [1.0] * (len(completions) - 1)
    return [{"text": "high", "nan": float("nan")}.get(text, 1.0) for text in completions]

def met(completions, folder, **kwargs):
    """Ends once as many calls have begun as the completion says."""
    open(f"{folder}/{os.getpid()}", "w").close()
    for _ in range(1000):
        if len(os.listdir(folder)) >= int(completions[0]): return [float(len(completions))] * len(completions)
        time.sleep(0.01)
    return [None] * len(completions)
'''


def group(draw, *texts):
    completions = tuple(
        Completion(text=text, token_ids=tuple(range(len(text))), logprobs=(0.0,) * len(text), version_spans=(), seed=0,
                   loss_mask=(True,) * len(text), finish_reason="stop") for text in texts)
    prompt = Prompt(uid=str(draw), messages=({"role": "user", "content": "ask"},), token_ids=(1,))
    return RolloutGroup(group_id=(2, draw), prompt=prompt, completions=completions)


@pytest.fixture
def suite(tmp_path):
    """(function, kwargs) -> a started suite of that one reward."""
    (tmp_path / "user.py").write_text(SOURCE)
    suites = []

    def make(function, **fields):
        spec = RewardSpec(name="r", function=f"{tmp_path / 'user.py'}:{function}", **fields)
        suites.append(RewardSuite([spec]))
        suites[-1].start()
        return suites[-1]

    yield make
    for started in suites:
        started.close()


def wait_until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("did not happen")


def test_groups_come_back_sorted_with_the_values_of_one_call(suite, tmp_path):
    rewards = suite("length", kwargs={"log": str(tmp_path / "log")})
    groups = [group(draw, "a" * (draw + 1), "") for draw in (3, 0, 2, 1)]
    with ScoreStream(rewards) as stream:
        for each in groups:
            stream.add(each)
        streamed = stream.result()
    whole = rewards.score(sorted(groups, key=lambda g: g.group_id))
    assert [scored.group.group_id for scored in streamed.groups] == [(2, i) for i in range(4)]
    for one, other in zip(streamed.groups, whole.groups, strict=True):
        np.testing.assert_array_equal(one.rewards_G, other.rewards_G)
    assert streamed.counts == whole.counts and whole.counts["reward/r/abstained"] == 4


def test_the_first_group_is_scored_before_the_last_arrives_and_the_others_share_a_call(suite, tmp_path):
    log, gate = tmp_path / "log", tmp_path / "gate"
    rewards = suite("held", kwargs={"log": str(log), "gate": str(gate)})
    with ScoreStream(rewards) as stream:
        stream.add(group(0, "a", "b"))
        wait_until(log.exists)  # the call runs while we go on
        for draw in (1, 2, 3):
            stream.add(group(draw, "a", "b"))
        gate.touch()
        assert len(stream.result().groups) == 4
    assert log.read_text().split() == ["2", "6"]


def test_an_error_comes_out_at_the_next_group(suite):
    with ScoreStream(suite("picky")) as stream:
        stream.add(group(0, "bad"))
        wait_until(lambda: stream._calls[0].done())
        with pytest.raises(RewardCallError, match="cannot judge this"):
            stream.add(group(1, "good"))


def test_an_error_in_the_last_call_comes_out_of_the_result(suite):
    with ScoreStream(suite("picky")) as stream:
        stream.add(group(0, "good"))
        stream.add(group(1, "bad"))
        with pytest.raises(RewardCallError, match="cannot judge this"):
            stream.result()


def test_abstained_calls_are_counted_over_all_calls(suite):
    with ScoreStream(suite("picky", on_error="abstain")) as stream:
        for draw in range(2):
            stream.add(group(draw, "bad", "good"))
            wait_until(lambda: stream._calls[0].done())
        report = stream.result()
    assert report.counts["reward/r/failed"] == 2 and report.counts["reward/r/abstained"] == 4
    assert all(np.isnan(scored.rewards_G).all() for scored in report.groups)


def test_nothing_added_is_nothing_scored(suite):
    with ScoreStream(suite("picky")) as stream:
        assert stream.result().groups == []


# --- several calls at the same time -----------------------------------------------------------------------------------

def test_as_many_calls_run_at_once_as_may(suite, tmp_path):
    rewards = suite("met", processes=3, kwargs={"folder": str(tmp_path / "calls")})
    (tmp_path / "calls").mkdir()
    with ScoreStream(rewards) as stream:
        for draw in (2, 0, 1):  # each a call of one group, which ends only if all three run at the same time
            stream.add(group(draw, *["3"] * (draw + 1)))
        report = stream.result()
    assert [scored.rewards_G.tolist() for scored in report.groups] == [[1.0], [2.0] * 2, [3.0] * 3]
    assert [scored.group.group_id for scored in report.groups] == [(2, i) for i in range(3)]


def test_the_limit_of_calls_holds_and_the_rest_is_shared_out(suite, tmp_path):
    log, gate = tmp_path / "log", tmp_path / "gate"
    rewards = suite("held", kwargs={"log": str(log), "gate": str(gate)}, processes=2)
    with ScoreStream(rewards) as stream:
        for draw in range(8):
            stream.add(group(draw, "a", "b"))
        assert len(stream._calls) == 2 and len(stream._waiting) == 6
        gate.touch()
        report = stream.result()
    assert sorted(log.read_text().split()) == ["2", "2", "6", "6"]
    assert [scored.group.group_id for scored in report.groups] == [(2, i) for i in range(8)]
    assert report.counts["reward/r/abstained"] == 0


# --- a reward that goes wrong in the middle ---------------------------------------------------------------------------

WRONG = {
    "sleep": "the call took longer than 1 s", "raise": "raised ValueError: cannot judge this",
    "exit": "exited with code 3 during the call", "scalar": "returned float 1.0; return a list",
    "short": "values for", "text": "value 1 (prompt '3') is str 'high'",
    "nan": "returned nan for completion 1 (prompt '3')"}


def pids(log):
    return {int(line) for line in log.read_text().split()} if log.exists() else set()


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("text", WRONG)
def test_a_reward_that_goes_wrong_at_a_later_call_ends_the_stream_and_nothing_else(suite, tmp_path, text, processes):
    log = tmp_path / "log"
    rewards = suite("moody", kwargs={"log": str(log)}, timeout_s=1, processes=processes)
    with pytest.raises(RewardError) as caught, ScoreStream(rewards) as stream:
        for draw in range(3):
            stream.add(group(draw, "fine", "fine"))
            wait_until(lambda: all(call.done() for call in stream._calls))
        stream.add(group(3, "fine", text))
        for draw in range(4, 400):  # generation goes on
            stream.add(group(draw, "fine", "fine"))
            time.sleep(0.01)
    message = str(caught.value)
    assert draw < 399 and message.startswith("reward 'r' (") and WRONG[text] in message
    assert len(stream._reports) >= 3
    if text not in ("text", "nan"):  # no one value is at fault, so all that the call was given are named
        said = "the call was given completions 0 to 1 of 2, of prompt '3', as text (rewards[].format)"
        assert message.splitlines()[-1] == said
    assert all(call.done() for call in stream._calls)
    report = rewards.score([group(0, "fine"), group(1, "fine")])
    assert [scored.rewards_G.tolist() for scored in report.groups] == [[1.0], [1.0]]
    with ScoreStream(rewards) as stream:
        stream.add(group(0, "fine"))
        assert stream.result().groups[0].rewards_G.tolist() == [1.0]
    rewards.close()
    assert pids(log) and not any(alive(pid) for pid in pids(log))


def test_a_later_time_out_abstains_for_its_own_call_only(suite, tmp_path):
    rewards = suite("moody", kwargs={"log": str(tmp_path / "log")}, timeout_s=1, on_error="abstain")
    with ScoreStream(rewards) as stream:
        for draw, text in enumerate(["fine", "sleep", "fine"]):
            stream.add(group(draw, "fine", text))
            wait_until(lambda: stream._calls[0].done())
        report = stream.result()
    assert [np.isnan(scored.rewards_G).tolist() for scored in report.groups] == [[False] * 2, [True] * 2, [False] * 2]
    assert {key: count for key, count in report.counts.items() if count} == {
        "reward/r/abstained": 2, "reward/r/timed_out": 1}


@pytest.mark.parametrize("on_error", ["raise", "abstain"])
def test_a_stream_that_fails_ends_its_other_calls_too(suite, tmp_path, on_error):
    log = tmp_path / "log"
    rewards = suite("moody", kwargs={"log": str(log)}, timeout_s=25, processes=2, on_error=on_error)
    with pytest.raises(RewardError, match="value 0 .prompt '1'. is str 'high'"):
        with ScoreStream(rewards) as stream:
            stream.add(group(0, "sleep"))
            wait_until(lambda: len(pids(log)) == 1)
            stream.add(group(1, "text"))
            stream.result()
        raise AssertionError("result raises")
    slept = int(log.read_text().split()[0])
    assert all(call.done() for call in stream._calls) and not alive(slept)
    assert rewards.score([group(0, "a"), group(1, "b")]).groups[1].rewards_G == [1.0]


def test_leaving_a_stream_leaves_the_calls_of_others_alone(suite, tmp_path):
    """As evaluation on the main thread while the next step's groups are scored on another."""
    log, gate = tmp_path / "log", tmp_path / "gate"
    rewards = suite("held", kwargs={"log": str(log), "gate": str(gate)}, processes=2)
    with ThreadPoolExecutor(1) as executor:
        other = executor.submit(rewards.score, [group(0, "a")])
        wait_until(log.exists)
        with pytest.raises(ConnectionError), ScoreStream(rewards) as stream:
            stream.add(group(1, "a"))
            wait_until(lambda: log.read_text().count("\n") == 2)
            raise ConnectionError("the engine died")
        gate.touch()
        assert other.result(timeout=20).groups[0].rewards_G == [1.0]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("on_error", ["raise", "abstain"])
def test_a_stream_left_because_of_something_else_ends_the_call_under_way(suite, tmp_path, begun, on_error):
    log = tmp_path / "log"
    rewards = suite("moody", kwargs={"log": str(log)}, timeout_s=25, on_error=on_error)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="the engine died"), ScoreStream(rewards) as stream:
        stream.add(group(0, "sleep"))
        if begun:
            wait_until(log.exists)
        raise ConnectionError("the engine died")
    assert time.monotonic() - began < 10 and stream._calls[0].done()
    assert not any(map(alive, pids(log)))  # an idle process lives on
    assert rewards.score([group(0, "a")]).groups[0].rewards_G == [1.0]
    rewards.close()
    assert not any(alive(pid) for pid in pids(log))
