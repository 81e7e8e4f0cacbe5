"""Give functions, classes and rows of a Python session a name that a recipe can hold.

A recipe is text, so that it can be saved, compared, resumed and sent to other processes. An object that exists only in
the session is written to `runs/inputs/`. The name of its file depends on its content alone.
"""
from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import os
import re
import site
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from frpo.errors import ConfigError, DataError

FOLDER = Path("runs") / "inputs"
"""Folder for written objects, relative to the working directory, like all paths of a recipe."""

LARGEST = 16 * 2**20
"""Largest size of a pickled function in bytes, with all objects that the function refers to."""


def name_of(thing: Callable[..., Any]) -> str:
    """Return the name of a function or class in a recipe. `loading.load_function` loads the function by this name.

    The name is 'package.module:name' at the top of a module that is installed or belongs to a package. At the top of
    another file, such as the script that runs, the name is 'path/file.py:name'. Anything else (a lambda, a nested
    function, a cell of a notebook) is written by cloudpickle to 'runs/inputs/name-digest.pkl', which is then the name.

    Raises ConfigError if `thing` cannot be called, or cannot be written.
    """
    if not callable(thing):
        raise ConfigError(f"give a function, or its name as text; given {thing!r:.80}")
    module = sys.modules.get(getattr(thing, "__module__", None) or "")
    name = getattr(thing, "__qualname__", "")
    if module is None or not name.isidentifier() or getattr(module, name, None) is not thing:
        return _pickled(thing)
    file = getattr(module, "__file__", None)
    if module.__name__ != "__main__" and (_installed(file) or module.__package__) and _importable(module):
        return f"{module.__name__}:{name}"
    return _pickled(thing) if file is None or not file.endswith(".py") else f"{_from_here(file)}:{name}"


def path_of(rows: Any) -> str:
    """Write rows that are given as objects to 'runs/inputs/digest.jsonl' or '.parquet', and return the path.

    rows: a list of mappings, or an object with `to_parquet` (`datasets.Dataset`, a pandas table).
    Raises DataError if rows are something else, or hold values that JSON cannot represent.
    """
    if callable(getattr(rows, "to_parquet", None)):
        return _written("parquet", rows.to_parquet)
    if isinstance(rows, Mapping) and all(callable(getattr(split, "to_parquet", None)) for split in rows.values()):
        raise DataError(f"rows are given as {type(rows).__name__} with the splits {', '.join(map(str, rows))}; give "
                        "one split")
    if not isinstance(rows, Sequence) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise DataError("rows must be a list of mappings (at least one), a datasets.Dataset or a pandas table; "
                        f"given {_shown(rows)}")
    return _written("jsonl", lambda path: _write_lines(path, rows))


def _shown(value: Any) -> str:
    try:
        return f"{type(value).__name__}: {value!r:.80}"
    except (RecursionError, ValueError):  # levels and digits beyond what Python writes
        return f"{type(value).__name__} that is too large to show"


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            try:
                file.write(json.dumps(dict(row), allow_nan=False) + "\n")
            except (TypeError, ValueError, RecursionError) as error:
                raise DataError(f"row {number} cannot be written as JSON: {error}; give text, numbers, lists and "
                                "mappings") from None


def _written(suffix: str, write: Callable[[Path], object]) -> str:
    """Write a file into FOLDER under a name made from its content; return the path."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    unfinished = FOLDER / f".{os.getpid()}.{suffix}"
    try:
        write(unfinished)
        path = FOLDER / f"{hashlib.sha256(unfinished.read_bytes()).hexdigest()[:16]}.{suffix}"
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return str(path)


def _pickled(thing: Callable[..., Any]) -> str:
    import cloudpickle

    label = re.sub(r"\W", "", getattr(thing, "__name__", type(thing).__name__))
    try:
        content, decisive = cloudpickle.dumps(thing), cloudpickle.dumps(_without_places(thing))
    except Exception as error:  # pickling runs code of the objects that the function refers to
        raise ConfigError(f"the function {label!r} cannot be sent to other processes ({type(error).__name__}: "
                          f"{error}); put it at the top level of a file") from None
    if len(content) > LARGEST:
        raise ConfigError(f"the function {label!r} refers to {len(content) / 2**20:.0f} MiB of objects; allowed are "
                          f"{LARGEST / 2**20:.0f} MiB; let it read them from a file")
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{label}-{hashlib.sha256(decisive).hexdigest()[:8]}.pkl"
    path.write_bytes(content)
    return str(path)


def _without_places(thing: Any) -> Any:
    """Copy a function without its file and its line number, which differ from session to session."""
    if not inspect.isfunction(thing):
        return thing
    copy = types.FunctionType(_nowhere(thing.__code__), thing.__globals__, thing.__name__, thing.__defaults__,
                              thing.__closure__)
    copy.__kwdefaults__ = thing.__kwdefaults__
    return copy


def _nowhere(code: types.CodeType) -> types.CodeType:
    inner = tuple(_nowhere(const) if isinstance(const, types.CodeType) else const for const in code.co_consts)
    return code.replace(co_filename="", co_firstlineno=1, co_linetable=b"", co_consts=inner)


def _installed(file: str | None) -> bool:
    places = [*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("stdlib")]
    return file is None or any(Path(file).resolve().is_relative_to(Path(place).resolve()) for place in places)


def _importable(module: types.ModuleType) -> bool:
    """Return whether another process can find the module by its name too."""
    try:
        return importlib.util.find_spec(module.__name__) is not None
    except (ImportError, ValueError):
        return False


def _from_here(file: str) -> str:
    path = Path(file).resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
