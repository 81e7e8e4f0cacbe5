"""Several machines on this one: namespaces with a network, a host name, a /dev/shm and a Ray of their own. Not a test.

They share the disk, as the nodes of a cluster do. A switch joins their networks, so a cable can be cut. It needs root
and the packages iproute2 and util-linux; `why_not` says what is missing.
"""
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

NETWORK = "192.168.7"
"""Above the loopback: gloo lets the higher address connect to the lower one, and a rank that names its loopback then
fails."""
BIN = str(Path(sys.executable).parent)
LEASE_S = 3600
"""Seconds after which a machine ends by itself, whatever became of the test."""

MACHINE = """
hostname {name}
ip link set lo up
mount -t tmpfs -o size=2g,mode=1777 tmpfs /dev/shm
mkdir -p /tmp/ray && mount --bind {folder}/{name}.ray /tmp/ray
mount --bind {folder}/{name}.hosts /etc/hosts
exec sleep {lease}
"""


def why_not() -> str | None:
    """Return why this machine cannot be several; None if it can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    for program in ("ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            return f"the program {program} is not installed (Debian packages iproute2, util-linux)"
    tried = subprocess.run(["unshare", "--net", "--uts", "--ipc", "--mount", "--propagation", "private", "true"],
                           capture_output=True, text=True)
    return tried.stderr.strip() or None


@dataclass
class Machine:
    """One of the machines. keeper: the process whose namespaces it is."""

    name: str
    address: str
    keeper: subprocess.Popen
    folder: Path
    started: list[subprocess.Popen] = field(default_factory=list)

    def inside(self, command: Sequence[str]) -> list[str]:
        """Return the command that runs `command` on this machine, in the current folder."""
        return ["nsenter", "-t", str(self.keeper.pid), "-n", "-u", "-i", "-m", f"--wd={os.getcwd()}", "--", *command]

    def start(self, command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None) -> subprocess.Popen:
        with log.open("a", encoding="utf-8") as file:
            process = subprocess.Popen(self.inside(command), stdout=file, stderr=subprocess.STDOUT,
                                       start_new_session=True, env=self.environ | dict(environ or {}))
        self.started.append(process)
        return process

    def run(self, *command: str, timeout: float = 60, environ: Mapping[str, str] | None = None
            ) -> subprocess.CompletedProcess:
        return subprocess.run(self.inside(command), capture_output=True, text=True, timeout=timeout,
                              env=self.environ | dict(environ or {}))

    @property
    def environ(self) -> dict[str, str]:
        return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0",
                "TMPDIR": "/tmp"}

    def processes(self) -> list[psutil.Process]:
        """All processes on this machine but its keeper."""
        own = os.readlink(f"/proc/{self.keeper.pid}/ns/net")
        found = []
        for process in psutil.process_iter():
            with suppress(OSError):
                if process.pid != self.keeper.pid and os.readlink(f"/proc/{process.pid}/ns/net") == own:
                    found.append(process)
        return found

    def kill(self) -> None:
        """Kill all of the machine's processes at once, as if its power were cut; the network stays silent."""
        self.cable("down")
        family = self.processes()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=20)

    def cable(self, state: str) -> None:
        """Cut the machine's cable ("down"), or mend it ("up")."""
        done = self.run("ip", "link", "set", "eth0", state)
        assert done.returncode == 0, done.stderr
        if state == "up":
            self.run("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")

    def join(self, head: Machine | None, token: str, *options: str) -> subprocess.Popen:
        """Start Ray here: the head of a cluster, or a worker of the cluster of `head`."""
        where = ["--head", "--port=6379"] if head is None else [f"--address={head.address}:6379"]
        return self.start(
            ["ray", "start", *where, f"--node-ip-address={self.address}", "--num-cpus=2", "--block",
             "--object-store-memory=100000000", *(options or ("--include-dashboard=false",) if head is None else ())],
            self.folder / f"ray_{self.name}.log", ray_environment(token))


def ray_environment(token: str) -> dict[str, str]:
    """token: file with the cluster's token."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}


@contextmanager
def machines(folder: Path, *names: str) -> Iterator[list[Machine]]:
    """Make machines on one network; end them, with all that runs on them."""
    addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(names, start=1)}
    switch = subprocess.Popen(["unshare", "--net", "sleep", str(LEASE_S)])
    made: list[Machine] = []
    try:
        until(lambda: has_own_network(switch.pid))
        _in(switch, "ip", "link", "add", "br0", "type", "bridge")
        _in(switch, "ip", "link", "set", "br0", "up")
        for name, address in addresses.items():
            (folder / f"{name}.ray").mkdir()
            # A machine's own name leads to its loopback, as Debian installs it.
            (folder / f"{name}.hosts").write_text("127.0.0.1 localhost\n" + "".join(
                f"{'127.0.1.1' if other == name else reached} {other}\n" for other, reached in addresses.items()),
                encoding="utf-8")
            keeper = subprocess.Popen(
                ["unshare", "--net", "--uts", "--ipc", "--mount", "--propagation", "private", "--", "bash", "-c",
                 MACHINE.format(name=name, folder=folder, lease=LEASE_S)])
            made.append(Machine(name, address, keeper, folder))
            until(lambda keeper=keeper: psutil.Process(keeper.pid).name() == "sleep")
            _in(switch, "ip", "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns",
                str(keeper.pid))
            _in(switch, "ip", "link", "set", f"to-{name}", "master", "br0", "up")
            _in(keeper, "ip", "addr", "add", f"{address}/24", "dev", "eth0")
            _in(keeper, "ip", "link", "set", "eth0", "up")
        yield made
    finally:
        for machine in made:
            for process in machine.processes():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        for keeper in [*(machine.keeper for machine in made), switch]:
            keeper.kill()
            keeper.wait()
        for machine in made:
            for process in machine.started:
                process.wait(timeout=20)


@contextmanager
def cluster(folder: Path, made: Sequence[Machine], *options: str) -> Iterator[dict[str, str]]:
    """Run Ray on these machines, the first as head. Yields the environment of a command that joins it."""
    token = folder / "token"
    token.touch(0o600)
    token.write_text("0123456789abcdef" * 4, encoding="ascii")
    for number, machine in enumerate(made):
        machine.join(made[0] if number else None, str(token), *(() if number else options))
    environ = {**ray_environment(str(token)), "RAY_ADDRESS": f"{made[0].address}:6379"}
    until(lambda: made[0].run("ray", "status", environ=environ).stdout.count(" node_") >= len(made), 90)
    yield environ


def has_own_network(pid: int) -> bool:
    return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")


def until(condition, limit_s: float = 20, poll_s: float = 0.05) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(poll_s)


def _in(keeper: subprocess.Popen, *command: str) -> None:
    subprocess.run(["nsenter", "-t", str(keeper.pid), "-n", "--", *command], check=True, timeout=20)
