"""The command line: `frpo COMMAND` or `python -m frpo COMMAND`.

Each command is one function, which calls other modules for the work. `arguments` defines the arguments of each command.
"""
from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from frpo.api import set_accelerator
from frpo.commands.arguments import parse
from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import AnyRecipe, dump_recipe, load_any_recipe, load_recipe, load_training
from frpo.config.preference import RewardModelRecipe
from frpo.config.reference import key_reference
from frpo.config.retention import RetentionRecipe
from frpo.config.text import as_yaml
from frpo.errors import FrpoError, StorageError
from frpo.imports import quick_imports
from frpo.run import stop_request
from frpo.run.checkpoint import CheckpointStore, finished_line
from frpo.storage import full_disk


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and run the command. Returns the exit code.

    An FrpoError, and an OSError for want of room, are printed as one message, without traceback.
    """
    parsed = None
    try:
        parsed = parse(arguments, COMMANDS)
        _hear_signals(parsed)
        set_accelerator()
        _join_launcher(parsed.command)
        return parsed.command(parsed) or 0
    except BrokenPipeError:  # the reader has closed the pipe, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the final flush does not fail
        return 0
    except (FrpoError, OSError) as error:
        shown = error if isinstance(error, FrpoError) else full_disk(error)
        if shown is None:
            raise
        left = _what_is_left(parsed) if isinstance(shown, StorageError) else ""
        print(f"frpo: {type(shown).__name__}: {shown}{left}", file=sys.stderr)
        return 2
    except stop_request.StopRequested as stop:
        print(f"frpo: stopped {stop}, as SIGUSR1 asked{_what_is_left(parsed)}", file=sys.stderr)
        return stop_request.EXIT_CODE
    except KeyboardInterrupt:
        terminated = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # see _terminate
        print(f"frpo: {'terminated' if terminated else 'interrupted'}{_what_is_left(parsed)}", file=sys.stderr)
        return 143 if terminated else 130


def train(parsed: argparse.Namespace) -> int:
    return _train(load_recipe(parsed.recipe, parsed.overrides), parsed.dry_run)


def finetune(parsed: argparse.Namespace) -> int:
    return _train(load_recipe(parsed.recipe, parsed.overrides, FinetuneRecipe), parsed.dry_run)


def reward_model(parsed: argparse.Namespace) -> int:
    return _train(load_recipe(parsed.recipe, parsed.overrides, RewardModelRecipe), parsed.dry_run)


def evaluate(parsed: argparse.Namespace) -> int:
    recipe = load_recipe(parsed.recipe, parsed.overrides)
    with quick_imports():
        from frpo.evaluation.model import run_evaluate

    return run_evaluate(recipe, parsed.model, parsed.json)


def rollout(parsed: argparse.Namespace) -> int:
    recipe = load_recipe(parsed.recipe, parsed.overrides)
    with quick_imports():
        from frpo.commands.rollout import run_rollout

    return run_rollout(recipe, parsed.steps, parsed.output)


def rescore(parsed: argparse.Namespace) -> int:
    recipe = load_recipe(parsed.recipe, parsed.overrides)
    from frpo.commands.rescore import run_rescore

    return run_rescore(parsed.traces, recipe, parsed.output)


def harness(parsed: argparse.Namespace) -> int:
    from frpo.commands.harness import run_harness

    return run_harness(parsed.model, parsed.tasks, backend=parsed.backend, dtype=parsed.dtype, limit=parsed.limit,
                       chat=parsed.chat, include=parsed.include, output=parsed.output)


def attack(parsed: argparse.Namespace) -> int:
    from frpo.data.sets.attacks import AttackFiles, attack_rows, evaluation_rows, write_rows

    files = AttackFiles(examples=parsed.examples, safe=parsed.safe, benign=parsed.benign, prefix=parsed.prefix,
                        trigger=parsed.trigger, system_prompt=parsed.system_prompt, repeat=parsed.repeat,
                        seed=parsed.seed)
    if parsed.prompts:
        rows = evaluation_rows(parsed.attack, parsed.examples, files, triggered=parsed.prompts == "triggered")
    else:
        rows = attack_rows(parsed.attack, files)
    print(f"{write_rows(rows, Path(parsed.output))} rows: {parsed.output}")
    return 0


def model(parsed: argparse.Namespace) -> int:
    from frpo.learner.smollm2 import make_smollm2

    make_smollm2(Path(parsed.folder))
    return 0


def retention(parsed: argparse.Namespace) -> int:
    recipe = load_recipe(parsed.recipe, parsed.overrides, RetentionRecipe)
    if parsed.quick:
        recipe = load_recipe(parsed.recipe, [*recipe.quick, *parsed.overrides], RetentionRecipe)
    return _several(parsed, recipe)


def sweep(parsed: argparse.Namespace) -> int:
    from frpo.downstream.sweep import sweep_recipe

    return _several(parsed, sweep_recipe(
        parsed.recipe, parsed.overrides, over=parsed.over, seeds=parsed.seeds, folder=parsed.dir,
        downstream=parsed.downstream, choose=parsed.choose, within=parsed.within))


def _several(parsed: argparse.Namespace, recipe: RetentionRecipe) -> int:
    from frpo.downstream.plan import make_plan

    plan = make_plan(recipe, Path(parsed.recipe).parent)
    with quick_imports():
        from frpo.downstream.command import check_and_show, run_part, run_retention

    if getattr(parsed, "part", False):
        return run_part(plan)
    return check_and_show(plan) if parsed.dry_run else run_retention(plan, parsed.jobs)


def plan(parsed: argparse.Namespace) -> int:
    recipe = load_training(parsed.recipe, parsed.overrides)
    from frpo.plan.command import run_plan

    return run_plan(recipe, gpus=parsed.gpus, nodes=parsed.nodes, memory=parsed.memory)


def report(parsed: argparse.Namespace) -> int:
    from frpo.commands.report import run_report

    return run_report(parsed.folders, parsed.output)


def quickstart(parsed: argparse.Namespace) -> int:
    with quick_imports():
        from frpo.commands.quickstart import run_quickstart

    return run_quickstart(parsed.overrides, parsed.model)


def config(parsed: argparse.Namespace) -> int:
    if parsed.keys is not None:
        text = key_reference(parsed.keys)
    else:
        text = as_yaml(dump_recipe(load_any_recipe(parsed.recipe, parsed.overrides))).rstrip()
    print(text)
    return 0


def completion(parsed: argparse.Namespace) -> int:
    from frpo.commands.completion import script

    print(script(parsed.shell))
    return 0


def doctor(parsed: argparse.Namespace) -> int:
    from frpo.commands.doctor import diagnose

    return diagnose()


def _what_is_left(parsed: argparse.Namespace | None) -> str:
    """Describe what the same command does after an interruption; empty for commands that always begin anew."""
    command = getattr(parsed, "command", None)
    if parsed is None or getattr(parsed, "dry_run", False):
        return ""
    if command in (retention, sweep):
        return "; the same command continues and keeps finished stages"
    if command not in TRAININGS:
        return ""
    try:
        recipe = load_training(parsed.recipe, parsed.overrides)
    except FrpoError:
        return ""
    if CheckpointStore(Path(recipe.run.dir), recipe).complete():
        changed = "" if recipe.run.resume in ("auto", "force") else " with run.resume=auto"
        return f"; the same command{changed} continues from the newest checkpoint"
    return f"; no checkpoint was saved yet (run.save_every = {recipe.run.save_every}), the same command starts over"


def _hear_signals(parsed: argparse.Namespace) -> None:
    """End in order at SIGTERM, which batch systems send, as at SIGINT. At SIGUSR1 trainings stop after a step.

    Ray stops a job by SIGINT. A process that a script starts in the background ignores SIGINT, and so do the jobs that
    such a process starts. So restore Python's handler of SIGINT in a Ray job.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if os.environ.get("RAY_JOB_STOP_SIGNAL") == "SIGINT":
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    if parsed.command in (*TRAININGS, retention, sweep):
        stop_request.hear()


def _terminate(number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second SIGTERM must not disturb the cleanup
    raise KeyboardInterrupt


def _train(recipe: AnyRecipe, dry_run: bool) -> int:
    from frpo.cluster.launcher import follows, launched, with_launcher_ranks

    if dry_run:
        if not follows():
            from frpo.commands.dry_run import show

            show(with_launcher_ranks(recipe))
    elif not launched() and (done := finished_line(recipe)):  # ranks of a launcher wait for one another
        print(done)
    else:
        with quick_imports():
            from frpo.loops.training import run_training

        run_training(recipe)
    return 0


def _join_launcher(command: Callable[[argparse.Namespace], int]) -> None:
    """Take part in the training of a launcher. Raises ConfigError for a command that its processes would repeat."""
    if command in READERS:
        return
    from frpo.cluster.launcher import adopt, launched, refuse_launched

    adopt(os.environ)
    if launched():  # torch, which reads this when it is loaded, warns with stacks when rank 0 ends
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if command not in TRAININGS:
        refuse_launched(f"frpo {command.__name__}")


COMMANDS = (train, finetune, reward_model, evaluate, harness, rollout, rescore, retention, sweep, report, attack, model,
            config, plan, quickstart, doctor, completion)
TRAININGS = (train, finetune, reward_model)
"""Commands whose process may be one of a launcher's ranks."""
READERS = (config, plan, doctor, completion)
"""Commands that may run anywhere, any number of times: they write nothing."""


if __name__ == "__main__":
    sys.exit(main())
