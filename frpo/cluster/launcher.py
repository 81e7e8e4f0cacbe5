"""Tell what a launcher says in the environment of its processes: `deepspeed`, `torchrun`, or Slurm's `srun`.

A launcher starts the same command once for each rank. `deepspeed` and `torchrun` set the variables of LAUNCHER. `srun`
has names of its own, which `adopt` translates, so that its tasks are ranks of one training.
"""
from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress

import psutil

from frpo.cluster.nvidia import asked
from frpo.config.loader import AnyRecipe
from frpo.errors import ConfigError
from frpo.weight_sync.addresses import own_address

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that a launcher sets for its processes."""

VISIBLE = "CUDA_VISIBLE_DEVICES"

INTERFACE = "GLOO_SOCKET_IFNAME"
"""Network that gloo uses. By default gloo takes the address of this machine's name, which is often the loopback."""

OF_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable of a process that a Ray cluster has started, perhaps from within a task of Slurm."""

MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables with the number of processes that an MPI launcher has started."""

FIRST_PORT, PORTS = 15000, 15000
"""Ports from which Slurm's tasks choose one where they meet. Systems hand out ports above these by themselves."""


def launched() -> bool:
    """Return whether a launcher has started this process as one of its ranks."""
    return all(name in os.environ for name in LAUNCHER)


def follows() -> bool:
    """Return whether this process must `follow` rank 0."""
    return launched() and int(os.environ["RANK"]) > 0


def adopt(environ: MutableMapping[str, str]) -> None:
    """Set the variables of LAUNCHER in a process that `srun` has started as one of several tasks.

    MASTER_ADDR and MASTER_PORT keep values that are set. Raises ConfigError for the processes of an MPI launcher, each
    of which would train alone.
    """
    if all(name in environ for name in LAUNCHER) or OF_RAY_JOB in environ:
        return
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1:
        job, step = (int(environ.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        per_node = re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        environ.update(RANK=environ["SLURM_PROCID"], LOCAL_RANK=environ["SLURM_LOCALID"], WORLD_SIZE=str(tasks),
                       LOCAL_WORLD_SIZE=per_node[0] if per_node else "1")
        environ.setdefault("MASTER_PORT", str(FIRST_PORT + (31 * job + step) % PORTS))
        if "MASTER_ADDR" not in environ:
            environ["MASTER_ADDR"] = _address_of(first_host(environ["SLURM_STEP_NODELIST"]))
        return
    for name in MPI:
        if int(environ.get(name, 1)) > 1:
            raise ConfigError(f"{name} = {environ[name]}: an MPI launcher has started this command several times, and "
                              "each process would train alone; start it with srun, torchrun or deepspeed, or set "
                              f"{', '.join(LAUNCHER)} in every process")


def refuse_launched(command: str) -> None:
    """Raise ConfigError under a launcher, for a command that would run once in each of the launcher's processes."""
    if launched():
        raise ConfigError(f"{command} is run once and starts what it needs, but a launcher (deepspeed, torchrun or "
                          f"srun) has started it {os.environ['WORLD_SIZE']} times; start it without a launcher, in a "
                          "Slurm job with srun --ntasks=1")


def first_host(hosts: str) -> str:
    """Return the first name of Slurm's list of hosts, such as n01 of "n[01-03,07],login"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    assert first is not None  # the pattern matches an empty text too
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _address_of(host: str) -> str:
    """Return the host's name if it has an address here, else the address that Slurm has for the node."""
    with suppress(OSError):
        socket.getaddrinfo(host, None)
        return host
    if shutil.which("scontrol"):
        shown = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, timeout=60).stdout
        if found := re.search(r"NodeAddr=(\S+)", shown):
            return found[1]
    raise ConfigError(f"the address of {host}, the first node of this Slurm step, is not known here; set MASTER_ADDR "
                      "to it before srun")


def with_launcher_ranks(recipe: AnyRecipe) -> AnyRecipe:
    """Return the recipe with the number of ranks that the launcher has started; unchanged without a launcher."""
    if not launched():
        return recipe
    learner = recipe.learner.model_copy(update={"num_ranks": int(os.environ["WORLD_SIZE"]), "ranks": "launcher"})
    return recipe.model_copy(update={"learner": learner})


@contextmanager
def outside_the_team() -> Iterator[None]:
    """Hide the launcher from processes that start within this context. They see only the GPUs that no rank has."""
    if not launched():
        yield
        return
    import torch

    machine = asked("index", "uuid") if torch.cuda.is_available() else []
    spare = spare_gpus(os.environ, [(number, uuid) for number, uuid in machine])
    before = {name: os.environ.pop(name) for name in (*LAUNCHER, VISIBLE) if name in os.environ}
    os.environ[VISIBLE] = ",".join(spare)
    try:
        yield
    finally:
        del os.environ[VISIBLE]
        os.environ.update(before)


def spare_gpus(environ: Mapping[str, str], machine: Sequence[tuple[str, str]]) -> list[str]:
    """List the GPUs that a launcher's ranks on this machine leave to engines, as CUDA_VISIBLE_DEVICES names them.

    machine: (number, UUID) of each GPU. torchrun's ranks all see the same GPUs and take the first ones; GPUs that they
    do not see are not used. deepspeed shows its ranks only their own GPUs; the rest of the machine is spare.
    """
    given = [name.strip() for name in environ.get(VISIBLE, "").split(",") if name.strip()]
    visible = given if VISIBLE in environ else [number for number, _ in machine]
    ranks = int(environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or 1)
    if "TORCHELASTIC_RUN_ID" in environ or len(visible) > ranks:
        return visible[ranks:]
    return [number for number, uuid in machine if not {number, uuid} & set(visible)]


def interface_towards(host: str, port: int) -> str | None:
    """Return the name of the network interface of this machine from which `host` is reached; None if unknown."""
    own = own_address(host, port)
    return next((name for name, addresses in psutil.net_if_addrs().items()
                 if any(each.address.partition("%")[0] == own for each in addresses)), None)
