"""Spread the seeds of a matrix over processes of this machine or cluster, each with engines and ranks of its own.

Stages of different seeds share only the folder of the matrix, so no process waits for another.
"""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from frpo.cluster.launcher import VISIBLE
from frpo.downstream.plan import Plan
from frpo.errors import ConfigError, EngineError
from frpo.run.stop_request import EXIT_CODE, StopRequested, asked
from frpo.telemetry.progress import ProgressBar

POLL_S = 1.0
ENDED = (0, 1)
"""Exit codes of a process that reached its end: 0, or 1 if stages failed."""
UNHEARD = -signal.SIGUSR1
"""Exit code of a process to which the request to stop came before it could hear it."""


def run_in_jobs(plan: Plan, recipe: Path, jobs: int) -> None:
    """Distribute the seeds to processes and wait for them. Their output goes to job<N>.log in the matrix's folder.

    recipe: the file of the matrix. GPUs of this machine are dealt out, those of a cluster are not. If a process broke
    off, raises EngineError after all processes have ended; the error names the log of such a process. A request to stop
    is passed on, and StopRequested is raised at the end.
    """
    seeds = [seed.seed for seed in plan.seeds]
    shares = [seeds[job::jobs] for job in range(min(jobs, len(seeds)))]
    logs = [recipe.parent / f"job{job}.log" for job in range(len(shares))]
    running = [_started(recipe, share, log, gpus) for share, log, gpus in zip(shares, logs, gpus_of_jobs(len(shares)))]
    stages, told = list(plan.stages), False
    try:
        with ProgressBar(len(stages), 0, plan.recipe.run.name) as bar:
            while True:
                alive = [process for process in running if process.poll() is None]
                done = sum(stage.done is not None for stage in stages)
                bar.progress.update(bar.task, completed=done, note=f"{len(alive)} processes")
                if asked() and not told:
                    told = True
                    for process in alive:
                        process.send_signal(signal.SIGUSR1)
                if not alive:
                    break
                time.sleep(POLL_S)
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
        for process in running:
            process.wait()
    if any(process.returncode == EXIT_CODE or (told and process.returncode == UNHEARD) for process in running):
        raise StopRequested("with all processes of the matrix")
    broken = [log for process, log in zip(running, logs) if process.returncode not in ENDED]
    if broken:
        raise EngineError(f"{len(broken)} of {len(running)} processes failed; last lines of {broken[0]}:\n"
                          + "\n".join(broken[0].read_text(encoding="utf-8", errors="replace").splitlines()[-5:]))


def gpus_of_jobs(jobs: int) -> list[dict[str, str]]:
    """Return the variables that show each process its part of the GPUs; none without GPUs, and none in a cluster."""
    if "RAY_ADDRESS" in os.environ or not torch.cuda.is_available():
        return [{}] * jobs
    count = torch.cuda.device_count()
    names = os.environ[VISIBLE].split(",")[:count] if VISIBLE in os.environ else [str(gpu) for gpu in range(count)]
    if count < jobs:
        raise ConfigError(f"--jobs {jobs}: this machine shows {count} GPU(s), less than one for each process; lower it")
    return [{VISIBLE: ",".join(names[job * count // jobs:(job + 1) * count // jobs])} for job in range(jobs)]


def _started(recipe: Path, seeds: list[int], log: Path, gpus: Mapping[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "frpo", "retention", str(recipe), f"seeds={seeds}", "--part"]
    with log.open("w", encoding="utf-8") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | gpus)
