"""A write that finds no room is told with the file, the room that is left and what to change. /dev/full is a full disk.
"""
from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from frpo.__main__ import main
from frpo.config.rollout import WeightSyncSection
from frpo.errors import StorageError
from frpo.learner.state_cache import StateCache
from frpo.storage import full_disk, writing
from frpo.telemetry.jsonl import JsonlFile, read_rows
from frpo.weight_sync import cpu_shm

LARGE = {"weight": torch.zeros(400_000)}


@pytest.fixture
def full(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.symlink_to("/dev/full")
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no small disk can be mounted: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


WRITES = {
    "python": lambda path: path.write_text("x" * 100_000),
    "torch": lambda path: torch.save(LARGE, path),
    "numpy": lambda path: np.save(path.open("wb"), np.zeros(100_000)),
    "json": lambda path: json.dump(["x" * 100_000], path.open("w")),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_any_writer(full: Path, write) -> None:
    told = rf"{full} cannot be written \(.+\); \d+ MiB are free there\. Make room"
    with pytest.raises(StorageError, match=told) as raised, writing(full):
        write(full)
    assert raised.value.__cause__ is not None


def test_safetensors(tmp_path: Path, small_disk: Path) -> None:
    with pytest.raises(StorageError, match=r"No space left on device.*; 1 MiB are free there\. Use another disk"), \
            writing(small_disk, "Use another disk"):
        save_file(LARGE, small_disk / "model.safetensors")


def test_a_push_through_full_shared_memory(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_shm, "SHARED_MEMORY", small_disk)
    client = SimpleNamespace(init_weight_transfer_engine=lambda info: None, start_weight_update=lambda: None)
    sender = cpu_shm.Sender(0, client, WeightSyncSection())
    with pytest.raises(StorageError, match=r"frpo-weights-.* cannot be written .*--shm-size, or lower weight_sync"):
        sender.send([[*LARGE.items()]], 1)
    assert list(small_disk.iterdir()) == []


def test_an_error_is_told_once(full: Path) -> None:
    with pytest.raises(StorageError) as raised, writing(full.parent), writing(full):
        torch.save(LARGE, full)
    assert str(raised.value).count("cannot be written") == 1


def test_other_errors_stay() -> None:
    for error in (RuntimeError("CUDA out of memory"), ValueError("no"), TimeoutError("no answer")):
        with pytest.raises(type(error)) as raised, writing(Path("x")):
            raise error
        assert raised.value is error
    assert full_disk(PermissionError(errno.EACCES, "no")) is None


def test_a_line_that_finds_no_room(full: Path) -> None:
    file = JsonlFile(full)
    with pytest.raises(StorageError, match=r"\(No space left on device\)"):
        file.append({"step": 1})
    file.close()  # what is left in its buffer fails no second time


def test_lines_before_a_full_disk_stay(small_disk: Path) -> None:
    file = JsonlFile(small_disk / "metrics.jsonl")
    file.append({"step": 0})
    with (small_disk / "block").open("wb", buffering=0) as block, pytest.raises(OSError, match="No space"):
        while True:
            block.write(b"\0" * 4096)
    with pytest.raises(StorageError):
        file.append({"step": 1, "text": "x" * 100_000})
    (small_disk / "block").unlink()
    file.close()
    assert read_rows(small_disk / "metrics.jsonl") == [{"step": 0}]


def test_a_cache_takes_its_room_before_it_is_mapped(small_disk: Path) -> None:
    """A mapped file that finds no room later ends the process by SIGBUS."""
    with pytest.raises(StorageError, match="The states take 40 MiB: make room, or choose another reference.cache_dir"):
        StateCache.begin(small_disk / "cache", {"model": "m", "data": "d", "dtype": "fp32", "width": 1024}, [10_240])


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    def no_room(recipe: object) -> None:
        Path("/dev/full").write_text("x")

    monkeypatch.setattr("frpo.loops.training.run_training", no_room)
    assert main(["train", "smoke", f"run.dir={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("frpo: StorageError: a file cannot be written (No space left on device); free are ")
    assert "MiB at /dev/shm. Make room there; no checkpoint was saved yet (run.save_every = " in err
