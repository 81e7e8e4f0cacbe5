"""Output of an actor goes to its file, native code's too, and its last lines are quoted when it has died."""
import subprocess
import sys

from frpo.cluster.actor_logs import last_lines
from frpo.cluster.runtime import NamedActor, Node

ACTOR = """
import os, sys
from frpo.cluster.actor_logs import begin_in

begin_in(sys.argv[1], sys.argv[2])
print("from python")
os.write(2, b"from native code\\n")
print(os.getcwd(), flush=True)
"""


def test_an_actor_begins_in_the_drivers_folder_and_writes_into_its_log(tmp_path):
    log = tmp_path / "logs" / "rollout_engine_0.log"
    for _ in range(2):  # a second process adds to the file
        done = subprocess.run([sys.executable, "-c", ACTOR, str(tmp_path), str(log)], capture_output=True, text=True,
                              timeout=60)
        assert (done.stdout, done.returncode) == ("", 0)
    lines = log.read_text(encoding="utf-8").splitlines()
    written = sorted(line for line in lines if not line.startswith("---"))
    assert written == sorted(["from native code", "from python", str(tmp_path)] * 2)
    assert sum(line.startswith("--- ") and " on " in line for line in lines) == 2


def test_the_last_lines_are_part_of_the_cause(tmp_path):
    log = tmp_path / "a.log"
    log.write_text("".join(f"line {number}\n\n" for number in range(5000)) + "x" * 5000, encoding="utf-8")
    assert last_lines(str(log)) == [*(f"line {number}" for number in range(4993, 5000)), "x" * 300]
    actor = NamedActor(name="engine", handle=None, log_path=str(log))
    assert actor.cause_of_death(RuntimeError("it died\nmore")).startswith("it died Its last lines:\n    line 4993\n")
    without = NamedActor(name="engine", handle=None, log_path="nowhere")
    assert without.cause_of_death(RuntimeError("it died")) == "it died"


def test_a_lost_node_is_the_cause(tmp_path, monkeypatch):
    monkeypatch.setattr("frpo.cluster.runtime.known_nodes", lambda: {"10.0.0.1": "id", "10.0.0.2": None})
    causes = [NamedActor(name="rank", handle=None, log_path="nowhere", node=Node(name="n", address=address))
              .cause_of_death(RuntimeError("it died")) for address in ("10.0.0.1", "10.0.0.2")]
    assert causes == ["it died", "its node n (10.0.0.2) is gone (power, network, or a Ray that has ended there)"]
