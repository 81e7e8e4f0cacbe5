"""The Slurm launcher for real, on a private Slurm of two nodes: exit codes, no orphans, stopped and requeued.

What needs no Slurm is in tests/unit/test_launcher_slurm.py.
"""
from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from runs import LONG, REWARD, lines, metrics, overrides_of
from slurm_cluster import PREEMPTION, Slurm, running, until, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

LAUNCHER = Path(__file__).parents[2] / "launchers" / "slurm.py"

SLOW = "import time\n\n" + REWARD.replace(":\n    return [sum", ":\n    time.sleep(0.3)\n    return [sum")
"""Steps last long enough to be interrupted."""

BROKEN = """
def spread(completions, **columns):
    raise ValueError("no value for this")

def dear(completions, **columns):
    return [0.0] * len(completions)
"""

RUN = ("raylet/raylet", "gcs_server", "-m frpo train", "EngineActor", "LearnerActor")
"""What the processes of a job are called: Ray's own, a run's driver, an engine's, a rank's."""


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A launcher that follows its job."""

    process: subprocess.Popen
    slurm: Slurm
    folder: Path
    """run.dir of the job's run."""

    def told(self) -> str:
        return self.folder.with_suffix(".out").read_text()

    def number(self) -> str:
        until(lambda: "; log: " in self.told(), 60, self.process)
        return self.told().split("slurm: job ")[1].split(";")[0]

    def until_processes(self, *names: str) -> None:
        number = self.number()
        until(lambda: all(any(name in line for line in self.slurm.processes(number).values()) for name in names), 150,
              self.process)

    def finish(self) -> int:
        return self.process.wait(timeout=200)

    def nothing_left(self) -> bool:
        """Whether processes, temporary files and the token go, in the seconds that Slurm takes to end a job."""
        number = self.number()
        until(lambda: not self.slurm.processes(number), 40)
        until(lambda: not Path(f"/tmp/frpo-{number}").exists(), 5)
        return not self.private().exists()

    def private(self) -> Path:
        return self.folder / "slurm" / f".private-{self.number()}"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with running() as slurm:
        yield slurm


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("of slurm")  # paths with spaces
    (place / "reward.py").write_text(SLOW)
    return place


def training(slurm: Slurm, folder: Path) -> list[str]:
    """Overrides of a small run with its ranks on the first node and its engine on the second."""
    return [*overrides_of(folder), f"placement.engine_hosts=[{slurm.nodes[1].address}]"]


def launch(slurm: Slurm, folder: Path, *arguments: str, recipe: str = "smoke", minutes: str = "20") -> Launched:
    command = ["env", "-C", str(folder.parent), sys.executable, str(LAUNCHER), recipe, *arguments, "--nodes", "2",
               "--time", minutes]
    with folder.with_suffix(".out").open("w") as output:
        process = subprocess.Popen(slurm.nodes[0].inside(command), stdout=output, stderr=subprocess.STDOUT,
                                   env=dict(slurm.environment))
    return Launched(process=process, slurm=slurm, folder=folder)


@pytest.fixture(scope="module")
def requeued(slurm, place) -> Mapping[str, object]:
    """A run that is stopped before its end and requeued; who knew its token, and how far it had come."""
    launched = launch(slurm, place / "stopped", *training(slurm, place / "stopped"))
    launched.until_processes(*RUN)
    token = (launched.private() / "token").read_bytes()
    modes = [oct(path.stat().st_mode & 0o777) for path in (launched.private(), launched.private() / "token")]
    knowing = [path for process in Path("/proc").glob("[0-9]*") for path in (process / "cmdline", process / "environ")
               if token in contents(path)]
    until(lambda: len(lines(launched.folder / "metrics.jsonl")) > 1, 200, launched.process)
    number = launched.number()
    slurm.command("scancel", "--batch", "--signal=USR1", number)
    until(lambda: slurm.job(number)["JobState"] == "PENDING", 100, launched.process)
    reached, gone = len(metrics(launched.folder)), launched.nothing_left()
    time.sleep(2)  # Slurm starts no job again in the second in which it has ended ("credential revoked")
    slurm.command("scontrol", "update", f"JobId={number}", "StartTime=now")
    return {"launched": launched, "code": launched.finish(), "token": token, "modes": modes, "knowing": knowing,
            "reached": reached, "gone": gone}


def contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has just ended, or is not ours
        return b""


@pytest.mark.timeout(400)
def test_a_run_over_two_nodes_that_is_stopped_and_requeued_computes_what_one_left_alone_does(requeued, alone):
    """`alone` is the same run on one node without Slurm."""
    launched, number = requeued["launched"], requeued["launched"].number()
    assert requeued["code"] == 0, launched.told()[-3000:]
    assert launched.told().count("slurm: 2 of 2 nodes joined Ray\n") == 2
    assert 1 < requeued["reached"] < 7 and requeued["gone"]
    assert "slurm: stopped for now; requeueing the job\n" in launched.told()
    job = launched.slurm.job(number)
    assert (job["Restarts"], job["ExitCode"]) == ("1", "0:0")
    assert f"job {number} running on n[1-2], start 2" in launched.told() and launched.told().count("step 6/6 ") == 1
    assert metrics(launched.folder) == metrics(alone)
    assert launched.nothing_left()
    assert {path.suffix for path in (launched.folder / "slurm").iterdir()} == {".log", ".sbatch", ".yaml"}


@pytest.mark.timeout(300)
def test_nobody_but_its_file_tells_the_token(requeued):
    assert len(requeued["token"]) == 64 and requeued["modes"] == ["0o700", "0o600"]
    assert requeued["knowing"] == []
    files = [path for path in (requeued["launched"].folder / "slurm").rglob("*") if path.is_file()]
    assert files and not [path for path in files if requeued["token"] in path.read_bytes()]


@pytest.mark.timeout(300)
def test_a_run_that_fails_gives_its_exit_code_and_keeps_the_logs(slurm, place):
    (place / "broken").mkdir()
    (place / "broken" / "reward.py").write_text(BROKEN)
    folder = place / "broken" / "run"
    launched = launch(slurm, folder, *training(slurm, folder))
    launched.until_processes(*RUN[:3])
    assert launched.finish() == 2, launched.told()[-3000:]
    assert "RewardCallError: reward 'spread'" in launched.told()
    assert f"slurm: exit code 2; Ray's logs of each node: {folder}/slurm/" in launched.told()
    assert launched.slurm.job(launched.number())["ExitCode"] == "2:0"
    assert launched.nothing_left()
    logs = folder / "slurm" / f"{launched.number()}.ray"
    assert all((logs / f"{node}.log").is_file() for node in ("n1", "n2"))
    assert next(logs.glob("n?/raylet.out"), None)


@pytest.mark.timeout(300)
def test_a_cancelled_job_leaves_nothing(slurm, place):
    launched = launch(slurm, place / "cancelled", *training(slurm, place / "cancelled"), "run.num_steps=100000",
                      "learner.num_ranks=1")
    until(lambda: lines(launched.folder / "metrics.jsonl"), 200, launched.process)
    launched.until_processes(*RUN)
    slurm.command("scancel", launched.number())
    assert launched.finish() == 130, launched.told()[-3000:]
    assert launched.told().endswith("slurm: the job was cancelled\n")
    assert launched.nothing_left()


@LONG  # Slurm counts time limits in minutes
@pytest.mark.timeout(600)
def test_slurm_itself_stops_a_run_before_its_time_limit(slurm, place, alone):
    """One minute before the limit; steps are slow, so that the run needs a second start."""
    (place / "limited").mkdir()
    (place / "limited" / "reward.py").write_text(SLOW.replace("sleep(0.3)", "sleep(1.5)"))
    folder = place / "limited" / "run"
    launched = launch(slurm, folder, *training(slurm, folder), "--signal-before", "60", minutes="2")
    number = launched.number()
    until(lambda: slurm.job(number)["Restarts"] == "1" and slurm.job(number)["JobState"] == "PENDING", 200,
          launched.process)
    assert 0 < len(metrics(folder)) < 7 and launched.nothing_left()
    time.sleep(2)
    slurm.command("scontrol", "update", f"JobId={number}", "StartTime=now", "TimeLimit=20")
    assert launched.finish() == 0, launched.told()[-3000:]
    assert "slurm: stopped for now; requeueing the job\n" in launched.told()
    assert metrics(folder) == metrics(alone)


@LONG
@pytest.mark.timeout(600)
def test_a_job_killed_at_its_time_limit_is_gone_on_with_by_the_same_command(slurm, place, alone):
    (place / "killed").mkdir()
    (place / "killed" / "reward.py").write_text(SLOW.replace("sleep(0.3)", "sleep(5)"))
    folder = place / "killed" / "run"
    given = (*training(slurm, folder), "--signal-before", "0")
    launched = launch(slurm, folder, *given, minutes="2")
    assert launched.finish() != 0 and "slurm: the job ended by TIMEOUT\n" in launched.told(), launched.told()[-3000:]
    assert 0 < len(metrics(folder)) < 7 and launched.nothing_left()
    launched = launch(slurm, folder, *given)
    assert launched.finish() == 0, launched.told()[-3000:]
    assert metrics(folder) == metrics(alone)


@LONG
@pytest.mark.timeout(600)
def test_a_job_goes_on_without_a_node_that_is_lost(place, alone):
    """The engine's node: a new engine starts on the first one. A Slurm of its own, since the node does not return."""
    with running() as slurm:
        launched = launch(slurm, place / "lost", *training(slurm, place / "lost"))
        until(lambda: len(lines(launched.folder / "metrics.jsonl")) > 1, 200, launched.process)
        slurm.nodes[1].kill()
        Path(slurm.environment["SLURM_CONF"]).with_name("slurmd.n2.pid").unlink()
        assert launched.finish() == 0, launched.told()[-3000:]
        assert metrics(launched.folder) == metrics(alone)
        assert launched.nothing_left()


@LONG
@pytest.mark.timeout(600)
def test_a_preempted_job_saves_first_where_slurm_sends_it_the_signal(place, alone):
    with running(PREEMPTION) as slurm:
        launched = launch(slurm, place / "preempted", *training(slurm, place / "preempted"))
        until(lambda: len(lines(launched.folder / "metrics.jsonl")) > 1, 200, launched.process)
        number = launched.number()
        urgent = slurm.command("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive",
                               "--output=/dev/null", "--wrap=sleep 1").strip()
        until(lambda: slurm.job(number)["JobState"] == "PENDING", 100, launched.process)
        reached = len(metrics(launched.folder)) - 1
        assert "frpo: stopped after step " in launched.told() and 0 < reached < 6
        assert (launched.folder / "checkpoints" / f"step_{reached:06d}" / "COMPLETE").is_file()
        until(lambda: slurm.job(urgent)["JobState"] == "COMPLETED", 100)
        time.sleep(2)
        slurm.command("scontrol", "update", f"JobId={number}", "StartTime=now")
        assert launched.finish() == 0, launched.told()[-3000:]
        assert metrics(launched.folder) == metrics(alone)


@pytest.mark.timeout(200)
def test_srun_starts_one_rank_for_each_task(slurm, place):
    (place / "rows.jsonl").write_text("".join(f'{{"question": "{i}+1=", "answer": "{i + 1}"}}\n' for i in range(16)))
    given = [f"run.dir={place / 'tuned'}", "data.path=rows.jsonl", "learner.ranks=launcher", "model.path=null",
             "model.tiny={warm_start: {steps: 0}}", "model.max_length=64", "data.heldout=4", "data.batch_size=4",
             "run.max_steps=2", "learner.micro_batch_tokens=128"]
    launched = launch(slurm, place / "tuned", *given, recipe="finetune_gsm8k")
    launched.until_processes("-m frpo finetune")
    assert launched.finish() == 0, launched.told()[-3000:]
    assert [row["step"] for row in metrics(launched.folder)] == [0, 1, 2]
    assert launched.nothing_left()
