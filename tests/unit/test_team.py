"""Ranks that wait for rank 0 end with it, and a rank that hangs ends itself with a message."""
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from frpo.cluster.launcher import INTERFACE, LAUNCHER
from frpo.cluster.team import ending_after

RANK = """
import sys
from frpo.cluster import team
from frpo.config.loader import load_recipe

recipe = load_recipe("smoke", ["learner.startup_timeout_s=20"])
team.meet(recipe)
print("met", flush=True)
if team.follows():
    sys.exit(team.follow(recipe))
sys.stdin.readline()
"""


ALONE = """
import os
from frpo.cluster.team import TeamRanks
from frpo.config.loader import load_recipe

before = dict(os.environ)
for _ in range(2):
    ranks = TeamRanks(load_recipe("smoke", []), "cpu")
    assert ranks.call("look", "host", [()], {}, 10.0) == ["127.0.0.1"]
    ranks.close()
    print({name for name in os.environ if os.environ[name] != before.get(name)})
"""


def rank(number: int, port: int) -> subprocess.Popen:
    environ = {**os.environ, "RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number),
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.Popen([sys.executable, "-c", RANK], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


@pytest.mark.timeout(120)
def test_a_rank_waits_while_rank_0_is_busy_and_ends_when_rank_0_dies():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    follower, first = rank(1, port), rank(0, port)  # the follower waits for a store that is not there yet
    try:
        assert first.stdout.readline() == follower.stdout.readline() == "met\n"
        time.sleep(1)
        assert follower.poll() is None
        first.send_signal(signal.SIGKILL)
        _, told = follower.communicate(timeout=30)
        assert follower.returncode == 2
        assert "frpo: rank 1: EngineError: rank 0 has ended, or its machine is out of reach" in told
    finally:
        for process in (first, follower):
            process.kill()
            process.communicate()


@pytest.mark.timeout(60)
def test_rank_0_that_never_comes_is_told():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(port), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-m", "frpo", "train", "smoke", "learner.startup_timeout_s=3"], env=environ,
                          capture_output=True, text=True, timeout=50)
    assert done.returncode == 2
    assert f"the ranks of the launcher cannot meet at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT): " in done.stderr


HANG = """
import ctypes, sys, time
from frpo.cluster import team

team.GRACE_S = 1.0
with team.ending_after(0.5, "rank 3: learner load: no end within 0.5 s"):
    if sys.argv[1] == "native":
        ctypes.PyDLL(None).sleep(30)  # keeps Python's threads from running
    time.sleep(30)
"""


@pytest.mark.parametrize("how, code, told", [
    ("python", 2, "frpo: EngineError: rank 3: learner load: no end within 0.5 s"), ("native", 1, "Timeout (0:00:01")])
def test_a_rank_that_hangs_ends_with_its_stack(how, code, told):
    done = subprocess.run([sys.executable, "-c", HANG, how], capture_output=True, text=True, timeout=25)
    assert done.returncode == code
    assert told in done.stderr and 'File "<string>", line' in done.stderr


def test_a_call_that_ends_in_time_ends_nothing():
    with ending_after(0.2, "late"):
        pass
    time.sleep(0.4)


@pytest.mark.timeout(60)
def test_a_team_of_one_leaves_no_launcher_behind():
    """Later runs of the process would take it for a rank of a launcher."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=50)
    left = set(re.findall(r"'(\w+)'", done.stdout))
    assert done.returncode == 0 and not left & {*LAUNCHER, INTERFACE}, done.stdout + done.stderr
