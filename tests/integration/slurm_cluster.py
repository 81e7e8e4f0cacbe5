"""A private Slurm for tests: its own munge key, daemons and files in one folder; two machines (`nodes`) on this one.

Not a test itself. Debian packages: slurmctld, slurmd, slurm-client, munge, and those of `nodes`.
"""
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

import nodes
from nodes import Machine

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "squeue")
NODES = ("n1", "n2")

CONF = """
ClusterName=test
SlurmctldHost={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
ReturnToService=2
KillWait=20
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
MinJobAge=300
JobRequeue=1
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE State=UP GraceTime=60 PriorityTier=1
"""
PREEMPTION = """
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10
"""
"""Lines of slurm.conf by which a job of the partition `urgent` sends main's away, after their own signal."""

NODE = "NodeName={name} NodeAddr={address} CPUs=2 RealMemory=2000 State=UNKNOWN\n"


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """A running Slurm. environment: variables with which its commands, and jobs submitted by them, run."""

    nodes: Sequence[Machine]
    environment: Mapping[str, str]

    def command(self, *arguments: str, node: int = 0) -> str:
        """Run a command on a node; return its output."""
        done = subprocess.run(self.nodes[node].inside(arguments), env=dict(self.environment), capture_output=True,
                              text=True, timeout=60)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job, by its own names."""
        shown = self.command("scontrol", "show", "job", "--oneliner", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def processes(self, number: str) -> dict[int, str]:
        """pid -> command line of every process of the job, wherever it stands in the process tree."""
        mark, found = f"SLURM_JOB_ID={number}".encode(), {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended, or is not ours
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(process.name)] = line
        return found


def why_not() -> str | None:
    """Return the reason why Slurm cannot run here, or None."""
    missing = [name for name in DAEMONS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)})"
    return nodes.why_not()


@contextmanager
def running(more: str = "") -> Iterator[Slurm]:
    """Run a private Slurm of two nodes within the context. Its daemons end by their pid files.

    more: further lines of slurm.conf.
    """
    # The socket's path may not exceed 107 characters: pytest's own folders are too deep.
    folder = Path(tempfile.mkdtemp(prefix="frpo-slurm-")).resolve()
    folder.chmod(0o755)
    for name in ("state", "munge", "log", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir()
    (folder / "munge").chmod(0o711)
    (folder / "munge" / "key").write_bytes(os.urandom(1024))
    (folder / "munge" / "key").chmod(0o600)
    munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    try:
        with nodes.machines(folder, *NODES) as made:
            lines = "".join(NODE.format(name=machine.name, address=machine.address) for machine in made)
            controller = f"{made[0].name}({made[0].address})"
            (folder / "slurm.conf").write_text(
                lines + CONF.format(folder=folder, controller=controller, nodes=",".join(NODES)) + more)
            slurm = Slurm(nodes=made, environment=_environment(folder))
            slurm.command("munged", "--force", "--num-threads=2",  # one serves all: its socket is on their common disk
                          *(f"--{option}={folder / 'munge' / name}" for option, name in munge.items()))
            slurm.command("slurmctld", "-c")
            for number in range(len(made)):
                slurm.command("slurmd", node=number)
            until(lambda: slurm.command("sinfo", "-h", "-o", "%T %D").split() == ["idle", str(len(NODES))], 60)
            yield slurm
            slurm.command("scancel", "--user", "root")
            until(lambda: not slurm.command("squeue", "-h"), 60)
            pids = [*(folder / f"slurmd.{node}.pid" for node in NODES), folder / "slurmctld.pid",
                    folder / "munge" / "pid"]
            _end([int(path.read_text()) for path in pids if path.is_file()])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def until(condition: Callable[[], object], seconds: float, process: subprocess.Popen | None = None) -> None:
    """Wait until the condition holds. process: one that must not end meanwhile."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"{process.args} ended with {process.returncode}"
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.2)


def _environment(folder: Path) -> dict[str, str]:
    """This process's variables without those of a Ray, a launcher or another Slurm."""
    ours = {key: value for key, value in os.environ.items()
            if not key.startswith(("RAY_", "SLURM_", "SBATCH_", "SRUN_", "PYTEST_"))}
    # Ray's workers are nice by default, and starve beside whatever else runs on the machine.
    return ours | {"SLURM_CONF": str(folder / "slurm.conf"), "RAY_worker_niceness": "0", "PATH": _path(),
                   "RAY_raylet_start_wait_time_s": "180", "PYTHONPATH": str(Path(__file__).parents[2])}


def _path() -> str:
    # DeepSpeed compiles again for each other `ninja` that comes first on PATH: the environment's own is first.
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _end(pids: list[int]) -> None:
    processes = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            processes.append(psutil.Process(pid))
            os.kill(pid, signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=20)
    for process in alive:
        process.kill()
