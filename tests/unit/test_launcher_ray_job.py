"""The Ray job launcher without a cluster: what is sent and under which names, the command, exit codes, a torn log."""
from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray.job_submission import JobDetails, JobStatus, JobType

from frpo.cluster import runtime
from frpo.config.loader import load_recipe, recipe_digest, recipe_from_dict
from frpo.errors import ConfigError, EngineError

PATH = Path(__file__).parents[2] / "launchers" / "ray_job.py"
SPEC = importlib.util.spec_from_file_location("launcher_ray_job", PATH)
launcher = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(launcher)

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with files that a recipe may name, and folders whose names mean something else to frpo."""
    here = tmp_path / "here"
    for folder in ("lib", "policy", "zero3", "arithmetic", "auto"):
        (here / folder).mkdir(parents=True)
    (here / "lib" / "rewards.py").write_text("def good(completions):\n    return [1.0] * len(completions)\n")
    for rows in (here / "rows.jsonl", tmp_path / "outside.jsonl"):
        rows.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (here / "words.json").write_text("{}")
    monkeypatch.chdir(here)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # set here, so that what `connect` sets is undone
    return here


def prepared(here, *overrides, upload=()):
    recipe = load_recipe("smoke", overrides)
    return recipe, launcher.prepare(recipe, here, upload)


def test_files_go_along_under_their_names_and_the_recipe_means_the_same(here):
    recipe, submission = prepared(
        here, "rewards=[{name: a, function: 'lib/rewards.py:good', kwargs: {table: [words.json]}}]",
        "data.path=rows.jsonl")
    assert submission.files == {name: here / name for name in ("lib/rewards.py", "words.json", "rows.jsonl")}
    assert recipe_digest(recipe_from_dict(dict(submission.recipe))) == recipe_digest(recipe)
    launcher._stage(submission, here / "job")
    staged = load_recipe(here / "job" / launcher.RECIPE)
    assert staged.rewards == recipe.rewards and staged.data == recipe.data
    assert (here / "job" / "lib" / "rewards.py").read_bytes() == (here / "lib" / "rewards.py").read_bytes()


@pytest.mark.parametrize("name", ["r.ndjson", "r.JSON", "r.csv", "r.tsv.gz", "r.parquet"])
def test_data_files_of_every_kind_go_along(here, name):
    for file in (name, "held.csv", "more.jsonl.gz"):
        (here / file).write_text("")
    auxiliary = {"data": {"path": "more.jsonl.gz", "train_on": "last"}, "objective": {"name": "sft"}}
    submission = prepared(here, f"data.path={name}", "data.heldout_path=held.csv", f"auxiliary={auxiliary}")[1]
    assert submission.files == {file: here / file for file in (name, "held.csv", "more.jsonl.gz")}
    assert submission.recipe["data"]["path"] == name


def test_what_lies_beside_a_functions_file_goes_along(here):
    for name in ("helpers.py", "notes.txt", "deep/far.py"):
        (here / "lib" / name).parent.mkdir(exist_ok=True)
        (here / "lib" / name).write_text("x = 1\n")
    submission = prepared(here, "rewards=[{name: a, function: 'lib/rewards.py:good'}]")[1]
    assert submission.files == {name: here / name for name in ("lib/rewards.py", "lib/helpers.py")}
    (here / "top.py").write_text("def good(completions):\n    return [1.0] * len(completions)\n")
    assert prepared(here, "rewards=[{name: a, function: 'top.py:good'}]")[1].files == {"top.py": here / "top.py"}


def test_folders_become_absolute_and_words_stay_words(here):
    submission = prepared(here, "run.resume=runs/a/checkpoints/step_000002", "model.tiny=null", "model.path=policy")[1]
    run, model = submission.recipe["run"], submission.recipe["model"]
    assert run["dir"] == str(here / "runs" / "smoke")
    assert run["resume"] == str(here / "runs" / "a" / "checkpoints" / "step_000002")
    assert model["path"] == str(here / "policy")
    auxiliary = {"data": {"path": "lib"}, "objective": {"name": "sft"}}
    recipe = prepared(here, "data.path=policy", f"auxiliary={auxiliary}")[1].recipe
    assert recipe["data"]["path"] == str(here / "policy")
    assert recipe["auxiliary"]["data"]["path"] == str(here / "lib")
    submission = prepared(here)[1]
    assert submission.recipe["run"]["resume"] == "auto"
    assert submission.recipe["data"]["path"] == "arithmetic"
    assert submission.recipe["learner"]["deepspeed"] == "zero3"
    assert submission.files == {}


def test_absolute_paths_and_modules_are_the_clusters(here):
    rewards = [{"name": "a", "function": f"{here}/none.py:f"}, {"name": "b", "function": "~/none.py:f"},
               {"name": "c", "function": "frpo.rewards.verifiers:exact_answer"}]
    submission = prepared(here, f"rewards={rewards}", "data.path=/none/rows.jsonl", "run.dir=/shared/run")[1]
    assert [reward["function"] for reward in submission.recipe["rewards"]] == [r["function"] for r in rewards]
    assert submission.recipe["data"]["path"] == "/none/rows.jsonl"
    assert submission.recipe["run"]["dir"] == "/shared/run"
    assert submission.files == {}


@pytest.mark.parametrize("overrides, upload, message", [
    (["rewards=[{name: a, function: 'lib/reward.py:good'}]"], (),
     r"rewards.0.function: there is no file 'lib/reward.py' in .*; correct the path, or give the absolute path"),
    (["data.path=lib/../../outside.jsonl"], (), r"data.path: only files below .* are sent, given 'lib/\.\./\."),
    ([], ["nothing"], r"--upload 'nothing': there is no such file or folder in"),
    ([], ["."], r"--upload: only files below .* are sent, given '\.'; submit from a folder above it, or")])
def test_what_cannot_be_sent_is_refused(here, overrides, upload, message):
    with pytest.raises(ConfigError, match=message):
        prepared(here, *overrides, upload=upload)


def test_what_else_shall_go_along_does(here):
    (here / "lib" / "deep").mkdir()
    (here / "lib" / "deep" / "helper.py").write_text("x = 1\n")
    launcher._stage(prepared(here, upload=["lib", "words.json"])[1], here / "job")
    assert (here / "job" / "lib" / "deep" / "helper.py").read_text() == "x = 1\n"
    assert (here / "job" / "words.json").is_file() and (here / "job" / launcher.RECIPE).is_file()


def test_recipes_of_other_trainings_go_along_under_their_command(here, capsys):
    for recipe, command in (("finetune_gsm8k", "finetune"), ("lab_cost_model", "reward-model")):
        overrides = ["data.path=rows.jsonl", "data.heldout_path=null", "model.path=policy", "model.tiny=null"]
        assert launcher.main([recipe, *overrides, "--dry-run"]) == 0
        told = capsys.readouterr().out
        assert f"-m frpo {command} {launcher.RECIPE}\n# files to send: rows.jsonl" in told
        assert f"path: {here / 'policy'}" in told


def test_the_command_is_the_run_itself_under_the_interpreter_that_exists(here, monkeypatch):
    for name in ("own python", "bin/python"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(f'#!/bin/sh\necho "{name} $*"\nexit 7\n')
        (here / name).chmod(0o755)

    def shell(command):
        done = subprocess.run(command, shell=True, env={"PATH": f"{here}/bin:/usr/bin:/bin"}, capture_output=True)
        return done.returncode, done.stdout.decode().strip()

    arguments = f"-m frpo train {launcher.RECIPE}"
    assert shell(launcher.entrypoint(f"{here}/own python")) == (7, f"own python {arguments}")
    monkeypatch.setattr(sys, "executable", f"{here}/own python")
    assert shell(launcher.entrypoint(None)) == (7, f"own python {arguments}")
    monkeypatch.setattr(sys, "executable", f"{here}/not on the head node")
    assert shell(launcher.entrypoint(None)) == (7, f"bin/python {arguments}")


def details(status, code=None, message=None):
    return JobDetails(type=JobType.SUBMISSION, entrypoint="", status=status, driver_exit_code=code, message=message)


@pytest.mark.parametrize("status, code, expected", [
    (JobStatus.SUCCEEDED, 0, 0), (JobStatus.FAILED, 2, 2), (JobStatus.FAILED, 1, 1), (JobStatus.FAILED, -9, 137),
    (JobStatus.STOPPED, None, 130)])
def test_exit_codes_are_those_of_the_run(status, code, expected):
    assert launcher.exit_code(details(status, code)) == expected


def test_a_job_that_never_ran_says_why(capsys):
    assert launcher.exit_code(details(JobStatus.FAILED, message="the node is gone")) == 1
    assert capsys.readouterr().err == "ray_job: the job failed without an exit code: the node is gone\n"


class TornClient:
    """A log server that hangs up after each of `ends` characters, and a cluster that answers while it `stays`."""

    def __init__(self, log, ends, stays=True):
        self.log, self.ends, self.stays = log, list(ends), stays

    async def tail_job_logs(self, job):
        end = self.ends.pop(0) if self.ends else len(self.log)
        for start in range(0, end, 3):
            yield self.log[start:min(start + 3, end)]
        if end < len(self.log):
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_info(self, job):
        if not self.stays:
            raise ConnectionError("refused")
        return details(JobStatus.RUNNING if self.ends else JobStatus.SUCCEEDED, None if self.ends else 0)

    def get_address(self):
        return NOWHERE


def test_a_torn_log_is_printed_once_and_whole(monkeypatch, capsys):
    monkeypatch.setattr(launcher, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda seconds: None))
    log = "".join(f"step {i}\n" for i in range(9))
    info = launcher.Follower(TornClient(log, [4, 13, 5, 0]), "job").until_end()
    assert info.driver_exit_code == 0
    assert capsys.readouterr().out == log


def test_a_cluster_that_is_gone_is_an_error_not_a_hang(monkeypatch):
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr(launcher, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None))
    with pytest.raises(EngineError, match="has not answered for 120 s: refused; `ray job status job` shows"):
        launcher.Follower(TornClient("x", [0] * 9, stays=False), "job").until_end()
    assert next(clock) <= 250


def main(capsys, *arguments):
    code = launcher.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_no_cluster_is_one_message(here, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # what is given by argument counts
    code, out, err = main(capsys, "smoke", "--address", NOWHERE)
    assert (code, out) == (2, "")
    assert err.startswith(f"ray_job: EngineError: no Ray job server at {NOWHERE}: Failed to connect to Ray at address: "
                          f"{NOWHERE}")
    assert "ray start --head" in err and "--address http" in err and err.count("\n") == 1
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    assert "no Ray job server at http://127.0.0.1:1: " in main(capsys, "smoke")[2]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("address, reason", [("127.0.0.1:9", "Connection refused"), ("[::1]:9", "")])
def test_a_session_at_an_address_without_ray_is_an_error_at_once(here, address, reason):
    with pytest.raises(EngineError, match=rf"RAY_ADDRESS = '{re.escape(address)}': .*{reason}; start Ray there, unset"):
        runtime._join(address)


def test_an_unknown_recipe_is_one_message(here, capsys):
    code, out, err = main(capsys, "smoek", "--address", NOWHERE)
    assert (code, out) == (2, "")
    assert err.startswith("ray_job: ConfigError: recipe not found: no file 'smoek' and no recipes/smoek.yaml "
                          "(did you mean 'smoke'?); known:")


@pytest.mark.parametrize("arguments", [
    ["smoke", "run.seed=3", "--dry-run", "run.name=x", "--address", NOWHERE],
    ["--dry-run", "smoke", "--address", NOWHERE, "run.seed=3", "run.name=x"]])
def test_a_dry_run_prints_what_would_be_submitted_and_connects_to_nothing(here, capsys, arguments):
    code, out, err = main(capsys, *arguments, "rewards=[{name: a, function: 'lib/rewards.py:good'}]")
    assert (code, err) == (0, "")
    printed = yaml.safe_load(out)
    assert (printed["run"]["seed"], printed["run"]["name"]) == (3, "x")
    assert printed["run"]["dir"] == os.path.join(here, "runs", "smoke")
    assert out.endswith(f"-m frpo train {launcher.RECIPE}\n# files to send: lib/rewards.py\n")
