"""What a launcher's processes are told: srun's tasks become ranks, others are refused or left alone."""
import os
import subprocess
import sys

import psutil
import pytest

from frpo.cluster.launcher import LAUNCHER, adopt, first_host, interface_towards
from frpo.cluster.rank import local_places, rank_environments
from frpo.config.loader import load_recipe
from frpo.errors import ConfigError

STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "70",
        "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "localhost,other", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}


def test_a_task_of_srun_is_a_rank():
    environ = dict(STEP)
    adopt(environ)
    assert {name: environ[name] for name in (*LAUNCHER, "LOCAL_WORLD_SIZE")} == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "17172",
        "LOCAL_WORLD_SIZE": "2"}


def test_tasks_of_a_step_meet_at_one_port_and_steps_at_others():
    ports = []
    for job, step, task in ((70, 2, 0), (70, 2, 3), (70, 3, 0), (71, 2, 0)):
        environ = STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), "SLURM_PROCID": str(task)}
        adopt(environ)
        ports.append(int(environ["MASTER_PORT"]))
    assert ports[0] == ports[1] and len(set(ports)) == 3 and all(15000 <= port < 30000 for port in ports)


def test_an_address_that_is_given_stays():
    environ = STEP | {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "29500"}
    adopt(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.9", "29500")


@pytest.mark.parametrize("environ", [
    {}, STEP | {"SLURM_STEP_NUM_TASKS": "1"},  # one task
    {"SLURM_JOB_ID": "70", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # the script of a batch job
    STEP | {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"},  # a Ray job on a cluster that srun has started
    STEP | dict.fromkeys(LAUNCHER, "0"),  # torchrun inside srun
])
def test_other_processes_are_left_alone(environ):
    before = dict(environ)
    adopt(environ)
    assert environ == before


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_of_mpi_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} = 2: an MPI launcher .* start it with srun, torchrun or deepspeed"):
        adopt({name: "2"})
    adopt({name: "1"})


@pytest.mark.parametrize("hosts, first", [
    ("n1", "n1"), ("n1,n2", "n1"), ("n[01-03,07],login", "n01"), ("gpu-[7,9]-x,a", "gpu-7-x"),
    ("rack[1-2]n[3-4]", "rack1n3"), ("node.site-2[10-12]", "node.site-210")])
def test_the_first_of_slurms_hosts(hosts, first):
    assert first_host(hosts) == first


def test_an_unknown_first_host_is_told_with_what_to_set(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"the address of no\.such\.host\.invalid, .*; set MASTER_ADDR"):
        adopt(STEP | {"SLURM_STEP_NODELIST": "no.such.host.invalid"})


@pytest.mark.parametrize("command", [["evaluate", "smoke", "model"], ["retention", "lab"], ["quickstart"],
                                     ["rollout", "smoke", "--steps", "1", "--output", "x"]])
def test_commands_that_start_their_own_processes_are_refused_under_a_launcher(command, tmp_path):
    environ = {**os.environ, **STEP}
    done = subprocess.run([sys.executable, "-m", "frpo", *command], env=environ, cwd=tmp_path, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 2
    assert f"frpo: ConfigError: frpo {command[0]} is run once and starts what it needs, but a launcher (deepspeed, " \
           "torchrun or srun) has started it 4 times" in done.stderr
    assert not list(tmp_path.iterdir())


def test_ranks_are_counted_by_machine():
    assert local_places(["a", "b", "a", "a", "b"]) == [(0, 3), (0, 2), (1, 3), (2, 3), (1, 2)]
    recipe = load_recipe("smoke", ["learner.num_ranks=3", "learner.threads=2"])
    first, second, third = rank_environments(["10.0.0.1", "10.0.0.2", "10.0.0.2"], 4000, "cpu", recipe)
    assert (first["LOCAL_RANK"], first["LOCAL_SIZE"]) == ("0", "1")
    assert (third["LOCAL_RANK"], third["LOCAL_SIZE"], third["RANK"], third["WORLD_SIZE"]) == ("1", "2", "2", "3")
    assert {(e["MASTER_ADDR"], e["MASTER_PORT"], e["OMP_NUM_THREADS"]) for e in (first, second, third)} == {
        ("10.0.0.1", "4000", "2")}
    assert "LOCAL_SIZE" not in rank_environments(["10.0.0.1"], 4000, "cuda", recipe)[0]


def test_the_network_towards_an_address():
    names = psutil.net_if_addrs()
    assert "127.0.0.1" in {each.address for each in names[interface_towards("127.0.0.1", 80)]}
