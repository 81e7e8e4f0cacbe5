"""Shell completions of `frpo` for the Tab key: commands, options, recipes, keys and their values."""
from __future__ import annotations

import argparse
import glob
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import argcomplete

from frpo.config.keys import keys
from frpo.config.loader import KINDS, recipe_names
from frpo.config.sections import repository_files


def script(shell: str) -> str:
    """Return the script that a shell (bash, zsh, fish) evaluates to complete `frpo`."""
    return argcomplete.shellcode(["frpo"], shell=shell)


def complete(parser: argparse.ArgumentParser, kinds: Mapping[str, str]) -> None:
    """Send completions to the shell and end the process. Do nothing if no shell has requested completions.

    kinds: command -> kind of its recipes, for commands whose kind is not train.
    """
    for command in _commands(parser):
        for argument in command._actions:
            completer = partial(_recipes, kinds) if argument.dest == "recipe" else COMPLETERS.get(argument.dest)
            if completer is not None:
                setattr(argument, "completer", completer)  # noqa: B010  argparse does not know argcomplete's attribute
    argcomplete.autocomplete(parser, always_complete_options="long")


def _commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    return [command for action in parser._actions if isinstance(action, argparse._SubParsersAction)
            for command in action.choices.values()]


def _recipes(kinds: Mapping[str, str], prefix: str, parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """List recipes of the command's kind: names in recipes/, and files that begin with the typed path."""
    files = [path for path in glob.glob(f"{glob.escape(prefix)}*") if path.endswith(".yaml") or Path(path).is_dir()]
    named = recipe_names(kinds.get(parsed_args.command.__name__.replace("_", "-"), "train"))
    return named + [f"{file}/" if Path(file).is_dir() else file for file in files]


def _overrides(prefix: str, **given: object) -> list[str]:
    """List keys, each followed by `=`. After `=`, list the values of the key if they are few."""
    known = {key.name: key for kind in KINDS for key in keys(kind)
             if key.default is not None and "[]" not in key.name and ".NAME" not in key.name}
    name, equals, _ = prefix.partition("=")
    if equals:
        values = WORDS.get(name) or (known[name].values if name in known else ())
        return [f"{name}={value}" for value in values]
    return [f"{name}=" for name in known]


def _sections(prefix: str, **_: object) -> list[str]:
    return list(dict.fromkeys(key.name.split(".")[0].removesuffix("[]") for kind in KINDS for key in keys(kind)))


WORDS = {
    "learner.deepspeed": tuple(path.stem for path in repository_files("ds_configs", ".json")),
    "run.resume": ("auto", "force", "never", "overwrite"),
    "objective": ("sft", "kl_sft", "csft", "csft_pa", "bradley_terry", "cost"),
    "placement": ("split", "colocate")}
"""Usual values of keys that take any text."""

def _swept(prefix: str, **_: object) -> list[str]:
    """List keys whose values can be swept over."""
    return [] if "=" in prefix else _overrides(prefix)


COMPLETERS = {"overrides": _overrides, "keys": _sections, "over": _swept,
              "choose": lambda **_: ["kept/reward", "kept/decile", "eval/kl"]}
