"""Who holds a file or folder, also in another PID namespace; that death lets go of it; that a second run is refused."""
from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest

from frpo.commands.quickstart import run_quickstart
from frpo.commands.rollout import run_rollout
from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import load_recipe
from frpo.config.retention import RetentionRecipe
from frpo.downstream.command import run_retention
from frpo.downstream.plan import make_plan
from frpo.downstream.stages import Matrix, run_plan
from frpo.errors import ConfigError
from frpo.held import LOCK, HeldByAnotherError, HeldFile, held_folder
from frpo.learner.state_cache import being_filled
from frpo.run.build import build
from frpo.run.build_finetune import build_finetune
from frpo.telemetry.progress import ProgressBar
from pid_namespace import NAMESPACE, needs_namespaces

HOLD = "import sys, time; from pathlib import Path; from frpo.held import HeldFile; " \
       "lock = HeldFile.take(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
elsewhere = pytest.param(NAMESPACE, id="another PID namespace", marks=needs_namespaces)


@contextmanager
def holder(path, within=()):
    """A process that holds the file until it is killed."""
    process = subprocess.Popen([*within, sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.read()  # ends when whatever it had started has ended


@pytest.mark.parametrize("within", [pytest.param([], id="beside"), elsewhere])
def test_a_living_process_holds_its_file_and_a_killed_one_does_not(tmp_path, within):
    path = tmp_path / "lock"
    told = rf"process \d+ on {socket.gethostname()}, since"
    with holder(path, within), pytest.raises(HeldByAnotherError, match=told):
        HeldFile.take(path)
    lock = HeldFile.take(path)
    assert path.read_text(encoding="utf-8").startswith(f"process {os.getpid()} on ")
    lock.remove()
    assert not path.exists()


def test_a_file_that_its_holder_removed_meanwhile_is_made_anew(tmp_path, monkeypatch):
    path, real = tmp_path / "lock", fcntl.flock

    def late(file, how):
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()  # between our opening it and our lock
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    HeldFile.take(path)
    assert path.read_text(encoding="utf-8").startswith("process ")


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine", encoding="utf-8")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        HeldFile.take(tmp_path / "lock")
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "mine"


def test_a_folder_is_held_once_and_free_afterwards(tmp_path):
    folder = tmp_path / "runs" / "first"
    for _ in range(2):
        with held_folder(folder):
            (folder / "metrics.jsonl").touch()
            with pytest.raises(ConfigError, match=refusal(folder)), held_folder(folder):
                pass
        assert [file.name for file in folder.iterdir()] == ["metrics.jsonl"]


def test_a_run_whose_folder_was_moved_leaves_the_lock_of_its_successor(tmp_path):
    folder = tmp_path / "run"
    with held_folder(folder):
        folder.rename(tmp_path / "moved")
        folder.mkdir()
        second = HeldFile.take(folder / LOCK)
    with pytest.raises(ConfigError, match=refusal(folder)), held_folder(folder):
        pass
    second.remove()
    assert list(folder.iterdir()) == []


def test_a_refused_run_leaves_no_empty_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), held_folder(tmp_path / "new"):
        1 / 0  # noqa: B018
    with held_folder(tmp_path / "old" / "inner"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["old"]  # which somebody else may have made


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"run\.dir: {tmp_path}/file cannot be written \(File exists\)"), \
            held_folder(tmp_path / "file"):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_without_locks_it_warns_once_and_goes_on(tmp_path, monkeypatch, caplog, code):
    def refuse(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with held_folder(tmp_path):
        pass
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: the file system has no locks ({os.strerror(code)}), so a second run into this folder would "
        "not be refused"]


def test_an_error_of_the_file_system_is_not_taken_for_a_lack_of_locks(tmp_path, monkeypatch):
    def fail(file, how):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(ConfigError, match="cannot be written"), held_folder(tmp_path):
        pass


def refusal(folder, key="run.dir"):
    return (rf"{re.escape(key)}: another run is writing into {folder} \(process {os.getpid()} on "
            rf"{socket.gethostname()}, since .*\); wait for it, end it, or give another {re.escape(key)}")


def begin_training(folder):
    with build(load_recipe("smoke", [f"run.dir={folder}"])):
        pass


def begin_finetuning(folder):
    with build_finetune(load_recipe("finetune_gsm8k", [f"run.dir={folder}"], FinetuneRecipe)):
        pass


def begin_rollout(folder):
    run_rollout(load_recipe("smoke", [f"run.dir={folder}"]), 1, None)


def begin_quickstart(folder):
    run_quickstart([f"run.dir={folder}"], "tiny")


def begin_matrix(folder):
    run_retention(make_plan(load_recipe("lab", [f"run.dir={folder}"], RetentionRecipe)))


def began(*arguments):
    raise AssertionError("it was not refused")


@pytest.mark.parametrize("begin", [begin_training, begin_finetuning, begin_rollout, begin_quickstart, begin_matrix])
def test_a_second_run_is_refused_before_it_does_anything(tmp_path, begin, monkeypatch):
    monkeypatch.setattr("frpo.downstream.command.write_archive", began)
    with held_folder(tmp_path):
        with pytest.raises(ConfigError, match=refusal(tmp_path)):
            begin(tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == [LOCK]


def test_one_of_several_processes_of_a_matrix_has_a_seed_alone_and_a_stage_its_folder(tmp_path, monkeypatch):
    plan = make_plan(load_recipe("lab", [f"run.dir={tmp_path}", "seeds=[0]"], RetentionRecipe))
    monkeypatch.setattr(Matrix, "set_up", began)
    seed, stage = plan.seeds[0], plan.seeds[0].policies["warm"]
    with held_folder(tmp_path), held_folder(seed.folder), pytest.raises(ConfigError, match=refusal(seed.folder)):
        run_plan(plan)
    monkeypatch.setattr(Matrix, "run", began)
    with held_folder(seed.folder), held_folder(stage.run_dir), ProgressBar(1, 0, "matrix") as bar:
        Matrix(plan).attempt(stage, [], bar)
        assert re.fullmatch(f"ConfigError: {refusal(stage.run_dir)}", stage.failure)


def test_a_cache_is_filled_by_one_run_and_read_by_any(tmp_path):
    with being_filled(tmp_path), pytest.raises(ConfigError, match=refusal(tmp_path, "reference.cache_dir")), \
            being_filled(tmp_path):
        pass
    (tmp_path / "COMPLETE").touch()
    with being_filled(tmp_path), being_filled(tmp_path):
        pass
