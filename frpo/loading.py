"""Load the function or class that a recipe names, from a module or file, and find the nearest of some known names.

No loaded function is called here. A `.py` file is loaded as a separate module. Its folder is put at the end of
`sys.path`. So the file can import modules beside it, and a user's file never hides a library's own module.
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
"""Old module names, which older recipes use -> their new names."""

_being_loaded: list[str] = []
"""Files whose top-level code this process is running, the innermost file last."""

_folders: list[str] = []
"""Folders that this process has put at the end of `sys.path`; the folder of the latest file comes first."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The parameters of a function.

    named: all that can be given by name. required: the named ones without a default. open: whether the function has
    `**kwargs`. nameless: parameters that must be given by position.
    """

    named: tuple[str, ...]
    required: tuple[str, ...]
    open: bool
    nameless: tuple[str, ...] = ()


def load_function(function: str, what: str = "reward function", error: type[Exception] = RewardError
                  ) -> Callable[..., Any]:
    """Import the function or class that `function` names: 'package.module:function' or 'path/file.py:function'.

    what: the kind of function, for messages. error: the class of the errors to raise. Raises such an error if the form
    is wrong, if the module or file is missing or its import fails, if it has no such name, or if the object found
    cannot be called.
    """
    try:
        return _load(function, what)
    except _NotFoundError as problem:
        raise error(str(problem)) from problem.__cause__


class _NotFoundError(FrpoError):
    """An error of loading, which `load_function` raises again as the caller's error class."""


def _load(function: str, what: str) -> Callable[..., Any]:
    if function.endswith(".pkl"):
        return _load_pickle(function, what)
    where, separator, name = function.rpartition(":")
    in_file = where.endswith(".py")
    if not (separator and name.isidentifier() and (in_file or all(where.split(".")))):
        raise _NotFoundError(f"{what} {function!r} is not of the form {FORMS}")
    module = _load_file(where, what, function) if in_file else _load_module(where, what, function)
    if not hasattr(module, name):
        raise _NotFoundError(f"{what} {function!r}: {where} has no {name!r}{_suggestion(module, name)}")
    found = getattr(module, name)
    if not callable(found):
        raise _NotFoundError(f"{what} {function!r} is of type {type(found).__name__}, which cannot be called; "
                             "name a function or class")
    return found


def file_being_loaded() -> str | None:
    """Return the file whose top-level code runs now because a recipe names a function in it; None if there is none."""
    return _being_loaded[-1] if _being_loaded else None


def parameters_of(function: Callable[..., Any]) -> Parameters:
    """Read the signature. A function whose signature Python cannot read (some C functions) counts as open."""
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
    """Return `sys.path` for another process. That process loads other files and must not find modules beside ours."""
    return [entry for entry in sys.path if entry not in _folders]


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the name in `known` that is most similar to `name`; None if difflib's ratio is below `cutoff` for all."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ' (did you mean ...?)' with the nearest name in `known`, or an empty string if no name is similar."""
    near = nearest(name, known, cutoff)
    return f" (did you mean {near!r}?)" if near else ""


def _suggestion(module: ModuleType, name: str) -> str:
    # Suggest only functions and classes that the module defines itself; users rarely mean an imported one.
    known = [key for key, value in vars(module).items()
             if callable(value) and not key.startswith("_") and getattr(value, "__module__", None) == module.__name__]
    return f"{did_you_mean(name, known)}; it defines {', '.join(sorted(known)) or 'nothing to call'}"


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
    try:
        file = Path(path).expanduser().resolve()
        if not file.is_file():
            beside = sorted(other.name for other in file.parent.glob("*.py"))
            raise _NotFoundError(f"{what} {function!r}: there is no file {file}{did_you_mean(file.name, beside)}")
    except (OSError, RuntimeError, ValueError) as error:  # a name that no file can have, ~ of nobody
        raise _NotFoundError(f"{what} {function!r:.200}: no file can be found there: {_reason(error)}; check the path"
                             ) from error
    # Register the module, since dataclasses and pickle look their module up; the digest keeps equal file names apart.
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
            logger.warning("%s %r: its module %r is %s, not the file beside it; rename one of them", what,
                           function, other, getattr(sys.modules[other], "__file__", None) or "elsewhere")
    return module


def _let_import_siblings(folder: str) -> set[str]:
    """Put `folder` at the end of `sys.path`, before the folders of earlier files. Returns the module names in `folder`.

    If `folder` has a module of the same name as one loaded from an earlier folder, forget the earlier module. So
    `helpers` is always the file beside the importing file. A file that imported the earlier module keeps that module.
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
    """Load a function that `inputs.name_of` has written as a pickle, because the function is in no file."""
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise _NotFoundError(f"{what} {path!r:.200} cannot be read: {_reason(error)} ({here()})") from error
    try:
        return pickle.loads(content)
    except Exception as error:  # unpickling imports what the function uses
        raise _import_failure(what, path, error) from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _import_failure(what: str, function: str, error: Exception) -> _NotFoundError:
    text = "".join(traceback.format_exception(error)).rstrip()
    hint = " (the file is not in a package: import files beside it by name, without a dot)" \
        if "no known parent package" in str(error) else ""
    return _NotFoundError(
        f"{what} {function!r}: importing it raised {type(error).__name__}: {error}{hint}\n{text}")
