"""Frozen keyword-only dataclasses that a recipe names: registered by a decorator, found by scanning, built strictly.

It does not know what the classes do. A registry holds one kind of them (advantages, surrogates); a file put into this
package is found without being listed anywhere, a class outside it by one of FORMS.
"""
from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar, cast, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from frpo.inputs import name_of
from frpo.loading import did_you_mean, load_function

Class = TypeVar("Class", bound=type)

FORMS = "'package.module:Class' or 'path/file.py:Class'"
"""How a recipe names a class that is not of this package."""


class Registry:
    """Classes of one kind by the name that recipes use.

    kind: the word of messages ("advantage").
    method: what every class must have, as a signature ("advantages(rewards_G)").
    flags: class variables that it must set.
    """

    def __init__(self, kind: str, method: str, flags: Collection[str] = ()):
        self.kind, self.method, self.flags = kind, method, flags
        self._classes: dict[str, type] = {}

    def register(self, name: str) -> Callable[[Class], Class]:
        """Decorator: the frozen dataclass is `name` from now on.

        Raises ValueError where the name is taken by another class.
        """

        def register(cls: Class) -> Class:
            frozen = dataclasses.is_dataclass(cls) and cast(Any, cls).__dataclass_params__.frozen
            assert frozen, f"{cls.__qualname__} must be a frozen dataclass"
            other = self._classes.get(name, cls)
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                taken = f"{other.__module__}:{other.__qualname__}"
                raise ValueError(f"{self.kind} {name!r} is {taken} already; choose another name")
            cast(Any, cls).name = name
            self._classes[name] = cls
            return cls

        return register

    def classes(self) -> dict[str, type]:
        """Every registered class by name, all files of this package included."""
        package = importlib.import_module(__package__)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{__package__}.{module.name}")
        return dict(sorted(self._classes.items()))

    def build(self, values: Mapping[str, Any]) -> Any:
        """The object that {"name": ..., **its fields} describes; name may be one of FORMS.

        Raises ValueError naming what was given, what is allowed and the nearest of it.
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
        """An object that stands in a recipe itself; None if the value describes one instead.

        A class outside the package gets the name by which a recipe finds it. Raises ValueError for one of another kind.
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
        method = getattr(cls, self.method.partition("(")[0], None)
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and callable(method)):
            raise ValueError(f"{self.kind} {path!r} must be a dataclass with a method {self.method}")
        for flag in self.flags:
            if not hasattr(cls, flag):
                raise ValueError(f"{self.kind} {path!r} must say {flag}: ClassVar[bool] = True or False")
        return cls


def unknown(what: str, given: str, allowed: Collection[str]) -> str:
    """The message for a name that does not exist: what was given, the nearest and all that is allowed."""
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
    """YAML 1.1 reads `1e-3` and `inf` as text, which looks right in the recipe."""
    try:
        number = float(value) if isinstance(value, str) else None
    except ValueError:
        return ""
    if number is None:
        return ""
    return f" (text, not a number: write {'.inf' if number == float('inf') else repr(number)})"
