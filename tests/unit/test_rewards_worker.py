"""Real worker processes: what they return, how they die, and that a call always ends."""
import os
import subprocess
import sys
import textwrap
import time

import pytest

from frpo import loading
from frpo.errors import RewardError
from frpo.loading import load_function
from frpo.rewards.values import Foreign
from frpo.rewards.worker import RewardCallError, RewardTimeoutError, RewardWorker

pytestmark = pytest.mark.timeout(30)

SOURCE = '''
import asyncio, atexit, os, signal, subprocess, sys, time
from decimal import Decimal
import numpy as np

calls = 0

def act(completions, **kwargs):
    """Does what the first completion says."""
    global calls
    calls += 1
    what = completions[0]
    if what == "count": return [calls]
    if what == "pid": return [os.getpid()]
    if what == "sleep": time.sleep(60)
    if what == "raise": return helper(completions)
    if what == "sys.exit": sys.exit("bye")
    if what == "_exit": os._exit(7)
    if what == "segfault": os.kill(os.getpid(), signal.SIGSEGV)
    if what == "fork and die":
        if os.fork() == 0: time.sleep(60)
        os._exit(7)
    if what == "child":
        child = subprocess.Popen(["sleep", "60"])
        open(completions[1], "w").write(str(child.pid))
        time.sleep(60)
    if what == "numbers":
        return [1, 2.5, True, None, np.float32(0.5), np.int64(3), np.array(4.0), Decimal("0.5"), 10**400, float("nan")]
    if what == "array": return np.array([1.0, 2.0])
    if what == "foreign": return ["text", [1], 1j]
    if what == "scalar": return 1.0
    if what == "generator": return (x for x in completions)
    if what == "modules": return ["torch" in sys.modules]
    if what == "main": return [sys.modules["__main__"].__dict__.get("__file__") is None]
    if what == "exit handler": atexit.register(lambda: open(completions[1], "w").write("clean")); return [0]
    raise KeyError(what)

def helper(completions):
    raise ValueError("no such row: 12")

async def later(completions):
    await asyncio.sleep(0.01)
    return [len(text) for text in completions]

loops = []
async def client(completions):
    loops.append(asyncio.get_running_loop())
    return [loops[0] is loops[-1]]
'''


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "acts.py"
    path.write_text(SOURCE)
    return path


def new_worker(source, function="act", timeout_s=10.0, **kwargs):
    return RewardWorker(name="acts", function=f"{source}:{function}", timeout_s=timeout_s, **kwargs)


@pytest.fixture(scope="module")
def worker(source):
    worker = new_worker(source)
    yield worker
    worker.close()


@pytest.fixture
def quick(source):
    """Its calls may take half a second."""
    worker = new_worker(source, timeout_s=0.5)
    yield worker
    worker.close()


def act(worker, *completions):
    return worker.call({"completions": list(completions)})


def alive(pid):
    try:
        with open(f"/proc/{int(pid)}/stat") as stat:
            return stat.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def gone(pid, within_s=3.0):
    end = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_one_process_serves_all_calls_and_keeps_state(worker):
    first, second = act(worker, "count")[0], act(worker, "count")[0]
    assert second == first + 1
    (pid,) = act(worker, "pid")
    assert pid != os.getpid() and act(worker, "pid") == [pid]


def test_numbers_of_all_kinds_become_floats(worker):
    result = act(worker, "numbers")
    assert result[:9] == [1.0, 2.5, 1.0, None, 0.5, 3.0, 4.0, 0.5, float("inf")] and result[9] != result[9]
    assert all(value is None or type(value) is float for value in result)
    assert act(worker, "array") == [1.0, 2.0]


def test_other_values_are_described_not_converted(worker):
    assert act(worker, "foreign") == [
        Foreign(type_name="str", text="'text'"), Foreign(type_name="list", text="[1]"),
        Foreign(type_name="complex", text="1j")]
    assert act(worker, "scalar") == Foreign(type_name="float", text="1.0")
    assert act(worker, "generator").type_name == "generator"


def test_worker_imports_no_torch_and_no_main_of_the_parent(worker):
    assert act(worker, "modules") == [0.0]
    assert act(worker, "main") == [1.0]


def test_async_function(source):
    worker = new_worker(source, "later")
    try:
        assert act(worker, "abc", "") == [3.0, 0.0]
    finally:
        worker.close()


def test_what_an_async_function_keeps_between_calls_still_has_its_loop(source):
    worker = new_worker(source, "client")
    try:
        assert act(worker, "a") == act(worker, "b") == [1.0]
    finally:
        worker.close()


def test_exception_arrives_with_type_message_and_the_users_traceback(worker):
    with pytest.raises(RewardCallError) as caught:
        act(worker, "raise")
    message = str(caught.value)
    assert message.startswith("reward 'acts' (") and "acts.py:act) raised ValueError: no such row: 12" in message
    assert "in act\n" in message and "in helper\n" in message and "serving.py" not in message
    assert not isinstance(caught.value, RewardTimeoutError)
    assert act(worker, "array") == [1.0, 2.0]  # the process lives on


def test_sys_exit_is_an_exception(worker):
    with pytest.raises(RewardCallError, match="raised SystemExit: bye"):
        act(worker, "sys.exit")


def test_time_out_kills_and_the_next_call_works(quick):
    (pid,) = act(quick, "pid")
    began = time.monotonic()
    with pytest.raises(RewardTimeoutError, match=r"reward 'acts' .*the call took longer than 0.5 s .* raise timeout_s"):
        act(quick, "sleep")
    assert 0.5 <= time.monotonic() - began < 3
    assert gone(pid, within_s=0)
    assert act(quick, "count") == [1.0]  # a fresh module


def test_time_out_kills_what_the_function_started(quick, tmp_path):
    note = tmp_path / "pid"
    with pytest.raises(RewardTimeoutError):
        act(quick, "child", str(note))
    assert gone(int(note.read_text()))


@pytest.mark.parametrize("way, said", [("_exit", "exited with code 7"), ("segfault", "was killed by SIGSEGV")])
def test_death_is_a_named_error_and_the_next_call_works(worker, way, said):
    with pytest.raises(RewardCallError, match=f"reward 'acts' .*: its worker process {said} during the call") as caught:
        act(worker, way)
    assert not isinstance(caught.value, RewardTimeoutError)
    assert act(worker, "count") == [1.0]


def test_a_forked_child_that_holds_the_connection_cannot_hang_a_call(quick):
    with pytest.raises(RewardCallError):
        act(quick, "fork and die")
    assert act(quick, "count") == [1.0]


def test_death_between_calls_starts_another(worker, caplog):
    (pid,) = act(worker, "pid")
    os.kill(int(pid), 9)
    os.waitid(os.P_PID, int(pid), os.WEXITED | os.WNOWAIT)  # until it can be waited for, which is left to the worker
    assert act(worker, "count") == [1.0]
    assert "was killed by SIGKILL between calls" in caplog.text


def test_loading_errors_surface_at_start(source, tmp_path):
    with pytest.raises(RewardError, match=r"reward 'acts' .*cannot be loaded: .* no 'atc' \(did you mean 'act'\?\)"):
        new_worker(source, "atc").start()
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    with pytest.raises(RewardError, match="loading took longer than 0.6 s") as caught:
        new_worker(tmp_path / "slow.py", timeout_s=0.1, startup_timeout_s=0.6).start()
    assert not isinstance(caught.value, RewardCallError)  # on_error: abstain must not swallow it


def test_slow_loading_is_not_charged_to_the_call(tmp_path):
    (tmp_path / "slow.py").write_text("import time; time.sleep(0.5)\ndef f(): return [1]")
    worker = RewardWorker(name="slow", function=f"{tmp_path / 'slow.py'}:f", timeout_s=0.4)
    try:
        assert worker.call({}) == [1.0]
    finally:
        worker.close()


FIRST = """
import time
calls = []

def act(seconds):
    calls.append(0)
    time.sleep(seconds[min(len(calls), len(seconds)) - 1])
    return [len(calls)]
"""


@pytest.mark.parametrize("seconds, answer", [([0.0], [1.0]), ([0.8, 0.0], [2.0])])
def test_a_first_call_may_load_a_model_and_is_made_again_if_it_took_longer_than_a_call_may(tmp_path, seconds, answer):
    (tmp_path / "first.py").write_text(FIRST)
    worker = new_worker(tmp_path / "first.py", timeout_s=0.4, startup_timeout_s=10)
    try:
        assert worker.first_call({"seconds": seconds}) == answer
    finally:
        worker.close()


@pytest.mark.parametrize("seconds, limit", [([0.8, 0.8], "0.4"), ([60.0], "2")])
def test_a_function_that_is_always_slow_or_hangs_does_not_pass_its_first_call(tmp_path, seconds, limit):
    (tmp_path / "first.py").write_text(FIRST)
    worker = new_worker(tmp_path / "first.py", timeout_s=0.4, startup_timeout_s=2)
    try:
        with pytest.raises(RewardTimeoutError, match=f"the call took longer than {limit} s"):
            worker.first_call({"seconds": seconds})
    finally:
        worker.close()


def test_a_worker_finds_what_lies_beside_its_file_and_not_what_lies_beside_a_hook_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(loading, "_folders", [])
    for folder, value in (("hook", 1), ("rewards", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helpers.py").write_text(f"value = {value}")
        (tmp_path / folder / "file.py").write_text(
            "def f(completions):\n    from helpers import value\n    return [value]")  # imported late
    load_function(f"{tmp_path}/hook/file.py:f")
    worker = new_worker(tmp_path / "rewards" / "file.py", "f")
    try:
        assert act(worker, "a") == [2.0]
    finally:
        worker.close()


def test_close_runs_exit_handlers_and_ends_the_process(source, tmp_path):
    worker = new_worker(source)
    (pid,) = act(worker, "pid")
    act(worker, "exit handler", str(tmp_path / "note"))
    worker.close()
    worker.close()
    assert gone(pid, within_s=0) and (tmp_path / "note").read_text() == "clean"


def test_worker_of_a_script_without_main_guard_ends_with_it_even_when_busy(source, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(f"""
        import os, signal, threading, time
        from frpo.rewards.worker import RewardWorker
        print("started", flush=True)
        worker = RewardWorker(name="acts", function="{source}:act", timeout_s=60)
        print(int(worker.call({{"completions": ["pid"]}})[0]), flush=True)
        threading.Thread(target=worker.call, args=({{"completions": ["sleep"]}},), daemon=True).start()
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
        """))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=20,
                          env={**os.environ, "PYTHONPATH": os.getcwd()})
    started, pid = done.stdout.split()  # "started" once: the worker did not run the script again
    assert started == "started" and done.returncode == -9
    assert gone(int(pid))
