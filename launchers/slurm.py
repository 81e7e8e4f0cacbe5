"""Train a recipe as a Slurm job: submit one batch script, follow the job's log, end with the run's exit code.

In a checkout: `python launchers/slurm.py RECIPE [section.key=value ...] --nodes N`. With an installed frpo, write
`-m frpo.launchers.slurm` in place of the file. The script comes from slurm_scripts/: this launcher writes only the
lines above "end of settings". Nodes need frpo, and a disk that all of them and this machine share.
"""
from __future__ import annotations

import argparse
import codecs
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from frpo.cluster.placement import Node, assign, bundles_of, reward_gpus
from frpo.config.loader import AnyRecipe, load_training
from frpo.config.sections import Recipe
from frpo.errors import ConfigError, EngineError, FrpoError
from frpo.run.relocation import resolved

SCRIPTS = Path(__file__).with_name("slurm_scripts")
END = "# --- end of settings\n"
"""Line of a script below which nothing is changed."""

TIME = re.compile(r"(?:(?P<minutes>\d+)(?::(?P<seconds>\d+))?"
                  r"|(?P<hours>\d+):(?P<m>\d+):(?P<s>\d+)"
                  r"|(?P<days>\d+)-(?P<h>\d+)(?::(?P<dm>\d+)(?::(?P<ds>\d+))?)?)")
"""Time limits as Slurm reads them: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""

SECONDS = {"days": 86400, "hours": 3600, "h": 3600, "minutes": 60, "m": 60, "dm": 60, "seconds": 1, "s": 1, "ds": 1}

REQUEUED_RESUME = {"auto": None, "force": None, "never": "auto"}
"""run.resume -> its value once the job has been requeued; None: the same. With other values a job is not requeued,
since a new start would discard the progress.
"""

FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE",
         "PREEMPTED", "REVOKED")
"""States of jobs that have ended."""

POLL_S, ASK_S = 1.0, 5.0
"""Seconds between two looks at the log, and between two questions to Slurm."""

LOST_S = 300.0
"""Most seconds for which Slurm may not answer before the launcher gives up."""

OWN = {f"{'--' if name[1:] else '-'}{name}": instead for instead, names in {
    "--nodes": "nodes N", "--ranks-per-node": "ntasks n ntasks-per-node ntasks-per-gpu", "--time": "time t",
    "--cpus-per-node": "cpus-per-task c", "--gpus-per-node": "gpus G gpus-per-node gpus-per-task",
    "--partition": "partition p", "--account": "account A", "--qos": "qos q", "--signal-before": "signal",
    "--max-requeues": "requeue no-requeue", "--container": "container", "run.name=NAME": "job-name J",
    "run.dir=FOLDER": "output o error e",
    "": "array a chdir D clusters M open-mode wait W wrap test-only help h usage version V"}.items()
    for name in names.split()}
"""Option of sbatch that --sbatch may not hold -> what to give instead; "": nothing, the launcher cannot do this."""

UNTESTED = "Containers were not tried."


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked of Slurm. tasks: processes of a node; with Ray one. cpus: CPUs of a node; None: whole nodes.

    warn_s: seconds before the time limit at which the run saves a checkpoint and stops; 0: never.
    """

    nodes: int
    tasks: int
    gpus: int
    cpus: int | None
    time: str | None
    warn_s: int
    max_requeues: int
    more: Sequence[str]
    container: str | None
    container_kind: str | None
    setup: str | None
    python: str | None


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Files to write. The job's log will lie beside them, named after the job's number."""

    script: str
    recipe: str
    script_path: Path
    recipe_path: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit a recipe and follow the job. Returns the run's exit code; 2 with one message if submitting failed."""
    parsed = _parser().parse_intermixed_args(arguments)
    try:
        recipe = load_training(parsed.recipe, parsed.overrides)
        job = job_of(parsed, recipe)
        check_gpus(recipe, job)
        submission = prepare(recipe, job, Path.cwd())
        if parsed.dry_run:
            print(submission.script, end="")
            return 0
        return run(submission, wait=not parsed.no_wait)
    except FrpoError as error:
        _say(f"{type(error).__name__}: {error}")
        return 2
    except KeyboardInterrupt:
        _say("interrupted before anything was submitted")
        return 130


def job_of(parsed: argparse.Namespace, recipe: AnyRecipe) -> Job:
    """Return the job that the options describe. Raises ConfigError for options that do not fit together."""
    more = [f"--{name}={value}" for name in ("partition", "account", "qos")
            if (value := getattr(parsed, name)) is not None]
    for option in (*more, *parsed.sbatch):
        if not option.startswith("-") or "\n" in option:
            raise ConfigError(f"--sbatch {option!r}: an option of sbatch is needed, such as --sbatch=--constraint=a100")
    for option in parsed.sbatch:
        _refuse_own(option)
    if (parsed.container is None) != (parsed.container_kind is None):
        raise ConfigError("--container IMAGE needs --container-kind pyxis or apptainer, and the other way round")
    if parsed.time is not None and seconds_of(parsed.time) <= parsed.signal_before:
        raise ConfigError(f"--time {parsed.time} is not longer than --signal-before {parsed.signal_before} s, so the "
                          "run would be stopped at once; raise the first or lower the second")
    if parsed.ranks_per_node is not None and on_ray(recipe):
        raise ConfigError(f"--ranks-per-node: this run of `frpo {recipe.COMMAND}` has its ranks in Ray; set "
                          "learner.num_ranks" + ("" if isinstance(recipe, Recipe) else
                                                 ", or learner.ranks to launcher for one process a rank"))
    tasks = 1 if on_ray(recipe) else parsed.ranks_per_node or parsed.gpus_per_node or 1
    if parsed.cpus_per_node is not None and parsed.cpus_per_node < tasks:
        raise ConfigError(f"--cpus-per-node {parsed.cpus_per_node} is less than one CPU for each of the {tasks} ranks "
                          "of a node; raise it")
    return Job(nodes=parsed.nodes, tasks=tasks, gpus=parsed.gpus_per_node, cpus=parsed.cpus_per_node, time=parsed.time,
               warn_s=parsed.signal_before, max_requeues=parsed.max_requeues, more=[*more, *parsed.sbatch],
               container=parsed.container, container_kind=parsed.container_kind, setup=parsed.setup,
               python=parsed.python)


def _refuse_own(option: str) -> None:
    """Raise ConfigError for an option of sbatch that this launcher sets, or with which it could not follow the job."""
    for word in re.sub("\"[^\"]*\"|'[^']*'", "", option).split():
        name = word.partition("=")[0] if word.startswith("--") else word[:2]
        for own, instead in OWN.items():
            if name == own or (len(name) > 4 and own.startswith(name)):  # sbatch reads --arr as --array
                instead = f"give {instead} without --sbatch" if instead else f"submit a copy of a script of {SCRIPTS}"
                raise ConfigError(f"--sbatch {option!r}: {own} is set by this launcher, or would stop it from "
                                  f"following the job; {instead}")


def on_ray(recipe: AnyRecipe) -> bool:
    """Return whether the job starts Ray. Otherwise srun starts one process for each rank."""
    return isinstance(recipe, Recipe) or recipe.learner.ranks == "ray"


def check_gpus(recipe: AnyRecipe, job: Job) -> None:
    """Raise ConfigError if the recipe does not fit on the GPUs of the job, or uses none of them.

    Print a line if the job would train on the CPU without being told to.
    """
    if recipe.run.device == "cpu" and job.gpus:
        raise ConfigError(f"--gpus-per-node {job.gpus}: the recipe has run.device: cpu and would use no GPU; leave the "
                          "option out, or set run.device to cuda")
    if recipe.run.device == "cuda" and not job.gpus:
        raise ConfigError("run.device: cuda needs GPUs; give --gpus-per-node")
    if not job.gpus:
        if recipe.run.device == "auto":
            _say("the job asks for no GPU and will train on the CPU (run.device: auto); for GPUs give --gpus-per-node")
        return
    if not on_ray(recipe):
        if job.tasks > job.gpus:
            raise ConfigError(f"--ranks-per-node {job.tasks}: every rank needs a GPU, but --gpus-per-node is "
                              f"{job.gpus}; make them equal")
        return
    held, nodes = reward_gpus(recipe), list[Node]()
    for number in range(job.nodes, 0, -1):
        taken = min(held, job.gpus)
        nodes.insert(0, Node(address=f"node {number}", gpus=job.gpus - taken))
        held -= taken
    try:
        # The addresses of the nodes are not known yet.
        assign([replace(bundle, hosts=None) for bundle in bundles_of(recipe)], nodes, reward_gpus(recipe))
    except ConfigError as error:
        raise ConfigError(f"{error}; or ask for more by --nodes and --gpus-per-node, given {job.nodes} and "
                          f"{job.gpus}") from None


def seconds_of(limit: str) -> int:
    """Return a time limit in seconds. Raises ConfigError unless Slurm would read it as a time."""
    found = TIME.fullmatch(limit)
    if not found:
        raise ConfigError(f"--time {limit!r}: give hours:minutes:seconds, such as 24:00:00, or days-hours, such as 2-0")
    return sum(int(value) * SECONDS[name] for name, value in found.groupdict().items() if value is not None)


def prepare(recipe: AnyRecipe, job: Job, here: Path) -> Submission:
    """Render the script and the recipe that it trains. Relative paths start at the folder `here`.

    Raises ConfigError for a function's file that is missing, for a path that sbatch cannot read, and for a --setup
    that is not valid bash.
    """
    values = absolute(recipe, here)
    text = yaml.safe_dump(dict(values), sort_keys=False)
    folder = Path(values["run"]["dir"]) / "slurm"
    name = hashlib.sha256(text.encode()).hexdigest()[:8]
    recipe_path = folder / f"recipe-{name}.yaml"
    script = render(recipe, job, here, recipe_path)
    name = hashlib.sha256(script.encode()).hexdigest()[:8]
    return Submission(script=script, recipe=text, script_path=folder / f"job-{name}.sbatch", recipe_path=recipe_path)


def absolute(recipe: AnyRecipe, here: Path) -> dict[str, Any]:
    """Return the recipe's values with absolute paths in place of the relative ones. Raises ConfigError."""
    return resolved(recipe, here, (*REQUEUED_RESUME, "overwrite"),
                    lambda key, path, function: os.path.normpath(here / path))


def render(recipe: AnyRecipe, job: Job, here: Path, recipe_path: Path) -> str:
    """Return the batch script: that of slurm_scripts/ with this job's lines above "end of settings"."""
    template = (SCRIPTS / ("rl.sbatch" if on_ray(recipe) else "finetune.sbatch")).read_text(encoding="utf-8")
    resume = recipe.run.resume
    requeued = resume in REQUEUED_RESUME
    lines = ["#!/bin/bash", f"# Written by frpo's slurm launcher: frpo {recipe.COMMAND}, {_line(recipe.run.name)}",
             "# shellcheck disable=SC2317,SC2329  # traps and steps call the functions",
             *(f"#SBATCH {line}" for line in directives(recipe, job, here, recipe_path.parent, requeued)), ""]
    again = REQUEUED_RESUME.get(resume)
    if not requeued:
        lines.append(f"# Not requeued: a new start with run.resume={_line(resume)} would discard the progress.")
    lines += [_array("command", recipe.COMMAND, str(recipe_path)),
              _array("again", *([f"run.resume={again}"] if again else [])),
              f"folder={shlex.quote(str(recipe_path.parent))}", *_python(job),
              *([f"gpus={job.gpus}"] if on_ray(recipe) else []),
              f"max_requeues={job.max_requeues if requeued else 0}",
              *_container(job, here, recipe_path.parent.parent), "setup() {", f"    {job.setup or ':'}", "}"]
    script = "\n".join(lines) + "\n" + template[template.index(END):]
    wrong = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    if wrong.returncode != 0:
        raise ConfigError(f"--setup {job.setup!r} is not valid bash: {wrong.stderr.strip().splitlines()[-1]}")
    return script


def directives(recipe: AnyRecipe, job: Job, here: Path, folder: Path, requeued: bool) -> list[str]:
    """Return the options of sbatch for the script."""
    name = re.sub("[^A-Za-z0-9_.-]", "-", recipe.run.name)
    log = str(folder).replace("%", "%%")
    share = ["--exclusive", "--mem=0"] if job.cpus is None else [f"--cpus-per-task={job.cpus // job.tasks}"]
    return [f"--job-name={name}", f"--nodes={job.nodes}", f"--ntasks-per-node={job.tasks}",
            *([f"--gpus-per-node={job.gpus}"] if job.gpus else []), *share,
            *([f"--time={job.time}"] if job.time else []), f"--chdir={_quoted(str(here))}",
            f"--output={_quoted(f'{log}/%j.log')}", "--open-mode=append", "--requeue" if requeued else "--no-requeue",
            *(["--no-kill"] if on_ray(recipe) else []),
            *([f"--signal=B:USR1@{job.warn_s}"] if job.warn_s else []), *job.more]


def run(submission: Submission, *, wait: bool) -> int:
    """Submit the job. Print the job's number, or with `wait` follow the job to its end.

    Returns the exit code. Ctrl-C cancels the job first.
    """
    follower = None
    try:
        number = submit(submission)
        follower = Follower(number, submission.script_path.parent / f"{number}.log")
        _say(f"job {number}; log: {follower.log}")
        if not wait:
            print(number)
            return 0
        return exit_code(follower.until_end())
    except KeyboardInterrupt:
        if follower is None:
            _say("interrupted while submitting: sbatch may have accepted the job; `squeue --me` shows whether it has")
        else:
            _cancel(follower)
        return 130


def submit(submission: Submission) -> str:
    """Write the files, submit the script, and return the job's number. Raises EngineError if Slurm refuses it."""
    if shutil.which("sbatch") is None:
        raise EngineError("there is no `sbatch` on this machine; submit from a login node of a Slurm cluster, or print "
                          "the script with --dry-run")
    folder = submission.script_path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        submission.recipe_path.write_text(submission.recipe, encoding="utf-8")
        submission.script_path.write_text(submission.script, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run.dir: {folder} cannot be written ({error.strerror}); give another run.dir") from None
    done = _slurm("sbatch", "--parsable", str(submission.script_path))
    if done.returncode != 0:
        raise EngineError(f"sbatch did not accept {submission.script_path}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


@dataclass(frozen=True, kw_only=True)
class State:
    """What Slurm tells of a job. name: such as RUNNING. code, signal: of its script. restarts: times requeued."""

    name: str
    code: int
    signal: int
    restarts: int
    reason: str
    nodes: str


class Follower:
    """Printer of a job's log while it grows, and of changes of the job's state."""

    def __init__(self, number: str, log: Path):
        self.number, self.log = number, log
        self.position = 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.told = ""

    def until_end(self) -> State:
        """Follow the log until the job ends. Raises EngineError if Slurm has not answered for LOST_S, or has forgotten
        the job.
        """
        asked = seen = time.monotonic()
        while True:
            self._print()
            if time.monotonic() >= asked:
                asked = time.monotonic() + ASK_S
                state = self._state()
                if state is not None:
                    seen = time.monotonic()
                    self._tell(state)
                    if state.name in FINAL:
                        time.sleep(POLL_S)  # for the end of the log to arrive here from another machine
                        self._print()
                        return state
                elif time.monotonic() - seen > LOST_S:
                    raise EngineError(f"Slurm has not answered for {LOST_S:g} s; `squeue -j {self.number}` shows "
                                      f"whether the job still runs; its log: {self.log}")
            time.sleep(POLL_S)

    def _state(self) -> State | None:
        done = _slurm("scontrol", "show", "job", "--oneliner", self.number)
        if "Invalid job id" in done.stderr:
            raise EngineError(f"Slurm has forgotten job {self.number}; `sacct -j {self.number}` may have its exit "
                              f"code; its log: {self.log}")
        return state_of(done.stdout) if done.returncode == 0 else None

    def _tell(self, state: State) -> None:
        again = f", start {state.restarts + 1}" if state.restarts else ""
        why = "" if state.reason in ("", "None") else f" ({state.reason})"
        told = (f"running on {state.nodes}{again}" if state.name == "RUNNING" else
                f"waits{why}{again}" if state.name in ("PENDING", "REQUEUED") else "")
        if told and told != self.told:
            _say(f"job {self.number} {told}")
        self.told = told or self.told

    def _print(self) -> None:
        try:
            with self.log.open("rb") as file:
                file.seek(self.position)
                new = file.read()
        except OSError:
            return  # not there yet, or its disk does not answer
        self.position += len(new)
        print(self.decoder.decode(new), end="", flush=True)


def state_of(shown: str) -> State:
    """Read the one line of `scontrol show job --oneliner`."""
    fields = dict(re.findall(r"(?:^| )(\w+)=(\S*)", shown))
    code, _, signal = fields["ExitCode"].partition(":")
    return State(name=fields["JobState"], code=int(code), signal=int(signal), restarts=int(fields.get("Restarts", 0)),
                 reason=fields.get("Reason", ""), nodes=fields.get("NodeList", ""))


def exit_code(state: State) -> int:
    """Return the run's exit code: 128 + n if signal n ended the script, as in a shell; 130 if the job was cancelled.

    A job that ended otherwise and without an exit code, such as by its time limit, gives 1.
    """
    if state.name == "CANCELLED":
        _say("the job was cancelled")
        return 130
    code = state.code or (128 + state.signal if state.signal else 0)
    if state.name not in ("COMPLETED", "FAILED"):
        _say(f"the job ended by {state.name}")
        return code or 1
    return code


def _cancel(follower: Follower) -> None:
    """Cancel the job and wait for its end. After a second Ctrl-C do not wait."""
    _say("interrupted: cancelling the job (press Ctrl-C again to leave at once)")
    try:
        done = _slurm("scancel", follower.number)
        if done.returncode != 0:
            raise EngineError(f"the job could not be cancelled: {done.stderr.strip()}; try `scancel "
                              f"{follower.number}`")
        _say(f"the job ended: {follower.until_end().name}")
    except KeyboardInterrupt:
        _say(f"not waiting; `squeue -j {follower.number}` shows whether it has ended")


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm. A Ctrl-C reaches this process alone."""
    return subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)


def _line(text: str) -> str:
    """Return the text as one line, for a comment."""
    return " ".join(text.split())


def _array(name: str, *values: str) -> str:
    return f"{name}=({' '.join(map(shlex.quote, values))})"


def _python(job: Job) -> list[str]:
    if job.python is not None:
        return [f"python={shlex.quote(job.python)}"]
    if job.container is not None:
        return ["python=python"]
    return [f"python={shlex.quote(sys.executable)}",
            '[ -x "$python" ] || python=python  # of a node that does not have the submitting machine\'s']


def _container(job: Job, here: Path, run_dir: Path) -> list[str]:
    seen = dict.fromkeys((str(here), str(run_dir)))  # folders that the container needs
    apptainer, pyxis = [], []
    if job.container_kind == "apptainer":
        apptainer = ["apptainer", "exec", "--nv", *(word for path in seen for word in ("--bind", path)),
                     str(job.container)]
    if job.container_kind == "pyxis":
        pyxis = [f"--container-image={job.container}", f"--container-workdir={here}",
                 f"--container-mounts={','.join(f'{path}:{path}' for path in (*seen, '/tmp'))}"]
    return [_array("container", *apptainer), _array("pyxis", *pyxis)]


def _quoted(path: str) -> str:
    """Return a path as sbatch reads it. Raises ConfigError for characters that it cannot read."""
    if set(path) & set('"\\\n'):
        raise ConfigError(f"sbatch cannot read a path with quotes, backslashes or line ends, given {path!r}; use "
                          "another folder")
    return f'"{path}"'


def _say(text: str) -> None:
    """Print a message of the launcher to stderr: stdout holds the job's log, or its number."""
    print(f"slurm: {text}", file=sys.stderr, flush=True)


def _number(least: int) -> Any:
    def read(text: str) -> int:
        if not (text.isdecimal() and int(text) >= least):
            raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, given {text!r}")
        return int(text)

    return read


OPTIONS: Mapping[str, dict[str, Any]] = {
    "--nodes": {"type": _number(1), "required": True, "metavar": "N", "help": "number of nodes"},
    "--gpus-per-node": {"type": _number(0), "default": 0, "metavar": "G", "help": "GPUs of each node; default: 0"},
    "--cpus-per-node": {"type": _number(1), "metavar": "C",
                        "help": "CPUs of each node, rounded down to a multiple of the ranks; default: whole nodes"},
    "--ranks-per-node": {"type": _number(1), "metavar": "R",
                         "help": "processes of each node, with learner.ranks: process or launcher; default: one for "
                                 "each GPU, or 1"},
    "--time": {"metavar": "HH:MM:SS", "help": "time limit; default: that of the partition"},
    "--partition": {"metavar": "P", "help": "partition"},
    "--account": {"metavar": "A", "help": "account"},
    "--qos": {"metavar": "Q", "help": "quality of service"},
    "--sbatch": {"action": "append", "default": [], "metavar": "OPTION",
                 "help": "further option of sbatch, such as --sbatch=--constraint=a100; repeatable"},
    "--signal-before": {"type": _number(0), "default": 300, "metavar": "SECONDS",
                        "help": "this long before the time limit the run saves a checkpoint and the job requeues "
                                "itself; 0: never; default: 300"},
    "--max-requeues": {"type": _number(0), "default": 20, "metavar": "N",
                       "help": "most times that the job requeues itself; default: 20"},
    "--container": {"metavar": "IMAGE", "help": f"run in this image. {UNTESTED}"},
    "--container-kind": {"choices": ["pyxis", "apptainer"],
                         "help": f"pyxis: by srun --container-image; apptainer: by apptainer exec --nv. {UNTESTED}"},
    "--setup": {"metavar": "LINE", "help": "shell line to run first on each node, such as 'source env.sh'"},
    "--python": {"metavar": "PATH",
                 "help": "interpreter on the nodes; default: this interpreter's path, else `python`"},
    "--dry-run": {"action": "store_true", "help": "print the script; write and submit nothing"},
    "--no-wait": {"action": "store_true", "help": "print the job's number and leave it running"},
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slurm", description="Train a recipe as a Slurm job.")
    parser.add_argument("recipe", help="a recipe file, or the name of one in recipes/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    for name, option in OPTIONS.items():
        parser.add_argument(name, **option)
    return parser


if __name__ == "__main__":
    sys.exit(main())
