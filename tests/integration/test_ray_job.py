"""`ray_job` for real: an installed wheel, another directory, a cluster of `ray start`; logs, exit codes, no orphans.

The launcher and the cluster run in an environment made here, which has the wheel and the packages of this one but not
the checkout. What needs no cluster is in tests/unit/test_launcher_ray_job.py.
"""
from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

CHECKOUT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef0123456789abcdef"
LAUNCHER = ("-m", "frpo.launchers.ray_job")

REWARD = """
import frpo
import helper

print(helper.SAYS, frpo.__file__, flush=True)

def spread(completions, **columns):
    return [sum(map(ord, completion)) % 2 for completion in completions]

def broken(completions, **columns):
    raise ValueError("no value for this")
"""

SMALL = ("model.tiny.hidden_size=64", "model.tiny.num_heads=2", "model.tiny.num_layers=2",
         "model.tiny.warm_start.steps=0", "data.heldout=8", "evaluate.samples=1", "rollout.prompts_per_step=8",
         "rollout.group_size=4", "run.num_steps=2", "learner.num_ranks=1")

RUN = ("-m frpo train", "frpo.rewards.serving", "EngineActor", "LearnerActor")
"""What the processes of a run are called: its driver, a reward's, an engine's, a rank's."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Ray of one node: where its job server and its head answer, and the folder of all its files."""

    python: Path
    address: str
    head: str
    folder: Path
    environment: dict[str, str]

    def job_processes(self) -> dict[int, str]:
        """pid -> command line of every process in the folder of a job, wherever it stands in the process tree."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended, or is not ours
                if Path(os.readlink(process / "cwd")).is_relative_to(self.folder):
                    found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def job(self, name: str) -> dict:
        """What the job server knows of a job."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        request = urllib.request.Request(f"{self.address}/api/jobs/{name}", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of a new environment with the wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: a build leaves files behind, and packs those of an earlier one
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(CHECKOUT / name, source)
    for name in ("frpo", "recipes", "ds_configs", "launchers"):
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    call([*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder, source], folder)
    call([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
    python = folder / "venv" / "bin" / "python"
    packages = Path(call([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    # As plain paths, so that the .pth file of an editable frpo among them has no effect.
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    wheel, = folder.glob("frpo-*.whl")
    call([*pip, "--python", python, "install", "--no-index", "--no-deps", wheel], folder)
    return python


@pytest.fixture(scope="module")
def cluster(python) -> Iterator[Cluster]:
    # Ray's sockets lie in the folder and their paths may not exceed 107 characters: pytest's own folders are too deep.
    folder = Path(tempfile.mkdtemp(prefix="frpo-ray-")).resolve()
    (folder / "token").write_text(TOKEN)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHON"))}
    # Workers are nice by default, and starve beside whatever else runs on the machine.
    environment |= {"RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_worker_niceness": "0",
                    "RAY_raylet_start_wait_time_s": "180"}
    port, jobs, agent, clients = free_ports(4)
    command = [python, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--num-cpus=2",
               "--dashboard-host=127.0.0.1", f"--dashboard-port={jobs}", f"--dashboard-agent-listen-port={agent}",
               f"--ray-client-server-port={clients}", "--min-worker-port=0", "--max-worker-port=0",
               f"--temp-dir={folder / 'ray'}", "--disable-usage-stats"]
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=python.parent,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))  # as `... &` does
    try:
        until(lambda: answers(f"http://127.0.0.1:{jobs}"), 120, head)
        yield Cluster(python=python, address=f"http://127.0.0.1:{jobs}", head=f"127.0.0.1:{port}",
                      folder=folder / "ray", environment=environment)
    finally:
        tree = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
        for process in tree:
            process.kill()
        head.wait(30)
        psutil.wait_procs(tree, 30)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def elsewhere(tmp_path):
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "rewards.py").write_text(REWARD)
    (tmp_path / "helper.py").write_text('SAYS = "rewards with"\n')
    return tmp_path


@pytest.mark.timeout(240)
def test_a_recipe_is_trained_and_its_log_followed(cluster, elsewhere):
    assert not cluster.job_processes()
    code, log, seen, early = launch(cluster, elsewhere, "spread", "run.dir=runs/first")
    assert code == 0, log
    home = cluster.python.parents[1]
    imported, = [line.split(" with ")[1] for line in log.splitlines() if line.startswith("rewards with")]
    assert Path(imported).is_relative_to(home)
    assert "rewards with" in early and "step 2/2" not in early
    assert [line.split("|")[0].strip() for line in log.splitlines() if line.startswith("step ")] == [
        "step 0/2", "step 1/2", "step 2/2"]
    assert "ray_job: job smoke-" in log and "files sent: my/rewards.py, helper.py" in log
    rows = [json.loads(line) for line in (elsewhere / "runs" / "first" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[2]["policy/version"] == 2
    assert (elsewhere / "runs" / "first" / "export" / "config.json").is_file()
    assert seen == set(RUN)
    assert nothing_left(cluster)


@pytest.mark.timeout(240)
def test_a_run_that_fails_gives_its_message_and_its_exit_code(cluster, elsewhere):
    code, log, seen, _ = launch(cluster, elsewhere, "broken", "run.dir=runs/second")
    assert code == 2, log
    assert "frpo: RewardCallError: reward 'a' (my/rewards.py:broken) raised ValueError: no value for this" in log
    assert RUN[0] in seen
    assert nothing_left(cluster)


@pytest.mark.timeout(240)
def test_an_interrupt_stops_the_job_and_leaves_one_that_nobody_waits_for(cluster, elsewhere):
    left = submitted(cluster, elsewhere, f"rewards=[{{name: a, function: '{elsewhere}/none.py:f'}}]")
    # Longer than anyone waits, so that it cannot end before it is interrupted.
    endless = ("run.dir=runs/third", "run.num_steps=100000", "telemetry.traces=false")
    code, log, seen, _ = launch(cluster, elsewhere, "spread", *endless, interrupt_at=set(RUN))
    assert code == 130, log
    assert seen == set(RUN)
    assert "frpo: interrupted" in log and log.endswith("ray_job: the job stopped\n")
    assert cluster.job(log.split("ray_job: job ")[1].split(" ")[0])["status"] == "STOPPED"
    until(lambda: cluster.job(left)["status"] == "FAILED", 60)
    assert cluster.job(left)["driver_exit_code"] == 2
    assert f"there is no file {elsewhere}/none.py" in cluster.job(left)["message"]
    assert nothing_left(cluster)


@pytest.mark.timeout(120)
def test_a_wrong_token_is_one_message(cluster, elsewhere):
    done = subprocess.run([cluster.python, *LAUNCHER, "smoke", "--address", cluster.address], cwd=elsewhere,
                          env=cluster.environment | {"RAY_AUTH_TOKEN": TOKEN[::-1]},
                          capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"ray_job: EngineError: the cluster at {cluster.address} refuses access: "
                                  "Authentication failed: Forbidden: Invalid authentication token; its token is in")
    assert done.stderr.count("\n") == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("script, expected", [
    ("with ray_session(): print(int(ray.cluster_resources()['CPU']), os.environ.get('RAY_AUTH_MODE'))", "2 token"),
    ("del os.environ['RAY_AUTH_TOKEN_PATH']; show_token(); print(os.environ.get('RAY_AUTH_MODE'))", "None")])
def test_a_session_joins_with_the_token_that_there_is(cluster, tmp_path, script, expected):
    """Ray itself fails after 20 s where it does not look for the token, and aborts where it wants one that is not."""
    code = f"import os, ray\nfrom frpo.cluster.runtime import ray_session, show_token\n{script}"
    environment = cluster.environment | {"RAY_ADDRESS": cluster.head, "HOME": str(tmp_path)}
    assert call([cluster.python, "-c", code], tmp_path, environment).splitlines()[-1] == expected


def launch(cluster: Cluster, folder: Path, reward: str, *overrides: str, interrupt_at: set[str] | None = None
           ) -> tuple[int, str, set[str], str]:
    """Run the launcher on `smoke` in `folder`. Interrupts it once the processes of `interrupt_at` are there.

    Returns its exit code; all it printed; which processes of RUN were seen meanwhile; what it had printed when they
    were first all there.
    """
    rewards = f"rewards=[{{name: a, function: 'my/rewards.py:{reward}'}}]"
    command = [cluster.python, *LAUNCHER, "smoke", *SMALL, rewards, *overrides, "--upload", "helper.py"]
    environment = cluster.environment | {"RAY_ADDRESS": cluster.address}
    log, seen, early = folder / "launcher.log", set(), ""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=environment)
    try:
        while process.poll() is None:
            now = {name for name in RUN if any(name in line for line in cluster.job_processes().values())}
            seen |= now
            if now == set(RUN) and process.poll() is None:
                early = early or log.read_text()
            if interrupt_at is not None and now >= interrupt_at:
                process.send_signal(signal.SIGINT)
                interrupt_at = None
            time.sleep(0.3)
    finally:
        process.kill()
    return process.wait(), log.read_text(), seen, early


def submitted(cluster: Cluster, folder: Path, *overrides: str) -> str:
    """The id of a job that nobody waits for."""
    command = [cluster.python, *LAUNCHER, "smoke", "--no-wait", "--address", cluster.address, *overrides]
    done = subprocess.run(command, env=cluster.environment, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    assert job.startswith("smoke-") and f"ray_job: job {job} at {cluster.address}" in done.stderr
    return job


def nothing_left(cluster: Cluster) -> bool:
    """Whether all processes of jobs are gone, or go within seconds: Ray ends idle workers a moment after their job."""
    until(lambda: not cluster.job_processes(), 20)
    return True


def until(condition: Callable[[], bool], seconds: float, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"{process.args} ended with {process.returncode}"
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.2)


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=5)
    except urllib.error.HTTPError as error:
        return error.code == 401  # it is up, and wants its token
    except OSError:
        return False
    return True


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def call(command: list, folder: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
