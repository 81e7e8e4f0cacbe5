"""Buckets in shared memory: a dead sender's are removed, those of a living one never, wherever it lives."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from frpo.config.rollout import WeightSyncSection
from frpo.errors import EngineError
from frpo.weight_sync import cpu_shm
from pid_namespace import NAMESPACE, needs_namespaces

SEND = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
from frpo.config.rollout import WeightSyncSection
from frpo.weight_sync import cpu_shm

def sent(info):
    print(Path(info["path"]).name, flush=True)
    if info["path"].endswith("-1.safetensors"):
        time.sleep(60)

cpu_shm.SHARED_MEMORY = Path(sys.argv[1])
client = SimpleNamespace(init_weight_transfer_engine=lambda info: None, start_weight_update=lambda: None,
                         update_weights=sent)
cpu_shm.Sender(0, client, WeightSyncSection()).send([[("a", torch.ones(2))], [("b", torch.ones(3))]], 1)
"""


@needs_namespaces
def test_buckets_of_another_pid_namespace_stay_until_their_sender_dies(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_shm, "SHARED_MEMORY", tmp_path)
    sender = subprocess.Popen([*NAMESPACE, sys.executable, "-c", SEND, str(tmp_path)], stdout=subprocess.PIPE,
                              text=True)
    buckets = [sender.stdout.readline().strip() for _ in range(2)]
    lock = buckets[0].removesuffix("-0.safetensors") + ".lock"
    assert buckets[1] == buckets[0].replace("-0.", "-1.")
    cpu_shm.remove_leftovers()
    assert {file.name for file in tmp_path.iterdir()} == {*buckets, lock}
    sender.kill()
    sender.wait()
    sender.stdout.read()
    cpu_shm.remove_leftovers()
    assert list(tmp_path.iterdir()) == []


class Engines:
    """Notes what is there while a bucket arrives."""

    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def init_weight_transfer_engine(self, info):
        pass

    start_weight_update = finish_weight_update = lambda self, *version: None

    def update_weights(self, info):
        cpu_shm.remove_leftovers()  # as a second run in this very process, too
        self.seen.append(sorted(file.suffix for file in self.folder.iterdir()))


def test_a_push_leaves_nothing_and_its_buckets_are_there_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_shm, "SHARED_MEMORY", tmp_path)
    engines = Engines(tmp_path)
    cpu_shm.Sender(0, engines, WeightSyncSection()).send([[("a", torch.ones(2))], [("b", torch.ones(3))]], 1)
    assert engines.seen == [[".lock", ".safetensors"], [".lock", ".safetensors", ".safetensors"]]
    assert list(tmp_path.iterdir()) == []


HOLD = """
import sys, time
from pathlib import Path
from frpo.weight_sync import cpu_shm
cpu_shm.SHARED_MEMORY = Path(sys.argv[1])
with cpu_shm.shared_folder() as folder:
    (folder / "adapter_model.safetensors").write_text("weights")
    print(folder, flush=True)
    time.sleep(60)
"""


def test_a_folder_goes_with_its_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_shm, "SHARED_MEMORY", tmp_path)
    engine = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    folder = Path(engine.stdout.readline().strip())
    cpu_shm.remove_leftovers()
    assert (folder / "adapter_model.safetensors").is_file()
    engine.kill()
    engine.wait()
    cpu_shm.remove_leftovers()
    assert list(tmp_path.iterdir()) == []
    with cpu_shm.shared_folder() as own:
        assert own.parent == tmp_path and own.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_shm, "SHARED_MEMORY", tmp_path)
    for name in ("frpo-weights-1-abcd-0.safetensors", "deepspeed_allreduce_buffer_0_host_1_0", "vllm_dist_1-cpushm_0"):
        (tmp_path / name).touch()
    (tmp_path / "precious").write_text("mine", encoding="utf-8")
    (tmp_path / "frpo-weights-1-link.lock").symlink_to(tmp_path / "precious")
    before = sorted(tmp_path.iterdir())
    cpu_shm.remove_leftovers()
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "precious").read_text(encoding="utf-8") == "mine"


def test_an_engine_with_another_shared_memory_refuses_to_connect():
    from frpo.rollout.shm_receiver import SharedInfo, SharedMemoryReceiver

    receiver = object.__new__(SharedMemoryReceiver)
    receiver.init_transfer_engine(SharedInfo(staged=True, memory=cpu_shm.memory_id()))
    assert receiver.staging
    with pytest.raises(EngineError, match="cpu_shm needs the engines on the machine of learner rank 0, .* gloo"):
        receiver.init_transfer_engine(SharedInfo(staged=True, memory="another boot:25"))
