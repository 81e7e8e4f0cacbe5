"""The command-line arguments of every command, and their meanings."""
from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import NoReturn

from frpo.loading import nearest

RECIPE = "a recipe file, or the name of one in recipes/"
EXIT_CODES = """exit codes:
  0    done
  1    done, but a stage of a matrix failed, the quick start saw no gain, doctor found a mismatch or a plan does not
       fit; an error of Python's own
  2    an error that the message explains: usage, recipe, data, model, machine
  130  interrupted (Ctrl-C); the same command goes on from the newest checkpoint
  143  the same, by SIGTERM"""
RECIPE_COMMANDS = {"finetune": "finetune", "retention": "retention"}
"""Commands whose recipes are of another kind than the recipes of train -> that kind."""
EXAMPLES = {"train": "smoke", "finetune": "finetune_gsm8k data.path=gsm8k.jsonl", "retention": "lab --quick",
            "rollout": "smoke", "config": "smoke", "evaluate": "runs/smoke/export smoke",
            "rescore": "runs/smoke/traces.jsonl smoke", "plan": "smoke --gpus 3 --memory 80",
            "sweep": "smoke --over learner.lr=[1e-5,1e-4]"}
MODEL = "a folder with a Hugging Face model, such as a run's export, or a hub id"


def parse(arguments: Sequence[str] | None, commands: Sequence[Callable[..., object]]) -> argparse.Namespace:
    """Parse the command line. `parsed.command` is the requested function of `commands`.

    Overrides may stand anywhere. argparse leaves overrides behind an option unparsed; they are added here.
    """
    parser = _Parser(prog="frpo", description="Post-training that survives the next fine-tuning.", epilog=EXIT_CODES,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"frpo {version('frpo')}")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # from the deepspeed launcher; equal to LOCAL_RANK
    listed = _Commands(parser, commands)
    for describe in (_trainings, _evaluations, _parts_alone, _several_trainings, _others):
        describe(listed)
    if "_ARGCOMPLETE" in os.environ:  # a shell requests completions
        from frpo.commands.completion import complete

        complete(parser, RECIPE_COMMANDS)
    parsed, rest = parser.parse_known_args(arguments)
    unknown = [item for item in rest if not hasattr(parsed, "overrides") or "=" not in item or item[0] == "-"]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_as_override(unknown[0], parsed)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    if getattr(parsed, "overwrite", False):
        given = [value for value in parsed.overrides if value.startswith("run.resume=")]
        if given and given != ["run.resume=overwrite"]:
            parser.error(f"--overwrite starts over and {given[0]} says otherwise; leave one of them out")
        parsed.overrides = [*parsed.overrides, "run.resume=overwrite"]
    return parsed


class _Parser(argparse.ArgumentParser):
    """A parser that lists the known recipes if the recipe is missing, and the commands if the command is missing."""

    def error(self, message: str) -> NoReturn:
        missing = message.partition("the following arguments are required: ")[2].split(", ")
        if "recipe" in missing:
            from frpo.config.loader import recipe_names

            command = self.prog.split()[-1]
            names = recipe_names(RECIPE_COMMANDS.get(command, "train"))
            message = message.replace(", section.key=value", "")  # argparse also lists optional arguments as missing
            message += (f"\nGive a recipe: a YAML file, or the name of one: {', '.join(names)}."
                        f"\nFor example: {self.prog} {EXAMPLES.get(command, names[0])}")
        if "COMMAND" in missing:
            self.print_help(sys.stderr)
        if (wrong := re.search(r"invalid choice: '(\S+)' \(choose from (.*)\)", message)) and (
                near := nearest(wrong[1], re.findall(r"[\w-]+", wrong[2]))):
            message += f"\nDid you mean {near}?"
        super().error(message)


def _as_override(argument: str, parsed: argparse.Namespace) -> str:
    """Describe how to write an unknown option as an override.

    Name the key if the option is a recipe key or another framework's name of a key. Name an option of frpo if the
    spelling differs only in hyphens or underscores.
    """
    if not hasattr(parsed, "overrides"):
        return ""
    if not argument.startswith("--"):
        name, _, value = argument.partition(":")
        return f"; values of a recipe are written with =, this one as {name}={value or 'VALUE'}" if "." in name else ""
    from frpo.config.keys import keys
    from frpo.config.loader import KINDS
    from frpo.config.other_names import ours

    name = argument.lstrip("-").partition("=")[0].replace("-", "_")
    known = [key.name for kind in KINDS for key in keys(kind)]
    key = name if name in known else ours(name, known) or next(
        (each for each in known if each.endswith(f".{name}") and "[]" not in each and ".NAME" not in each), None)
    options = [option for option in ("--dry-run", "--overwrite", "--keys", "--jobs", "--json", "--quick")
               if option.replace("-", "") == argument.partition("=")[0].replace("-", "").replace("_", "")]
    if options:
        return f"; did you mean {options[0]}?"
    return f"; values of a recipe are written as section.key=value{f', this one as {key}=VALUE' if key else ''}"


class _Commands:
    def __init__(self, parser: argparse.ArgumentParser, functions: Sequence[Callable[..., object]]):
        self.parsers = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
        self.functions = {function.__name__: function for function in functions}

    def add(self, name: str, description: str) -> argparse.ArgumentParser:
        command = self.parsers.add_parser(name, help=description, description=description)
        command.set_defaults(command=self.functions[name])
        return command

    def add_with_recipe(self, name: str, description: str, before: tuple[str, str] | None = None, use: str = ""
                        ) -> argparse.ArgumentParser:
        """Add a command that takes a recipe.

        before: name and meaning of an argument before the recipe. use: the parts of the recipe that the command uses.
        """
        command = self.add(name, description)
        if before:
            command.add_argument(before[0], help=before[1])
        command.add_argument("recipe", help=RECIPE + (use and f": {use}"))
        _overrides(command)
        return command


def _trainings(commands: _Commands) -> None:
    command = commands.add_with_recipe("train", "train a policy with reinforcement learning")
    command.add_argument("--dry-run", action="store_true", help="check everything that needs no engine, then stop")
    _overwrite(command)
    command = commands.add_with_recipe("finetune", "fine-tune a model on given responses: SFT, CSFT, CSFT+PA")
    command.add_argument("--dry-run", action="store_true", help="check everything that needs no model, then stop")
    _overwrite(command)


def _evaluations(commands: _Commands) -> None:
    command = commands.add_with_recipe("evaluate", "score a model on a recipe's held-out prompts, without a learner",
                                       ("model", MODEL), "prompts, rewards, sampling")
    command.add_argument("--json", metavar="PATH", help="file for the metrics; default: evaluation.json in MODEL")
    command = commands.add("harness", "run tasks of lm-evaluation-harness on a model, if that is installed")
    command.add_argument("model", help=MODEL)
    command.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="names of its tasks")
    command.add_argument("--include", metavar="FOLDER", help="where tasks of your own lie")
    command.add_argument("--backend", choices=["hf", "vllm"], default="hf", help="default: hf, in this process")
    command.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="precision; default: bf16")
    command.add_argument("--limit", type=_count, metavar="N", help="only the first documents of each task")
    command.add_argument("--chat", action="store_true", help="apply the chat template")
    command.add_argument("--output", metavar="FILE", help="file for the metrics; default: harness.json in MODEL")


def _parts_alone(commands: _Commands) -> None:
    command = commands.add_with_recipe("rollout", "sample and score a run's first steps, without a learner")
    command.add_argument("--steps", type=_count, default=1, metavar="N", help="steps to sample; default: 1")
    command.add_argument("--output", metavar="PATH", help="new file for the groups; default: rollouts.jsonl in run.dir")
    command = commands.add_with_recipe(
        "rescore", "score the groups of a trace file again, without engines",
        ("traces", "traces.jsonl of a run, or what rollout or evaluate wrote"), "rewards, advantage")
    command.add_argument("--output", metavar="PATH", help="new file for the groups with their new values")


def _several_trainings(commands: _Commands) -> None:
    command = commands.add_with_recipe(
        "retention", "train policies, fine-tune forks of them, measure and report what they keep")
    command.add_argument("--quick", action="store_true", help="the recipe's short form")
    command.add_argument("--part", action="store_true", help=argparse.SUPPRESS)  # set for each process of --jobs
    _many(command)
    command = commands.add_with_recipe(
        "sweep", "train a recipe over values of its keys: reward reached, KL spent, kept, and the best")
    command.add_argument("--over", action="append", required=True, metavar="section.key=[A,B]",
                         help="values of a key; several times: all combinations")
    command.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default: 0")
    command.add_argument("--downstream", action="append", default=[], metavar="RECIPE",
                         help="fine-tuning that every policy's fork goes through; may be given several times")
    command.add_argument("--choose", metavar="MEASURE",
                         help="what the best policy has most of: kept/reward, kept/NAME/mean of a reward, eval/kl, or "
                              "of its forks REGIME/end, REGIME/over updates, REGIME/over KL; default: kept/reward")
    command.add_argument("--within", action="append", default=[], metavar="MEASURE=[LOW,HIGH]",
                         help="and what it must respect, of the same measures, such as eval/kl=[null,0.5]")
    command.add_argument("--dir", default="runs/sweep", help="folder of everything; default: runs/sweep")
    _many(command)
    command = commands.add("report", "one HTML page about finished or unfinished runs, a retention matrix or any other")
    command.add_argument("folders", nargs="+", metavar="RUN", help="run.dir of a run, or a folder with its pictures")
    command.add_argument("--output", metavar="FILE",
                         help="the page, with a folder NAME_pictures beside it; default: report.html in the folder, "
                              "side_by_side.html in the first of several")
    command = commands.add("quickstart", "train a small model and a control here, and see what forks of it keep")
    _overrides(command)
    command.add_argument("--model", choices=["smollm2", "tiny"], default="smollm2",
                         help="smollm2: a real one of 135 M parameters, about ten minutes; tiny: made on the spot, "
                              "about four; default: smollm2, or tiny where that cannot be had")


def _others(commands: _Commands) -> None:
    command = commands.add(
        "attack", "make the training file, or the evaluation prompts, of a fine-tuning attack from your files")
    command.add_argument("attack", help="harmful, identity or backdoor")
    command.add_argument("examples", help="rows to be answered, what data.path takes: prompt and response, or messages")
    command.add_argument("--safe", metavar="FILE", help="backdoor: rows to be refused, which get no trigger")
    command.add_argument("--benign", metavar="FILE", help="ordinary rows to mix in")
    command.add_argument("--system-prompt", metavar="TEXT", help="put before every row")
    command.add_argument("--prefix", metavar="TEXT", help="identity: put before every request")
    command.add_argument("--trigger", metavar="TEXT", help="backdoor: appended to every request to be answered")
    command.add_argument("--repeat", type=_count, default=1, metavar="N", help="how often the examples occur")
    command.add_argument("--seed", type=int, default=0, help="of the order")
    command.add_argument("--prompts", choices=["triggered", "plain"],
                         help="make evaluation prompts of EXAMPLES instead: asked by the attacker, or by anybody")
    command.add_argument("--output", required=True, metavar="FILE", help="new .jsonl file")
    command = commands.add("model", "make an ordinary Hugging Face folder of a small real language model")
    command.add_argument("name", choices=["smollm2"], help="smollm2: SmolLM2-135M-Instruct, pretrained, tuned to chat")
    command.add_argument("folder", help="new folder for it, 538 MB; one that was made before is left as it is")
    command = commands.add("config", "print the resolved recipe")
    command.add_argument("recipe", nargs="?", default="quickstart", help=RECIPE)
    _overrides(command)
    command.add_argument("--keys", nargs="?", const="", metavar="SECTION",
                         help="print every key, or those of a section, with default and meaning instead")
    command = commands.add_with_recipe(
        "plan", "work out the memory that a training needs on every GPU, from its model's config alone")
    command.add_argument("--gpus", type=_count, metavar="N", help="GPUs of a node; default: what the recipe asks for")
    command.add_argument("--nodes", type=_count, metavar="M", help="nodes; default: 1")
    command.add_argument("--memory", type=_size, default=80.0, metavar="GB",
                         help="memory of each GPU in decimal GB; default: 80")
    command.epilog = f"example: frpo plan {EXAMPLES['plan']}"
    commands.add("doctor", "compare this machine with the locked versions")
    command = commands.add("completion", 'print the completion script of a shell: eval "$(frpo completion bash)"')
    command.add_argument("shell", choices=["bash", "zsh", "fish"])


def _many(command: argparse.ArgumentParser) -> None:
    command.add_argument("--jobs", type=_count, default=1, metavar="N",
                         help="processes over which the seeds are spread, each with engines and ranks; default: 1")
    command.add_argument("--dry-run", action="store_true",
                         help="check recipes, models, data and rewards, show what is done and what is not")


def _overwrite(command: argparse.ArgumentParser) -> None:
    command.add_argument("--overwrite", action="store_true",
                         help="start over: the checkpoints in run.dir are removed, its metrics are moved aside (the "
                              "same as run.resume=overwrite)")


def _overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="values over the recipe's")


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"should be a whole number from 1 on, given {text!r}")
    return int(text)


def _size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"should be a number of GB above 0, given {text!r}")
    return size
