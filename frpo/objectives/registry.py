"""Register the frozen keyword-only dataclasses that a recipe can name, find them by a scan, and build them strictly.

A registry holds one kind of classes (advantages, surrogates) and does not depend on what the classes do. A new file in
this package needs no entry in a list. A class outside this package is named by one of FORMS.
"""
from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, TypeVar, cast, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from frpo.inputs import name_of
from frpo.loading import did_you_mean, load_function

Class = TypeVar("Class", bound=type)

FORMS = "'package.module:Class' or 'path/file.py:Class'"
"""Forms by which a recipe names a class outside this package."""


class Registry:
    """Classes of one kind, by the name that recipes use.

    kind: the word for this kind in messages ("advantage").
    method: the method that every class must have, as a signature ("advantages(rewards_G)").
    flags: class variables that every class must set -> their allowed values.
    """

    def __init__(self, kind: str, method: str, flags: Mapping[str, Collection[Any]] = MappingProxyType({})):
        self.kind, self.method, self.flags = kind, method, flags
        self._classes: dict[str, type] = {}

    def register(self, name: str) -> Callable[[Class], Class]:
        """Return a decorator that registers a frozen dataclass as `name`.

        The decorator raises ValueError if another class has this name.
        """

        def register(cls: Class) -> Class:
            frozen = dataclasses.is_dataclass(cls) and cast(Any, cls).__dataclass_params__.frozen
            assert frozen, f"{cls.__qualname__} must be a frozen dataclass"
            other = self._classes.get(name, cls)
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                taken = f"{other.__module__}:{other.__qualname__}"
                raise ValueError(f"{self.kind} {name!r} is already taken by {taken}; choose another name")
            cast(Any, cls).name = name
            self._classes[name] = cls
            return cls

        return register

    def classes(self) -> dict[str, type]:
        """Return every registered class by name, after importing all files of this package."""
        package = importlib.import_module(__package__)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{__package__}.{module.name}")
        return dict(sorted(self._classes.items()))

    def build(self, values: Mapping[str, Any]) -> Any:
        """Build the object that {"name": ..., **its fields} describes. The name may have one of FORMS.

        Raises ValueError naming the given value, the allowed ones and the nearest allowed one.
        """
        parameters = dict(values)
        name = parameters.pop("name", None)
        if not isinstance(name, str):
            allowed = f"{', '.join(self.classes())}, {FORMS}"
            raise ValueError(f"{self.kind} needs a name, one of {allowed}; given {dict(values)}")
        cls = self._load(name) if ":" in name or name.endswith(".pkl") else self.classes().get(name)
        if cls is None:
            raise ValueError(unknown(self.kind, name, self.classes()) + f", {FORMS}")
        return cls(**_checked(cls, f"{self.kind} {name!r}", parameters))

    def given(self, value: Any) -> Any | None:
        """Return the value if a recipe holds the object itself; None if the value is a description of an object.

        A class outside the package gets the name by which a recipe finds it. Raises ValueError for an object of another
        kind.
        """
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return None
        cls = self._checked(type(value), type(value).__qualname__)
        if not hasattr(cls, "name"):
            cls.name = name_of(cls)
        return value

    def _load(self, path: str) -> type:
        cls = self._checked(load_function(path, self.kind, ValueError), path)
        if cls.__module__.partition(".")[0] != str(__package__).partition(".")[0]:
            cls.name = path  # a saved recipe must find the class again in a process that never imported it
        return cls

    def _checked(self, cls: Any, path: str) -> Any:
        must = f"{self.kind} {path!r} must be a dataclass with a method {self.method}"
        if not isinstance(cls, type):
            raise ValueError(f"{must}, but is a {type(cls).__name__}; name a class")
        if not dataclasses.is_dataclass(cls):
            raise ValueError(f"{must}, but is not a dataclass; put @dataclass(frozen=True, kw_only=True) above it")
        name = self.method.partition("(")[0]
        if not callable(getattr(cls, name, None)):
            methods = [key for key, value in vars(cls).items() if callable(value) and not key.startswith("_")]
            raise ValueError(f"{must}, but has no method {name}{did_you_mean(name, methods)}; it has "
                             f"{', '.join(methods) or 'none'}")
        for flag, allowed in self.flags.items():
            if getattr(cls, flag, None) not in allowed:
                given = f"; given {getattr(cls, flag)!r:.40}" if hasattr(cls, flag) else ""
                kind = type(next(iter(allowed))).__name__
                raise ValueError(f"{self.kind} {path!r} must define {flag}: ClassVar[{kind}] = "
                                 f"{' or '.join(map(repr, allowed))}{given}")
        return cls


def unknown(what: str, given: str, allowed: Collection[str]) -> str:
    """Return the message for an unknown name: the given name, the nearest allowed one, and all allowed ones."""
    return f"unknown {what} {given!r}{did_you_mean(str(given), allowed)}; allowed: {', '.join(allowed) or 'none'}"


def require_one_of(what: str, given: Any, allowed: Collection[str]) -> None:
    """Raise ValueError unless `given` is one of the allowed names."""
    if given not in allowed:
        raise ValueError(unknown(what, given, allowed))


def _checked(cls: type, whose: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    types = get_type_hints(cls)
    for key in parameters:
        if key not in fields:
            raise ValueError(unknown(f"key of {whose}:", key, fields))
    for key, declared in fields.items():
        if key not in parameters and declared.default is declared.default_factory is dataclasses.MISSING:
            raise ValueError(f"{whose} needs a value for {key!r}")
    return {key: _typed(f"{key} of {whose}", value, types[key]) for key, value in parameters.items()}


def _typed(what: str, value: Any, declared: Any) -> Any:
    strict = ConfigDict(strict=True, arbitrary_types_allowed=True)
    try:
        return TypeAdapter(declared, config=strict).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise ValueError(f"{what} must be {message}, given {value!r}{_yaml_hint(value)}") from error


def _yaml_hint(value: Any) -> str:
    """Return a hint for a number that YAML reads as text: YAML 1.1 reads `1e-3` and `inf` as text."""
    try:
        number = float(value) if isinstance(value, str) else None
    except ValueError:
        return ""
    if number is None:
        return ""
    return f" (text, not a number: write {'.inf' if number == float('inf') else repr(number)})"
