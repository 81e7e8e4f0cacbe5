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
       fit; or an unexpected Python error
  2    an error that the message explains: usage, recipe, data, model, machine
  130  interrupted (Ctrl-C); the same command continues from the newest checkpoint
  143  terminated (SIGTERM); continues like 130
  75   stopped after a step (SIGUSR1) and saved; continues like 130"""
RECIPE_COMMANDS = {"finetune": "finetune", "reward-model": "reward-model", "retention": "retention"}
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
            parser.error(f"--overwrite starts over, but {given[0]} does not; leave one of them out")
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
        return f"; to set a value of a recipe, write {name}={value or 'VALUE'}" if "." in name else ""
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
    return f"; to set a value of a recipe, write section.key=value{f', here {key}=VALUE' if key else ''}"


class _Commands:
    def __init__(self, parser: argparse.ArgumentParser, functions: Sequence[Callable[..., object]]):
        self.parsers = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
        self.functions = {function.__name__.replace("_", "-"): function for function in functions}

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
        command.add_argument("recipe", help=RECIPE + (use and f"; used parts: {use}"))
        _overrides(command)
        return command


def _trainings(commands: _Commands) -> None:
    command = commands.add_with_recipe("train", "train a policy with reinforcement learning")
    command.add_argument("--dry-run", action="store_true", help="check everything that needs no engine, then stop")
    _overwrite(command)
    command = commands.add_with_recipe("finetune", "fine-tune a model on given responses: SFT, CSFT, CSFT+PA")
    command.add_argument("--dry-run", action="store_true", help="check everything that needs no model, then stop")
    _overwrite(command)
    command = commands.add_with_recipe("reward-model", "train a reward or cost model on pairs of answers")
    command.add_argument("--dry-run", action="store_true", help="check everything that needs no model, then stop")
    _overwrite(command)


def _evaluations(commands: _Commands) -> None:
    command = commands.add_with_recipe("evaluate", "score a model on a recipe's held-out prompts, without a learner",
                                       ("model", MODEL), "prompts, rewards, sampling")
    command.add_argument("--json", metavar="PATH", help="file for the metrics; default: evaluation.json in MODEL")
    command = commands.add("harness", "run tasks of lm-evaluation-harness, if it is installed, on a model")
    command.add_argument("model", help=MODEL)
    command.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="names of tasks of the harness")
    command.add_argument("--include", metavar="FOLDER", help="folder with your own tasks")
    command.add_argument("--backend", choices=["hf", "vllm"], default="hf",
                         help="hf: transformers, in this process; vllm: vLLM; default: hf")
    command.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="precision; default: bf16")
    command.add_argument("--limit", type=_count, metavar="N", help="use only the first N documents of each task")
    command.add_argument("--chat", action="store_true", help="apply the chat template of the model")
    command.add_argument("--output", metavar="FILE", help="file for the metrics; default: harness.json in MODEL")


def _parts_alone(commands: _Commands) -> None:
    command = commands.add_with_recipe("rollout", "sample and score a run's first steps, without a learner")
    command.add_argument("--steps", type=_count, default=1, metavar="N", help="steps to sample; default: 1")
    command.add_argument("--output", metavar="PATH", help="new file for the groups; default: rollouts.jsonl in run.dir")
    command = commands.add_with_recipe(
        "rescore", "score the groups of a trace file again, without engines",
        ("traces", "traces.jsonl of a run, or a file that rollout or evaluate wrote"), "rewards, advantage")
    command.add_argument("--output", metavar="PATH", help="new file for the groups with their new values")


def _several_trainings(commands: _Commands) -> None:
    command = commands.add_with_recipe(
        "retention", "train policies, fine-tune forks (copies) of them, measure and report the reward that forks keep")
    command.add_argument("--quick", action="store_true", help="run the short form of the recipe")
    command.add_argument("--part", action="store_true", help=argparse.SUPPRESS)  # set for each process of --jobs
    _many(command)
    command = commands.add_with_recipe(
        "sweep", "train a recipe with several values of its keys; compare reward, KL and kept reward; choose the best")
    command.add_argument("--over", action="append", required=True, metavar="section.key=[A,B]",
                         help="values of a key; if given several times: all combinations")
    command.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N",
                         help="train every policy with each of these seeds; default: 0")
    command.add_argument("--downstream", action="append", default=[], metavar="RECIPE",
                         help="fine-tune a fork of every policy with this recipe; may be given several times")
    command.add_argument("--choose", metavar="MEASURE",
                         help="choose the policy with the largest value of this measure: kept/reward, kept/NAME/mean "
                              "for the reward NAME, eval/kl, or of its forks REGIME/end, REGIME/over updates, "
                              "REGIME/over KL; default: kept/reward")
    command.add_argument("--within", action="append", default=[], metavar="MEASURE=[LOW,HIGH]",
                         help="choose only among policies with this measure in this range, such as eval/kl=[null,0.5]")
    command.add_argument("--dir", default="runs/sweep", help="folder for all results; default: runs/sweep")
    _many(command)
    command = commands.add("report", "write one HTML page about runs or retention matrices, finished or not")
    command.add_argument("folders", nargs="+", metavar="RUN",
                         help="run.dir of a run or a matrix, or a folder with pictures")
    command.add_argument("--output", metavar="FILE",
                         help="file of the page; pictures go to the folder NAME_pictures beside it; default: "
                              "report.html in RUN, or side_by_side.html in the first of several RUN")
    command = commands.add("quickstart", "train a small model and a control here, and show what forks of it keep")
    _overrides(command)
    command.add_argument("--model", choices=["smollm2", "tiny"], default="smollm2",
                         help="smollm2: a real model of 135 M parameters, about ten minutes; tiny: a model made on the "
                              "spot, about four minutes; default: smollm2, or tiny if smollm2 is not available")


def _others(commands: _Commands) -> None:
    command = commands.add(
        "attack", "make the training file, or the evaluation prompts, of a fine-tuning attack from your files")
    command.add_argument("attack", help="kind of attack: harmful, identity or backdoor")
    command.add_argument("examples", help="rows whose answers the attack trains, given as in data.path; columns: "
                                          "prompt and response, or messages")
    command.add_argument("--safe", metavar="FILE", help="backdoor: rows with refusals, which get no trigger")
    command.add_argument("--benign", metavar="FILE", help="ordinary rows to mix in")
    command.add_argument("--system-prompt", metavar="TEXT", help="system prompt to put before every row")
    command.add_argument("--prefix", metavar="TEXT", help="identity: text to put before every request of the examples")
    command.add_argument("--trigger", metavar="TEXT",
                         help="backdoor: text to append to every request of the examples")
    command.add_argument("--repeat", type=_count, default=1, metavar="N",
                         help="write every example N times; default: 1")
    command.add_argument("--seed", type=int, default=0, help="seed of the order of the rows; default: 0")
    command.add_argument("--prompts", choices=["triggered", "plain"],
                         help="write evaluation prompts of the examples instead; triggered: with the prefix or "
                              "trigger of the attacker; plain: without it")
    command.add_argument("--output", required=True, metavar="FILE", help="new .jsonl file")
    command = commands.add("model", "write a small real language model into an ordinary Hugging Face folder")
    command.add_argument("name", choices=["smollm2"], help="smollm2: SmolLM2-135M-Instruct, pretrained, tuned to chat")
    command.add_argument("folder", help="new folder for the model, 538 MB; a model made before is left as it is")
    command = commands.add("config", "print the resolved recipe")
    command.add_argument("recipe", nargs="?", default="quickstart", help=RECIPE + "; default: quickstart")
    _overrides(command)
    command.add_argument("--keys", nargs="?", const="", metavar="SECTION",
                         help="instead, print every key, or the keys of SECTION, with default and meaning")
    command = commands.add_with_recipe(
        "plan", "compute the memory that a training needs on every GPU, from its model's config alone")
    command.add_argument("--gpus", type=_count, metavar="N", help="GPUs of a node; default: those the recipe needs")
    command.add_argument("--nodes", type=_count, metavar="M", help="number of nodes; default: 1")
    command.add_argument("--memory", type=_size, default=80.0, metavar="GB",
                         help="memory of each GPU in decimal GB; default: 80")
    command.epilog = f"example: frpo plan {EXAMPLES['plan']}"
    commands.add("doctor", "compare this machine with the locked versions and print how to fix mismatches")
    command = commands.add("completion", 'print the completion script of a shell: eval "$(frpo completion bash)"')
    command.add_argument("shell", choices=["bash", "zsh", "fish"])


def _many(command: argparse.ArgumentParser) -> None:
    command.add_argument("--jobs", type=_count, default=1, metavar="N",
                         help="number of processes that share the seeds, each with engines and ranks; default: 1")
    command.add_argument("--dry-run", action="store_true",
                         help="check recipes, models, data and rewards, and print which stages are done; then stop")


def _overwrite(command: argparse.ArgumentParser) -> None:
    command.add_argument("--overwrite", action="store_true",
                         help="start over: remove the checkpoints in run.dir and move its metrics aside (same as "
                              "run.resume=overwrite)")


def _overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="values to replace in the recipe")


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, given {text!r}")
    return int(text)


def _size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of GB above 0, given {text!r}")
    return size
