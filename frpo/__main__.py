"""The command line: `frpo COMMAND` or `python -m frpo COMMAND`. A command is one function; work happens elsewhere."""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import dump_recipe, load_any_recipe, load_recipe
from frpo.config.reference import key_reference
from frpo.config.retention import RetentionRecipe
from frpo.errors import ConfigError, FrpoError

RECIPE = "a recipe file, or the name of one in recipes/"
OVERRIDES = "values over the recipe's"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; an error of frpo's own is printed as one message, without traceback. Returns the exit code."""
    try:
        parsed = _parse(arguments)
        return parsed.command(parsed) or 0
    except BrokenPipeError:  # piped into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor is what is left to be flushed an error
        return 0
    except FrpoError as error:
        print(f"frpo: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("frpo: interrupted", file=sys.stderr)
        return 130


def train(parsed: argparse.Namespace) -> int:
    from frpo.cluster.team import follow, follows, sized

    recipe = sized(load_recipe(parsed.recipe, parsed.overrides))
    if follows():
        return follow(recipe)
    if parsed.dry_run:
        from frpo.builder import check, reward_suite

        checked = check(recipe)
        with reward_suite(recipe, checked.prompts):
            pass  # every function was found and takes its arguments
        print(yaml.safe_dump(dump_recipe(recipe), sort_keys=False).rstrip())
        model = recipe.model.path or "made on the spot"
        print(f"# checked: model {model}, {len(checked.prompts.train)} training and "
              f"{len(checked.prompts.heldout)} held-out prompts, resume "
              f"{checked.resume[0] if checked.resume else 'from the start'}")
        for reason, count in checked.prompts.skipped.items():
            print(f"# left out: {count} x {reason}")
        if checked.prompts.overlap:
            print(f"# trained on too: {checked.prompts.overlap} x same prompt as a held-out one "
                  "(data.heldout_overlap: keep)")
        return 0
    from frpo.builder import build
    from frpo.evaluate.curve import draw_reward_curve
    from frpo.supervise import outlive
    from frpo.trainer import Trainer

    state, folder = outlive(recipe, build, lambda parts: Trainer(parts).fit()), Path(recipe.run.dir)
    picture = draw_reward_curve({recipe.run.name: folder / "metrics.jsonl"}, folder / "reward.png")
    print(f"{state.step} steps done. Model: {folder / 'export'}  metrics: {folder / 'metrics.jsonl'}  "
          f"picture: {picture}")
    return 0


def finetune(parsed: argparse.Namespace) -> int:
    from frpo.cluster.team import follow, follows, sized

    recipe = sized(load_recipe(parsed.recipe, parsed.overrides, FinetuneRecipe))
    if follows():
        return follow(recipe)
    from frpo.finetune_parts import build_finetune, check_finetune

    if parsed.dry_run:
        examples = check_finetune(recipe).examples
        print(yaml.safe_dump(dump_recipe(recipe), sort_keys=False).rstrip())
        print(f"# checked: {len(examples.train)} training and {len(examples.heldout)} held-out examples")
        for reason, count in examples.skipped.items():
            print(f"# left out: {count} x {reason}")
        return 0
    from frpo.evaluate.curve import draw_loss_curve
    from frpo.finetune import FineTuner
    from frpo.supervise import outlive

    state, folder = outlive(recipe, build_finetune, lambda parts: FineTuner(parts).fit()), Path(recipe.run.dir)
    picture = draw_loss_curve({recipe.run.name: folder / "metrics.jsonl"}, folder / "loss.png")
    print(f"{state.step} updates done. Model: {folder / 'export'}  metrics: {folder / 'metrics.jsonl'}  "
          f"picture: {picture}")
    return 0


def evaluate(parsed: argparse.Namespace) -> int:
    from frpo.evaluate.model import run_evaluate

    return run_evaluate(load_recipe(parsed.recipe, parsed.overrides), parsed.model, parsed.json)


def rollout(parsed: argparse.Namespace) -> int:
    from frpo.rollout_only import run_rollout

    return run_rollout(load_recipe(parsed.recipe, parsed.overrides), parsed.steps, parsed.output)


def rescore(parsed: argparse.Namespace) -> int:
    from frpo.rescore import run_rescore

    return run_rescore(parsed.traces, load_recipe(parsed.recipe, parsed.overrides), parsed.output)


def harness(parsed: argparse.Namespace) -> int:
    from frpo.evaluate.harness import run_harness

    return run_harness(parsed.model, parsed.tasks, backend=parsed.backend, dtype=parsed.dtype, limit=parsed.limit,
                       chat=parsed.chat, include=parsed.include, output=parsed.output)


def attack(parsed: argparse.Namespace) -> int:
    from frpo.data.attacks import AttackFiles, attack_rows, evaluation_rows, write_rows

    files = AttackFiles(examples=parsed.examples, safe=parsed.safe, benign=parsed.benign, prefix=parsed.prefix,
                        trigger=parsed.trigger, system_prompt=parsed.system_prompt, repeat=parsed.repeat,
                        seed=parsed.seed)
    if parsed.prompts:
        rows = evaluation_rows(parsed.attack, parsed.examples, files, triggered=parsed.prompts == "triggered")
    else:
        rows = attack_rows(parsed.attack, files)
    print(f"{write_rows(rows, Path(parsed.output))} rows: {parsed.output}")
    return 0


def retention(parsed: argparse.Namespace) -> int:
    _not_launched("retention")
    from frpo.retention.command import run_retention, show_plan
    from frpo.retention.plan import make_plan

    recipe = load_recipe(parsed.recipe, parsed.overrides, RetentionRecipe)
    if parsed.quick:
        recipe = load_recipe(parsed.recipe, [*recipe.quick, *parsed.overrides], RetentionRecipe)
    if parsed.dry_run:
        show_plan(make_plan(recipe))
        return 0
    return run_retention(recipe)


def sweep(parsed: argparse.Namespace) -> int:
    _not_launched("sweep")
    from frpo.retention.command import run_retention, show_plan
    from frpo.retention.plan import make_plan
    from frpo.retention.sweep import sweep_recipe

    recipe = sweep_recipe(parsed.recipe, parsed.overrides, over=parsed.over, seeds=parsed.seeds, folder=parsed.dir,
                          downstream=parsed.downstream, choose=parsed.choose, within=parsed.within)
    if parsed.dry_run:
        show_plan(make_plan(recipe))
        return 0
    return run_retention(recipe)


def report(parsed: argparse.Namespace) -> int:
    from frpo.report import run_report

    return run_report(parsed.folders, parsed.output)


def quickstart(parsed: argparse.Namespace) -> int:
    from frpo.quickstart import run_quickstart

    return run_quickstart(parsed.overrides)


def config(parsed: argparse.Namespace) -> int:
    if parsed.keys:
        text = key_reference()
    else:
        text = yaml.safe_dump(dump_recipe(load_any_recipe(parsed.recipe, parsed.overrides)), sort_keys=False).rstrip()
    print(text)
    return 0


def doctor(parsed: argparse.Namespace) -> int:
    from frpo.doctor import diagnose

    return diagnose()


def _not_launched(command: str) -> None:
    from frpo.cluster.team import launched

    if launched():
        raise ConfigError(f"frpo {command} runs many trainings on ranks of its own and is not started by the deepspeed "
                          "launcher; start it by itself, with learner.ranks: ray or process in its recipes")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand anywhere: argparse leaves those behind an option over."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(parsed, "overrides") and all("=" in item and item[0] != "-" for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"should be a whole number from 1 on, given {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="frpo", description="Post-training that survives the next fine-tuning.")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # from the deepspeed launcher; LOCAL_RANK says it too
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(function, description: str) -> argparse.ArgumentParser:
        command = commands.add_parser(function.__name__, help=description, description=description)
        command.set_defaults(command=function)
        return command

    command = add(train, "train a policy with reinforcement learning")
    command.add_argument("recipe", help=RECIPE)
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDES)
    command.add_argument("--dry-run", action="store_true", help="check everything that needs no engine, then stop")
    command = add(finetune, "fine-tune a model on given responses: SFT, CSFT, CSFT+PA")
    command.add_argument("recipe", help=RECIPE)
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDES)
    command.add_argument("--dry-run", action="store_true", help="check everything that needs no model, then stop")
    command = add(evaluate, "score a model on a recipe's held-out prompts, without a learner")
    command.add_argument("model", help="a folder with a Hugging Face model, such as a run's export, or a hub id")
    command.add_argument("recipe", help=f"{RECIPE}: prompts, rewards, sampling")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDES)
    command.add_argument("--json", metavar="PATH", help="file for the metrics; default: evaluation.json in MODEL")
    command = add(harness, "run tasks of lm-evaluation-harness on a model, if that is installed")
    command.add_argument("model", help="a folder with a Hugging Face model, such as a run's export, or a hub id")
    command.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="names of its tasks")
    command.add_argument("--include", metavar="FOLDER", help="where tasks of your own lie")
    command.add_argument("--backend", choices=["hf", "vllm"], default="hf", help="default: hf, in this process")
    command.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="precision; default: bf16")
    command.add_argument("--limit", type=_count, metavar="N", help="only the first documents of each task")
    command.add_argument("--chat", action="store_true", help="apply the chat template")
    command.add_argument("--output", metavar="FILE", help="file for the metrics; default: harness.json in MODEL")
    command = add(rollout, "sample and score a run's first steps, without a learner")
    command.add_argument("recipe", help=RECIPE)
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDES)
    command.add_argument("--steps", type=_count, default=1, metavar="N", help="steps to sample; default: 1")
    command.add_argument("--output", metavar="PATH", help="new file for the groups; default: rollouts.jsonl in run.dir")
    command = add(rescore, "score the groups of a trace file again, without engines")
    command.add_argument("traces", help="traces.jsonl of a run, or what rollout or evaluate wrote")
    command.add_argument("recipe", help=f"{RECIPE}: rewards, advantage")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDES)
    command.add_argument("--output", metavar="PATH", help="new file for the groups with their new values")
    command = add(retention, "train policies, fine-tune forks of them, measure and report what they keep")
    command.add_argument("recipe", help=RECIPE)
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDES)
    command.add_argument("--quick", action="store_true", help="the recipe's short form")
    command.add_argument("--dry-run", action="store_true", help="check every recipe, show what is done and what is not")
    command = add(sweep, "train a recipe over values of its keys: reward reached, KL spent, kept, and the best")
    command.add_argument("recipe", help=RECIPE)
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDES)
    command.add_argument("--over", action="append", required=True, metavar="section.key=[A,B]",
                         help="values of a key; several times: all combinations")
    command.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default: 0")
    command.add_argument("--downstream", action="append", default=[], metavar="RECIPE",
                         help="fine-tuning that every policy's fork goes through; may be given several times")
    command.add_argument("--choose", metavar="MEASURE", help="what the best policy has most of; default: kept/reward")
    command.add_argument("--within", action="append", default=[], metavar="MEASURE=[LOW,HIGH]",
                         help="and what it must respect, such as eval/kl=[null,0.5]")
    command.add_argument("--dir", default="runs/sweep", help="folder of everything; default: runs/sweep")
    command.add_argument("--dry-run", action="store_true", help="check every recipe, show what is done and what is not")
    command = add(report, "one HTML page about finished or unfinished runs, a retention matrix or any other")
    command.add_argument("folders", nargs="+", metavar="RUN", help="run.dir of a run, or a folder with its pictures")
    command.add_argument("--output", metavar="FILE", help="the page; default: report.html in the first folder")
    command = add(attack, "make the training file, or the evaluation prompts, of a fine-tuning attack from your files")
    command.add_argument("attack", help="harmful, identity or backdoor")
    command.add_argument("examples", help="rows to be answered (.jsonl): prompt and response, or messages")
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
    command = add(config, "print the resolved recipe")
    command.add_argument("recipe", nargs="?", default="quickstart", help=RECIPE)
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDES)
    command.add_argument("--keys", action="store_true", help="print every key with its default and meaning instead")
    command = add(quickstart, "make a small policy and train it, with a control, on this machine")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDES)
    add(doctor, "compare this machine with the locked versions")
    return parser


if __name__ == "__main__":
    sys.exit(main())
