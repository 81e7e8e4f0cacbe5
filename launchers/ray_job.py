"""Train a recipe on a running Ray cluster: submit a job, follow the job's log, end with the run's exit code.

In a checkout: `python launchers/ray_job.py RECIPE [section.key=value ...]`. With an installed frpo, write
`-m frpo.launchers.ray_job` in place of the file. The launcher starts no cluster and installs nothing on a cluster:
frpo must be importable there.
"""
from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import aiohttp
import yaml
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from frpo.cluster.runtime import show_token
from frpo.config.loader import AnyRecipe, load_training
from frpo.errors import ConfigError, EngineError, FrpoError
from frpo.run.relocation import resolved

ADDRESS = "http://127.0.0.1:8265"
RECIPE = "frpo-recipe.yaml"
"""The resolved recipe's name in the job's folder."""

RESUMES = ("auto", "force", "never", "overwrite")
"""Values of run.resume that are no path."""

STOP = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
"""Environment for Ray to stop the run as Ctrl-C does, with time for the run to end its processes."""

REQUEST_S = 60.0
"""Time limit, in seconds, for the cluster's answer to one request."""

LOST_S = 120.0
"""Most seconds for which a cluster may be out of reach before the launcher gives up."""

NO_AGENT, AGENT_S = "No available agent", 60.0
"""Answer of a cluster that has just started and cannot run jobs yet, and most seconds for which to retry."""

OFFLINE = (OSError, RuntimeError, aiohttp.ClientError)
"""Errors that Ray's client raises if the cluster does not answer, or gives a wrong answer."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Content to send to the cluster: the resolved recipe as the job must read it, and the files that it names.

    files: name in the job's folder -> file or folder on this machine.
    """

    recipe: Mapping[str, Any]
    files: Mapping[str, Path]


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit a recipe and follow the job. Returns the run's exit code; 2 with one message if submitting failed."""
    parsed = _parser().parse_intermixed_args(arguments)
    for chatty in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{chatty}").setLevel(logging.WARNING)
    try:
        recipe = load_training(parsed.recipe, parsed.overrides)
        submission = prepare(recipe, Path.cwd(), parsed.upload)
        command = entrypoint(parsed.python, recipe.COMMAND)
        if parsed.dry_run:
            print(f"{_text(submission)}# command: {command}\n# files to send: {_names(submission)}")
            return 0
        return run(connect(parsed.address), submission, command, wait=not parsed.no_wait)
    except FrpoError as error:
        _say(f"{type(error).__name__}: {error}")
        return 2
    except KeyboardInterrupt:
        _say("interrupted before anything was submitted")
        return 130


def prepare(recipe: AnyRecipe, here: Path, upload: Sequence[str] = ()) -> Submission:
    """Find the files to send with the recipe.

    Relative paths start at the folder `here`. A file is sent under its own name. The path of a folder becomes absolute,
    and the folder is read or written on the cluster's disks. Absolute paths stay as they are, for the cluster.

    Raises ConfigError for a function's file that is missing, and for files that are not below `here`.
    """
    files: dict[str, Path] = {}

    def sent(key: str, path: str, function: bool) -> str:
        name = _inside(key, path, here)
        files[name] = here / path
        if function:  # the function's file may import the files beside it
            files.update({os.path.join(os.path.dirname(name), beside.name): beside
                          for beside in sorted((here / path).parent.glob("*.py"))})
        return name

    values = resolved(recipe, here, RESUMES, sent)
    for name in upload:
        if not (here / name).exists():
            raise ConfigError(f"--upload {name!r}: there is no such file or folder in {here}")
        files[_inside("--upload", name, here)] = here / name
    return Submission(recipe=values, files=files)


def entrypoint(python: str | None, command: str = "train") -> str:
    """Return the job's shell command. command: the `frpo` command that takes the recipe.

    python: the interpreter. None: this interpreter if the head node has it at the same path, as on a shared disk or in
    containers of one image, else the head node's own.
    """
    if python is not None:
        interpreter = shlex.quote(python)
    else:
        interpreter = f'"$(command -v {shlex.quote(sys.executable)} || command -v python || command -v python3)"'
    return f"exec {interpreter} -m frpo {command} {RECIPE}"  # exec: signals and the exit code are the run's own


def connect(address: str | None) -> JobSubmissionClient:
    """Connect to the job server at `address`, else at that of Ray's environment variables, else on this machine.

    Raises EngineError if no server answers there, or if the server does not accept the token.
    """
    if address is not None:
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers this variable to any argument
    where = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ADDRESS
    try:
        show_token()
        return _Client(where)
    except AuthenticationError as error:
        raise EngineError(
            f"the cluster at {where} refuses access: {str(error).splitlines()[0]}; its token is in ~/.ray/auth_token "
            "of the user who started it; copy that file here, or set RAY_AUTH_TOKEN_PATH to a copy") from None
    except (*OFFLINE, ValueError, RayError) as error:
        raise EngineError(
            f"no Ray job server at {where}: {error}; start a cluster with `ray start --head`, or give its dashboard's "
            f"address, such as --address {ADDRESS}") from None


def run(client: JobSubmissionClient, submission: Submission, command: str, *, wait: bool) -> int:
    """Submit the job. Print the job's id, or with `wait` follow the job to its end.

    Returns the exit code. Ctrl-C stops the job first.
    """
    job = f"{re.sub('[^A-Za-z0-9_.-]', '-', submission.recipe['run']['name'])}-{secrets.token_hex(4)}"
    follower = Follower(client, job)
    try:
        submit(client, submission, command, job)
        if not wait:
            print(job)
            return 0
        return exit_code(follower.until_end())
    except KeyboardInterrupt:
        _stop(follower)
        return 130


def submit(client: JobSubmissionClient, submission: Submission, command: str, job: str) -> None:
    """Send the job and its folder. Raises EngineError if the cluster does not accept them."""
    deadline = time.monotonic() + AGENT_S
    with tempfile.TemporaryDirectory(prefix="frpo-ray-job-") as folder:
        _stage(submission, Path(folder))
        while not _taken(client, command, job, folder, deadline):
            time.sleep(1.0)
    _say(f"job {job} at {client.get_address()}; run.dir there: {submission.recipe['run']['dir']}; "
         f"files sent: {_names(submission)}")


class Follower:
    """Printer of a growing job log. Every character is printed once, even if the connection breaks in between."""

    def __init__(self, client: JobSubmissionClient, job: str):
        self.client, self.job = client, job
        self.printed = 0

    def until_end(self) -> JobDetails:
        """Follow the log until the job ends. Raises EngineError if the cluster has been out of reach for LOST_S."""
        seen = time.monotonic()
        while True:
            whole = self._follow()
            try:
                info = self.client.get_job_info(self.job)
                seen = time.monotonic()
                if info.status.is_terminal():
                    if not whole and not self._follow():
                        _say(f"the rest of the log could not be read; `ray job logs {self.job}` may have it")
                    return info
            except OFFLINE as error:
                if time.monotonic() - seen > LOST_S:
                    raise EngineError(
                        f"the cluster at {self.client.get_address()} has not answered for {LOST_S:g} s: {error}; "
                        f"`ray job status {self.job}` shows whether the job still runs") from None
            time.sleep(1.0)

    def _follow(self) -> bool:
        """Print new text until the log ends. Return False if the log could not be read to its end.

        asyncio turns Ctrl-C into a cancellation. A connection that is just being opened or closed may then raise an
        error of its own, so this method records the interrupt.
        """
        pressed, whole = False, True

        def press(number: int, frame: FrameType | None) -> None:
            nonlocal pressed
            pressed = True
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, press)
        try:
            asyncio.run(self._print())
        except OFFLINE:
            whole = False
        finally:
            signal.signal(signal.SIGINT, before)
        if pressed:
            raise KeyboardInterrupt
        return whole

    async def _print(self) -> None:
        position = 0  # the server sends the whole log at every connection
        async for text in self.client.tail_job_logs(self.job):
            print(text[max(0, self.printed - position):], end="", flush=True)
            position += len(text)
            self.printed = max(self.printed, position)


def exit_code(info: JobDetails) -> int:
    """Return the run's exit code: 128 + n if signal n ended the run, as in a shell; 130 if the job was stopped.

    A job without an exit code, such as one that never ran, gives 1.
    """
    if info.status == JobStatus.STOPPED:
        _say("the job was stopped")
        return 130
    if info.driver_exit_code is None:
        _say(f"the job {info.status.lower()} without an exit code: {info.message}")
        return 1
    return info.driver_exit_code if info.driver_exit_code >= 0 else 128 - info.driver_exit_code


class _Client(JobSubmissionClient):
    """Ray's client with a time limit on every request. Without a limit, Ray's client waits for ever."""

    def _do_request(self, *args: Any, **kwargs: Any) -> Any:
        return super()._do_request(*args, timeout=REQUEST_S, **kwargs)


def _taken(client: JobSubmissionClient, command: str, job: str, folder: str, deadline: float) -> bool:
    """Submit the job and return True, or return False if the cluster is not ready and another try may succeed.

    Raises EngineError if the cluster does not accept the job.
    """
    try:
        client.submit_job(entrypoint=command, submission_id=job, runtime_env={"working_dir": folder, "env_vars": STOP})
        return True
    except (*OFFLINE, ValueError, RayError) as error:
        unready = NO_AGENT in str(error)
        if unready and time.monotonic() < deadline:
            return False
        hint = (" Its agent does not run; another Ray on that machine may hold its port. Give `ray start` another "
                "--dashboard-agent-listen-port") if unready else ""
        raise EngineError(f"the cluster at {client.get_address()} did not accept the job: {error}{hint}") from error


def _stop(follower: Follower) -> None:
    """Stop the job and wait for its end. After a second Ctrl-C do not wait."""
    _say("interrupted: stopping the job (press Ctrl-C again to leave at once)")
    try:
        follower.client.stop_job(follower.job)
        _say(f"the job {follower.until_end().status.lower()}")
    except KeyboardInterrupt:
        _say(f"not waiting; `ray job status {follower.job}` shows whether it has ended")
    except OFFLINE as error:
        raise EngineError(f"the job could not be stopped: {error}; try `ray job stop {follower.job}`") from None


def _inside(key: str, given: str, here: Path) -> str:
    name = os.path.normpath(given)
    if os.path.isabs(name) or name.split(os.sep)[0] in ("..", "."):
        raise ConfigError(f"{key}: only files below {here} are sent, given {given!r}; submit from a folder above it, "
                          "or give an absolute path on the cluster")
    return name


def _stage(submission: Submission, folder: Path) -> None:
    """Copy the files and write the recipe into the job's folder."""
    for name, source in submission.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, folder / name, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, folder / name)
    (folder / RECIPE).write_text(_text(submission), encoding="utf-8")


def _text(submission: Submission) -> str:
    return yaml.safe_dump(dict(submission.recipe), sort_keys=False)


def _names(submission: Submission) -> str:
    return ", ".join(submission.files) or "none"


def _say(text: str) -> None:
    """Print a message of the launcher to stderr: stdout holds the job's log, or its id."""
    print(f"ray_job: {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ray_job", description="Train a recipe on a running Ray cluster.")
    parser.add_argument("recipe", help="a recipe file, or the name of one in recipes/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    parser.add_argument("--address", metavar="URL", help=f"default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or {ADDRESS}")
    parser.add_argument("--no-wait", action="store_true", help="print the job's id and leave it running")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, connect to nothing")
    parser.add_argument("--upload", action="append", default=[], metavar="PATH",
                        help="send this file or folder too, such as a module that a reward imports; repeatable")
    parser.add_argument("--python", metavar="PATH",
                        help="interpreter on the head node; default: this interpreter's path, else `python`")
    return parser


if __name__ == "__main__":
    sys.exit(main())
