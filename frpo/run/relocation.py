"""Find the files and folders that a recipe names, for launchers that run the recipe elsewhere."""
from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from frpo.config.loader import AnyRecipe, dump_recipe
from frpo.data.source import GENERATED, READERS
from frpo.errors import ConfigError

FILE = re.compile(rf"(?P<function>.+\.py)(?P<name>:\w+)|(?P<data>.+(?:{'|'.join(map(re.escape, READERS))}))",
                  re.IGNORECASE)
"""Pattern of values that name a file in a recipe: a function's, or data."""

FOLDERS = (("model", "path"), ("reference", "path"), ("reference", "cache_dir"), ("data", "path"),
           ("data", "heldout_path"), ("auxiliary", "data", "path"), ("auxiliary", "data", "heldout_path"))
"""Keys whose value may be a folder."""

KWARGS = re.compile(r"rewards\.\d+\.kwargs\..+")
"""Keys of arguments of rewards, which may be a folder too, such as a reward model."""


def resolved(recipe: AnyRecipe, here: Path, resumes: Collection[str], of_file: Callable[[str, str, bool], str]
             ) -> dict[str, Any]:
    """Return the recipe's values with paths that another machine, or another folder, can read.

    Relative paths start at the folder `here`. The path of a folder that exists, `run.dir`, and a `run.resume` that is
    none of `resumes` become absolute. Each relative path of a file that exists is replaced by of_file(key, path,
    whether it is a function's). Raises ConfigError for a function's file that is missing.
    """
    values = _walked(dump_recipe(recipe), "", here, of_file)
    run = values["run"]
    run["dir"] = os.path.normpath(here / run["dir"])
    if run["resume"] not in resumes:
        run["resume"] = os.path.normpath(here / run["resume"])
    for *sections, key in FOLDERS:
        section = values
        for name in sections:
            section = section and section.get(name)  # a section may be null, or of other recipes
        if section and section.get(key) not in (None, *GENERATED) and (here / section[key]).is_dir():
            section[key] = os.path.normpath(here / section[key])
    return values


def _walked(value: Any, key: str, here: Path, of_file: Callable[[str, str, bool], str]) -> Any:
    if isinstance(value, dict):
        return {name: _walked(item, f"{key}.{name}".lstrip("."), here, of_file) for name, item in value.items()}
    if isinstance(value, list):
        return [_walked(item, f"{key}.{number}", here, of_file) for number, item in enumerate(value)]
    if not isinstance(value, str) or os.path.isabs(value) or value.startswith("~"):
        return value
    if KWARGS.fullmatch(key) and "/" in value and (here / value).is_dir():
        return os.path.normpath(here / value)
    named = FILE.fullmatch(value)
    if named is None:
        return value
    path = named["function"] or named["data"]
    if (here / path).is_file():
        return of_file(key, path, named["function"] is not None) + (named["name"] or "")
    if named["function"]:
        raise ConfigError(f"{key}: there is no file {path!r} in {here}; correct the path, or give the absolute path "
                          "of a file on the cluster")
    return value
