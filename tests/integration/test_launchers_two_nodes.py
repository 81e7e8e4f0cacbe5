"""Ranks of `torchrun` and of `deepspeed --hostfile` on two machines train what two ranks of one machine train.

The machines are namespaces of this one (`nodes`). `deepspeed` reaches the second by ssh; its sshd has a namespace of
process ids of its own too, since DeepSpeed ends ranks by name.
"""
from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodes import BIN, Machine, machines, until, why_not
from runs import LONG, metrics

pytestmark = [pytest.mark.skipif(why_not() is not None, reason=f"no machines beside this one: {why_not()}"),
              pytest.mark.timeout(300), LONG]

SSHD = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
"""

SSH = """
Host *
    IdentityFile {folder}/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("launchers")
    (place / "rows.jsonl").write_text("".join(f'{{"question": "{i}+1=", "answer": "{i + 1}"}}\n' for i in range(40)),
                                      encoding="utf-8")
    return place


def training(place: Path, name: str) -> list[str]:
    return ["frpo", "finetune", "finetune_gsm8k", f"run.dir={place / name}", f"data.path={place / 'rows.jsonl'}",
            "learner.ranks=launcher", "model.path=null", "model.tiny={warm_start: {steps: 0}}", "model.max_length=64",
            "data.heldout=4", "data.batch_size=4", "run.max_steps=4", "learner.micro_batch_tokens=128"]


@pytest.fixture(scope="module")
def one_machine(place) -> Path:
    """Two ranks of `deepspeed` on this machine."""
    subprocess.run([f"{BIN}/deepspeed", "--num_gpus", "2", "--master_port", "29655", "--module",
                    *training(place, "one")], check=True, timeout=150, cwd=place)
    return place / "one"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Iterator[list[Machine]]:
    with machines(tmp_path_factory.mktemp("pair"), "na", "nb") as made:
        yield made


def assert_equal(folder: Path, one_machine: Path) -> None:
    assert [row["step"] for row in metrics(folder)] == [0, 1, 2, 3, 4]
    assert metrics(folder) == metrics(one_machine)
    for name in ("config.json", "model.safetensors"):
        assert (folder / "export" / name).read_bytes() == (one_machine / "export" / name).read_bytes()


def test_torchrun(pair, place, one_machine):
    logs = [place / f"torchrun_{machine.name}.log" for machine in pair]
    started = [machine.start(
        ["torchrun", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={number}", f"--master-addr={pair[0].address}",
         "--master-port=29500", "-m", *training(place, "torchrun")], log)
        for number, (machine, log) in enumerate(zip(pair, logs))]
    assert [process.wait(timeout=150) for process in started] == [0, 0], [log.read_text()[-2000:] for log in logs]
    assert_equal(place / "torchrun", one_machine)


@pytest.fixture(scope="module")
def reached(pair, tmp_path_factory) -> list[Machine]:
    """The machines, with an sshd on each that lets the other in."""
    if missing := [name for name in ("pdsh", "ssh", "sshd", "ssh-keygen") if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian packages pdsh, openssh-client, openssh-server)")
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "sshd.conf").write_text(SSHD.format(folder=folder), encoding="utf-8")
    (folder / "ssh.conf").write_text(SSH.format(folder=folder), encoding="utf-8")
    for machine in pair:
        # Settings of ssh, and sshd's folder for its own rights, for this machine alone.
        done = machine.run("sh", "-c", f"mount --bind {folder}/ssh.conf /etc/ssh/ssh_config && "
                                       "mount -t tmpfs tmpfs /run && mkdir /run/sshd")
        assert done.returncode == 0, done.stderr
        machine.start(["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", shutil.which("sshd") or "", "-D",
                       "-e", "-f", str(folder / "sshd.conf")], folder / f"sshd_{machine.name}.log")
    until(lambda: all(pair[0].run("ssh", machine.address, "true").returncode == 0 for machine in pair), 30)
    return pair


def test_deepspeed_with_a_hostfile(reached, place, one_machine):
    na, _ = reached
    (place / "hostfile").write_text("".join(f"{machine.address} slots=1\n" for machine in reached), encoding="utf-8")
    log = place / "hostfile.log"
    process = na.start(["env", "-C", str(place), "deepspeed", "--hostfile", str(place / "hostfile"), "--master_addr",
                        na.address, "--module", *training(place, "by_hostfile")], log,
                       {"PDSH_RCMD_TYPE": "ssh", "PYTHONPATH": str(Path(__file__).parents[2])})
    assert process.wait(timeout=150) == 0, log.read_text()[-3000:]
    assert_equal(place / "by_hostfile", one_machine)
