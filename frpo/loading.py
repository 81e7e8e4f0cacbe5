"""Find what a recipe names: a function or class of a module or file, and the nearest of some names.

Calls nothing that it finds. A `.py` file is loaded as a module of its own. Its folder comes to the end of `sys.path`:
the file can import what lies beside it, and no library finds a user's file in the place of its own.
"""
from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import logging
import pickle
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from frpo.errors import FrpoError, RewardError, here

logger = logging.getLogger(__name__)

FORMS = "'package.module:function' or 'path/file.py:function'"

MOVED = {"frpo.quickstart": "frpo.commands.quickstart"}
"""Modules that recipes of before name -> where they are now."""

_being_loaded: list[str] = []
"""Files of which this process runs the top level, the innermost last."""

_folders: list[str] = []
"""Folders that this process has put at the end of `sys.path`, the one of the latest file first."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The arguments of a function: all it names, those without a default, and whether it also has `**kwargs`.

    nameless: those that it takes, but by position only.
    """

    named: tuple[str, ...]
    required: tuple[str, ...]
    open: bool
    nameless: tuple[str, ...] = ()


def load_function(function: str, what: str = "reward function", error: type[Exception] = RewardError
                  ) -> Callable[..., Any]:
    """Import the function or class that `function` names: 'package.module:function' or 'path/file.py:function'.

    what: its name in messages. error: the class of the errors that are raised. One is raised if the form is wrong, the
    module or file is missing or raises while it is imported, the name is not in it, or it cannot be called.
    """
    try:
        return _load(function, what)
    except _NotFoundError as problem:
        raise error(str(problem)) from problem.__cause__


class _NotFoundError(FrpoError):
    """What `load_function` raises as the caller's error."""


def _load(function: str, what: str) -> Callable[..., Any]:
    if function.endswith(".pkl"):
        return _load_pickle(function, what)
    where, separator, name = function.rpartition(":")
    if not (separator and where and name.isidentifier()):
        raise _NotFoundError(f"{what} {function!r} is not of the form {FORMS}")
    module = _load_file(where, what, function) if where.endswith(".py") else _load_module(where, what, function)
    if not hasattr(module, name):
        raise _NotFoundError(f"{what} {function!r}: {where} has no {name!r}{_suggestion(module, name)}")
    found = getattr(module, name)
    if not callable(found):
        raise _NotFoundError(f"{what} {function!r} is of type {type(found).__name__}, which cannot be called")
    return found


def file_being_loaded() -> str | None:
    """The file whose top level runs now because a recipe names something in it."""
    return _being_loaded[-1] if _being_loaded else None


def parameters_of(function: Callable[..., Any]) -> Parameters:
    """Read the signature; one that Python cannot tell (some C functions) counts as taking everything."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return Parameters(named=(), required=(), open=True)
    nameless = [p for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return Parameters(
        named=tuple(p.name for p in by_name),
        required=tuple(p.name for p in by_name if p.default is p.empty),
        open=any(p.kind is p.VAR_KEYWORD for p in parameters),
        nameless=tuple(p.name for p in nameless) or tuple(
            f"*{p.name}" for p in parameters if p.kind is p.VAR_POSITIONAL and len(parameters) == 1))


def path_without_siblings() -> list[str]:
    """`sys.path` for another process, which loads files of its own and must not find those beside ours."""
    return [entry for entry in sys.path if entry not in _folders]


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of `known` that resembles `name` most; None if none does, by difflib's ratio and `cutoff`."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """' (did you mean ...?)' with the nearest of `known`, or nothing if none resembles `name`."""
    near = nearest(name, known, cutoff)
    return f" (did you mean {near!r}?)" if near else ""


def _suggestion(module: ModuleType, name: str) -> str:
    # Functions that the module defines itself come first; what it imports is rarely meant.
    known = [key for key, value in vars(module).items()
             if callable(value) and not key.startswith("_") and getattr(value, "__module__", None) == module.__name__]
    return f"{did_you_mean(name, known)}; functions there: {', '.join(sorted(known)) or 'none'}"


def _load_module(name: str, what: str, function: str) -> ModuleType:
    name = MOVED.get(name, name)
    try:
        return importlib.import_module(name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise _NotFoundError(
                f"{what} {function!r}: there is no module {error.name!r} on sys.path; "
                f"allowed is {FORMS}") from error
        raise _import_failure(what, function, error) from error


def _load_file(path: str, what: str, function: str) -> ModuleType:
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        beside = sorted(other.name for other in file.parent.glob("*.py"))
        raise _NotFoundError(
            f"{what} {function!r}: there is no file {file}{did_you_mean(file.name, beside)}")
    # Registered, since dataclasses and pickle look their module up; the digest keeps equal file names apart.
    name = f"frpo_reward_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, f"a .py file has a loader: {file}"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    siblings = _let_import_siblings(str(file.parent))
    before = {*sys.modules}
    _being_loaded.append(str(file))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # as above: the user's code
        del sys.modules[name]
        raise _import_failure(what, function, error) from error
    finally:
        _being_loaded.pop()
    for other in sorted(siblings & {*sys.modules} - before):
        if not _lies_in(sys.modules[other], [str(file.parent)]):
            logger.warning("%s %r: its module %r is %s, not the one beside it; give one of them another name", what,
                           function, other, getattr(sys.modules[other], "__file__", None) or "elsewhere")
    return module


def _let_import_siblings(folder: str) -> set[str]:
    """Put `folder` at the end of `sys.path`, before the folders of earlier files. Returns the names that lie in it.

    Modules loaded from those are forgotten where `folder` has one of the same name, so that `helpers` is the file
    beside the one that imports it. Whoever has imported the other keeps it.
    """
    path = path_without_siblings()
    earlier = [other for other in _folders if other != folder]
    _folders[:] = earlier if folder in path else [folder, *earlier]
    sys.path[:] = [*path, *_folders]
    beside = {entry.stem for entry in Path(folder).iterdir() if entry.suffix == ".py" or entry.is_dir()}
    others = {name for name in beside if name in sys.modules and _lies_in(sys.modules[name], earlier)}
    for name in [name for name in sys.modules if name.partition(".")[0] in others]:
        del sys.modules[name]
    return beside


def _lies_in(module: ModuleType, folders: list[str]) -> bool:
    spec = getattr(module, "__spec__", None)
    places = [] if spec is None else spec.submodule_search_locations or [spec.origin or ""]
    return any(str(Path(place).parent) in folders for place in places)


def _load_pickle(path: str, what: str) -> Callable[..., Any]:
    """What `inputs.name_of` has written of a function that lives in no file."""
    try:
        with open(path, "rb") as file:
            return pickle.load(file)
    except OSError as error:
        raise _NotFoundError(f"{what} {path!r} cannot be read: {error.strerror} ({here()})") from error
    except Exception as error:  # unpickling imports what the function uses
        raise _import_failure(what, path, error) from error


def _import_failure(what: str, function: str, error: Exception) -> _NotFoundError:
    text = "".join(traceback.format_exception(error)).rstrip()
    hint = " (a file is part of no package: import what lies beside it by its name, without a dot)" \
        if "no known parent package" in str(error) else ""
    return _NotFoundError(
        f"{what} {function!r}: importing it raised {type(error).__name__}: {error}{hint}\n{text}")
