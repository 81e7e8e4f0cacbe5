"""Several real processes of one reward function: who scores what, what fails, and that nothing else is touched."""
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

from frpo.errors import RewardError
from frpo.rewards import RewardCallError, RewardSpec, RewardSuite, RewardTimeoutError
from frpo.rewards.pool import shares
from frpo.rewards.stop import Stop
from frpo.types import Completion, Prompt, RolloutGroup

pytestmark = pytest.mark.timeout(60)

SOURCE = '''
import os, time
from itertools import groupby

def act(completions, **kwargs):
    """Does what the completions say, one after the other."""
    values = [one(text) for text in completions]
    return values[:-1] if "short" in completions else values

def one(text):
    if text == "raise": raise ValueError("cannot judge this")
    if text == "exit": os._exit(3)
    if text == "sleep": time.sleep(60)
    if text == "nap": time.sleep(0.05)
    if text == "text": return "high"
    if text == "None": return None
    if text == "nan": return float("nan")
    if text.startswith("note "):
        open(text[5:] + ".part", "w").write(str(os.getpid()))
        os.rename(text[5:] + ".part", text[5:])
        time.sleep(60)
    if text.startswith("meet "):
        mine, other = text.split()[1:]
        open(mine, "w").close()
        for _ in range(1000):
            if os.path.exists(other): return 1.0
            time.sleep(0.01)
        return 0.0
    return float(len(text))

def pid(completions): return [os.getpid()] * len(completions)

def picky(completions):
    if "raise" in completions: raise ValueError("cannot judge this")
    return [0.0] * len(completions)

def rank(prompts, completions, answer):
    """Compares the completions of one prompt, so that a group cut in two would be judged wrongly."""
    values = []
    for _, rows in groupby(zip(prompts, completions, answer), key=lambda row: row[0]):
        rows = list(rows)
        lengths = sorted(abs(len(text) - answer) for _, text, answer in rows)
        values += [lengths.index(abs(len(text) - answer)) / len(rows) for _, text, answer in rows]
    return values
'''


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "user_rewards.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def suite(source):
    """(function, processes) -> a suite of that one reward."""
    suites = []

    def make(function, processes, **fields):
        spec = RewardSpec(name="r", function=f"{source}:{function}", processes=processes, **fields)
        suites.append(RewardSuite([spec]))
        return suites[-1]

    yield make
    for each in suites:
        each.close()


def group(uid, *texts, **columns):
    completions = tuple(
        Completion(text=text, token_ids=tuple(range(len(text))), logprobs=(0.0,) * len(text), version_spans=(), seed=0,
                   loss_mask=(True,) * len(text), finish_reason="stop") for text in texts)
    prompt = Prompt(uid=uid, messages=({"role": "user", "content": uid},), token_ids=(1,), columns=columns)
    return RolloutGroup(group_id=(0, ord(uid)), prompt=prompt, completions=completions)


def counts_of(report):
    return {key.removeprefix("reward/r/"): count for key, count in report.counts.items() if count}


def values_of(report):
    return [scored.terms["r"].tolist() for scored in report.groups]


def gone(pid):
    for _ in range(300):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().split()[2] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


# --- who scores what --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes, count, cuts", [
    ([4, 4, 4, 4], 2, [0, 8, 16]), ([4, 4, 4, 4], 4, [0, 4, 8, 12, 16]), ([4, 4], 8, [0, 4, 8]),
    ([2, 2, 2, 2, 2], 2, [0, 4, 10]),  # 4 and 6 are equally near to 5
    ([10, 1, 1, 1], 2, [0, 10, 13]), ([1, 1, 1, 10], 2, [0, 3, 13]),  # by completions, not by groups
    ([3, 3, 3, 3], 3, [0, 3, 9, 12]), ([1, 1, 10], 3, [0, 2, 12]),  # 4 and 8 of 12: nobody gets nothing
    ([0, 2, 0, 2, 0], 2, [0, 2, 4]), ([7], 3, [0, 7]), ([5, 6], 1, [0, 11]), ([], 3, [0]), ([0], 3, [0])])
def test_shares_are_whole_groups_cut_nearest_to_equal_numbers_of_completions(sizes, count, cuts):
    assert shares(sizes, count) == [slice(start, stop) for start, stop in pairwise(cuts)]


def test_every_process_gets_a_share_of_whole_groups_that_follow_each_other(suite):
    rewards = suite("pid", 3)
    report = rewards.score([group(uid, *"ab") for uid in "pqrstu"])
    pids = [set(scored.terms["r"]) for scored in report.groups]
    assert all(len(found) == 1 for found in pids) and len(set.union(*pids)) == 3
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4] == pids[5]
    assert os.getpid() not in set.union(*pids)


def test_values_are_the_same_for_any_number_of_processes(suite):
    groups = [group(uid, *("x" * ((7 * i + 3 * k) % 11) for k in range(1 + i % 4)), answer=i)
              for i, uid in enumerate("pqrstuv")]
    expected = suite("rank", 1).score(groups)
    assert len({value for values in values_of(expected) for value in values}) > 2
    for processes in (2, 3, 9):
        report = suite("rank", processes).score(groups)
        assert values_of(report) == values_of(expected) and report.counts == expected.counts
        assert [scored.group for scored in report.groups] == groups


def test_shares_are_scored_at_the_same_time(suite, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    report = suite("act", 2).score([group("p", f"meet {a} {b}"), group("q", f"meet {b} {a}")])
    assert values_of(report) == [[1.0], [1.0]]  # each waited until the other ran


def test_processes_make_a_slow_reward_faster_printed_not_asserted(suite):
    groups = [group(uid, *["nap"] * 4) for uid in "pqrstuvw"]
    for processes in (1, 2, 4):
        rewards = suite("act", processes)
        rewards.start()
        began = time.perf_counter()
        assert values_of(rewards.score(groups)) == [[3.0] * 4] * 8
        print(f"{processes} processes: {time.perf_counter() - began:.2f} s for 32 completions of 0.05 s")


def test_start_loads_every_process_and_close_ends_every_one(suite):
    rewards = suite("pid", 3)
    rewards.start()
    pids = [worker._process.pid for worker in rewards._pools[0].workers]
    assert len(set(pids)) == 3
    rewards.close()
    assert all(gone(pid) for pid in pids)
    assert len(rewards.score([group("p", "a")]).groups) == 1  # and starts afresh


@pytest.mark.parametrize("processes, said", [(0, "reward 'r': processes is 0"), (-2, "processes is -2")])
def test_no_processes_are_refused(processes, said):
    with pytest.raises(RewardError, match=said):
        RewardSuite([RewardSpec(name="r", function="m:f", processes=processes)])


# --- one share goes wrong ---------------------------------------------------------------------------------------------

FINE = group("p", "a", "ab"), group("q", "abc", "")


@pytest.mark.parametrize("text, said", [
    ("text", "value 5 (prompt 's') is str 'high'"), ("nan", "returned nan for completion 5 (prompt 's'); 1 of 3"),
    ("short", "returned 2 values for 3 completions")])
def test_errors_count_completions_over_the_whole_call(suite, text, said):
    with pytest.raises(RewardError) as caught:
        suite("act", 2).score([*FINE, group("r", "a"), group("s", text, "a")])
    assert str(caught.value).startswith("reward 'r' (") and said in str(caught.value)
    if text != "nan":
        assert "the call was given completions 4 to 6 of 7, of prompts 'r', 's'" in str(caught.value)


KINDS = [("raise", RewardCallError, "raised ValueError: cannot judge this", "failed"),
         ("exit", RewardCallError, "exited with code 3 during the call", "failed"),
         ("sleep", RewardTimeoutError, "the call took longer than 1 s", "timed_out")]


@pytest.mark.parametrize("text, kind, said, _", KINDS)
def test_a_failed_share_stops_the_run_and_says_what_it_was_given(suite, text, kind, said, _):
    rewards = suite("act", 2, timeout_s=1)
    rewards.start()
    with pytest.raises(RewardError) as caught:
        rewards.score([*FINE, group("r", "a", text), group("s", "a")])
    assert type(caught.value) is kind and said in str(caught.value)
    assert str(caught.value).endswith(
        "the call was given completions 4 to 6 of 7, of prompts 'r', 's', as text (rewards[].format)")


@pytest.mark.parametrize("text, _, __, count", KINDS)
def test_only_the_failed_share_abstains(suite, text, _, __, count):
    rewards = suite("act", 3, timeout_s=1, on_error="abstain")
    for _ in range(2):  # and again: a process that was lost is replaced
        report = rewards.score([group("p", "a", "None"), group("q", text, "a"), group("r", "abc", "nan")])
        np.testing.assert_array_equal(report.groups[0].rewards_G, [1.0, np.nan])
        np.testing.assert_array_equal(report.groups[1].rewards_G, [np.nan, np.nan])
        np.testing.assert_array_equal(report.groups[2].rewards_G, [3.0, np.nan])
        assert counts_of(report) == {"abstained": 4, "nonfinite": 1, count: 1}


def test_failed_shares_are_counted_one_by_one(suite):
    groups = [group("p", "raise", "a"), group("q", "a", "a"), group("r", "raise", "a")]
    assert counts_of(suite("act", 3, on_error="abstain").score(groups)) == {"abstained": 4, "failed": 2}
    assert counts_of(suite("act", 1, on_error="abstain").score(groups)) == {"abstained": 6, "failed": 1}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("on_error", ["raise", "abstain"])
def test_an_error_in_one_share_ends_the_busy_ones_whichever_comes_first(suite, tmp_path, order, on_error):
    """The wrong length is an error under both settings, and the suite can be used again at once."""
    rewards = suite("act", 2, timeout_s=50, on_error=on_error)
    rewards.start()
    note = tmp_path / "pid"
    busy, wrong = group("p", f"note {note}"), group("q", f"meet {tmp_path / 'x'} {note}", "short")
    began = time.monotonic()
    with pytest.raises(RewardError, match="returned 1 values for 2 completions"):
        rewards.score([busy, wrong][::order])
    assert time.monotonic() - began < 10 and gone(int(note.read_text()))
    assert values_of(rewards.score(FINE)) == [[1.0, 2.0], [3.0, 0.0]]


def test_an_error_of_the_second_reward_does_not_wait_for_the_first(source):
    specs = [RewardSpec(name="slow", function=f"{source}:act", timeout_s=50),
             RewardSpec(name="none", function=f"{source}:rank")]  # there is no column `answer`
    with RewardSuite(specs) as rewards:
        began = time.monotonic()
        with pytest.raises(RewardError, match="reward 'none' .* needs 'answer'"):
            rewards.score([group("p", "sleep")])
        assert time.monotonic() - began < 10


# --- calls at the same time -------------------------------------------------------------------------------------------

def test_calls_of_several_threads_share_the_processes_and_keep_their_values(suite):
    rewards = suite("act", 2)
    batches = [[group(uid, "nap", "x" * (3 * i + k)) for k, uid in enumerate("pqr")] for i in range(6)]
    with ThreadPoolExecutor(6) as executor:
        reports = list(executor.map(rewards.score, batches))
    assert [values_of(report) for report in reports] == [[[3.0, 3.0 * i + k] for k in range(3)] for i in range(6)]


def test_an_error_leaves_the_other_call_alone(suite, tmp_path):
    rewards = suite("act", 2, timeout_s=50)
    rewards.start()
    a, b, gate = tmp_path / "a", tmp_path / "b", tmp_path / "gate"
    with ThreadPoolExecutor(1) as executor:
        stop = Stop()  # of both, as those of one stream
        other = executor.submit(rewards.score, [group("p", f"meet {a} {gate}")], stop)
        with pytest.raises(RewardCallError, match="cannot judge this"):
            rewards.score([group("q", f"meet {b} {a}", "raise")], stop)
        gate.touch()  # the other still runs
        assert values_of(other.result(timeout=20)) == [[1.0]]


def test_an_error_does_not_wait_for_a_process_that_another_call_holds(source, tmp_path):
    a, gate = tmp_path / "a", tmp_path / "gate"
    specs = [RewardSpec(name="r", function=f"{source}:act", timeout_s=50),
             RewardSpec(name="picky", function=f"{source}:picky")]
    with RewardSuite(specs) as rewards, ThreadPoolExecutor(1) as executor:
        other = executor.submit(rewards.score, [group("p", f"meet {a} {gate}")])
        while not a.exists():
            time.sleep(0.01)
        with pytest.raises(RewardCallError, match="reward 'picky' .*cannot judge this"):
            rewards.score([group("q", "raise")])
        assert not other.done()
        gate.touch()
        assert values_of(other.result(timeout=20)) == [[1.0]]


@pytest.mark.parametrize("end", ["stop", "close"])
@pytest.mark.parametrize("on_error", ["raise", "abstain"])
def test_a_stop_ends_calls_that_run_and_calls_that_wait_for_a_process(suite, tmp_path, on_error, end):
    rewards, stop, note = suite("act", 1, timeout_s=50, on_error=on_error), Stop(), tmp_path / "pid"
    with ThreadPoolExecutor(2) as executor:
        running = executor.submit(rewards.score, [group("p", f"note {note}")], stop)
        while not note.exists():
            time.sleep(0.01)
        waiting = executor.submit(rewards.score, [group("q", "a")], stop)
        time.sleep(0.2)
        assert not waiting.done()
        began = time.monotonic()
        stop.set() if end == "stop" else rewards.close()
        for call, said in ((running, "was stopped from outside"), (waiting, "was stopped before it began")):
            with pytest.raises(RewardCallError, match=said):  # whatever on_error says: nobody asked for these values
                call.result(timeout=20)
        assert time.monotonic() - began < 10 and gone(int(note.read_text()))
    assert values_of(rewards.score(FINE)) == [[1.0, 2.0], [3.0, 0.0]]
    if end == "stop":
        with pytest.raises(RewardCallError, match="stopped before it began"):
            rewards.score(FINE, stop)


def test_a_stop_leaves_the_calls_of_others_alone(suite, tmp_path):
    rewards, stop, gate = suite("act", 2, timeout_s=50), Stop(), tmp_path / "gate"
    with ThreadPoolExecutor(2) as executor:
        other = executor.submit(rewards.score, [group("p", f"meet {tmp_path / 'a'} {gate}")])
        ended = executor.submit(rewards.score, [group("q", f"meet {tmp_path / 'b'} {gate}")], stop)
        while not ((tmp_path / "a").exists() and (tmp_path / "b").exists()):
            time.sleep(0.01)
        stop.set()
        with pytest.raises(RewardCallError, match="was stopped from outside"):
            ended.result(timeout=20)
        gate.touch()
        assert values_of(other.result(timeout=20)) == [[1.0]]


def test_a_stop_reaches_who_comes_before_and_after_and_nobody_who_has_left():
    stop, called = Stop(), []
    with stop.calls(lambda: called.append("left")):
        pass
    with stop.calls(lambda: called.append("before")):
        assert not stop.is_set() and called == []
        thread = threading.Thread(target=stop.set)
        thread.start()
        thread.join()
        assert stop.is_set() and called == ["before"]
        with stop.calls(lambda: called.append("after")):
            assert called == ["before", "after"]
