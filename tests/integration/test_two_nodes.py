"""A run over two machines computes what one machine computes, and outlives a cut cable and the loss of a machine.

The machines are namespaces of this one (`nodes`): they share the disk, but neither the network nor /dev/shm.
"""
from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

import frpo
from nodes import Machine, cluster, machines, until, why_not
from runs import LONG, STEPS, lines, metrics, overrides_of

pytestmark = [pytest.mark.skipif(why_not() is not None, reason=f"no machines beside this one: {why_not()}"),
              pytest.mark.timeout(400)]
LAUNCHER = Path(__file__).parents[2] / "launchers" / "ray_job.py"
CUT_S = 6.0
"""Shorter than the time after which Ray takes a node for dead."""

SPREAD = ("learner.num_ranks=2", "placement.learner_hosts=[192.168.7.1,192.168.7.2]",
          "placement.engine_hosts=[192.168.7.2]")


@pytest.fixture(scope="module")
def cluster_of_two(tmp_path_factory):
    """(the two machines, one beside the cluster, the environment of a driver). `na` has the job server."""
    folder = tmp_path_factory.mktemp("nodes")
    with machines(folder, "na", "nb", "nc") as (na, nb, nc), \
            cluster(folder, [na, nb], "--include-dashboard=true", f"--dashboard-host={na.address}") as environ:
        yield na, nb, nc, environ


def started(na: Machine, folder: Path, environ: dict[str, str], *more: str):
    return na.start(["frpo", "train", "smoke", *overrides_of(folder), *SPREAD, *more], folder.with_suffix(".log"),
                    environ)


def text_of(folder: Path) -> str:
    return folder.with_suffix(".log").read_text(encoding="utf-8")


def test_ranks_and_engine_on_two_nodes_compute_what_one_node_computes(cluster_of_two, alone):
    na, _, _, environ = cluster_of_two
    folder = alone.parent / "two_nodes"
    assert started(na, folder, environ).wait(timeout=200) == 0, text_of(folder)[-3000:]
    assert metrics(folder) == metrics(alone)
    for name in ("traces.jsonl", "export/model.safetensors"):
        assert (folder / name).read_bytes() == (alone / name).read_bytes(), name
    logs = {path.name: path.read_text(encoding="utf-8").splitlines()[0] for path in (folder / "logs").iterdir()}
    assert {name: line.split()[-1] for name, line in logs.items()} == {
        "learner_rank_0.log": "na", "learner_rank_1.log": "nb", "rollout_engine_0.log": "nb"}


@LONG
def test_a_job_from_a_machine_outside_of_the_cluster_whose_cable_is_cut_for_a_while(cluster_of_two, alone):
    """The launcher is on `nc`, ranks and engine are on `na` and `nb`. In a step nb is out of reach for CUT_S."""
    na, nb, nc, environ = cluster_of_two
    folder = alone.parent / "job"
    process = nc.start(["python", str(LAUNCHER), "smoke", *overrides_of(folder), *SPREAD], folder.with_suffix(".log"),
                       environ | {"RAY_ADDRESS": f"http://{na.address}:8265"})
    until(lambda: len(lines(folder / "metrics.jsonl")) == 3 or process.poll() is not None, 200)
    assert process.poll() is None, text_of(folder)[-3000:]
    nb.cable("down")
    time.sleep(CUT_S)
    assert len(lines(folder / "metrics.jsonl")) <= 4  # nothing moves without nb
    nb.cable("up")
    assert process.wait(timeout=200) == 0, text_of(folder)[-3000:]
    assert "starting again" not in text_of(folder)
    assert metrics(folder) == metrics(alone)


CHECK = """
import sys
from pathlib import Path
from frpo.cluster import node_check
from frpo.cluster.placement import known_nodes
from frpo.cluster.runtime import ray_session
from frpo.errors import FrpoError
from frpo.held import held_folder

node_check.LATE_S = 1.0
with ray_session(), held_folder(Path(sys.argv[1])):
    for address in sys.argv[2:]:
        try:
            node_check.check_nodes({known_nodes()[address]}, Path(sys.argv[1]), "no model")
            print("fine")
        except FrpoError as error:
            print(error)
"""


def test_a_node_that_does_not_see_the_run_or_has_another_frpo_is_refused_by_name(cluster_of_two, tmp_path):
    na, nb, _, environ = cluster_of_two
    run = tmp_path / "runs" / "x"
    run.parent.mkdir()
    another, package = tmp_path / "another", Path(frpo.__file__).parent
    shutil.copytree(package, another)
    (another / "types.py").write_text((another / "types.py").read_text() + "# changed\n")

    def told() -> str:
        done = na.run("python", "-c", CHECK, str(run), nb.address, environ=environ, timeout=100)
        return done.stdout.splitlines()[-1] if done.returncode == 0 else done.stderr

    assert told() == "fine"
    assert nb.run("mount", "-t", "tmpfs", "tmpfs", str(run.parent)).returncode == 0
    assert told() == (f"node nb (192.168.7.2) does not see {run} (run.dir) as this node does; put it on a disk that "
                      "all nodes share, at the same path")
    assert nb.run("umount", str(run.parent)).returncode == 0
    assert nb.run("mount", "--bind", str(another), str(package)).returncode == 0
    assert told() == ("node nb (192.168.7.2) and this node differ in the source files of frpo; install the same "
                      "packages on every node")
    assert nb.run("umount", str(package)).returncode == 0


@LONG
def test_a_lost_node_ends_nothing(cluster_of_two, alone):
    """The last test: it kills a machine, with a rank and the engine, in the middle of a step."""
    na, nb, _, environ = cluster_of_two
    folder = alone.parent / "lost"
    process = started(na, folder, environ)
    until(lambda: len(lines(folder / "metrics.jsonl")) == 4 or process.poll() is not None, 150)
    assert process.poll() is None, text_of(folder)[-3000:]
    nb.kill()
    assert process.wait(timeout=200) == 0, text_of(folder)[-3000:]
    assert "its node nb (192.168.7.2) is gone" in text_of(folder)
    assert "the run goes on without 192.168.7.2, which is gone" in text_of(folder)
    assert len(metrics(folder)) == STEPS + 1 and metrics(folder) == metrics(alone)
