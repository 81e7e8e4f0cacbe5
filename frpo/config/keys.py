"""List every key of a recipe with its default, meaning and values, read from the sections that define the key."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key of a recipe. name: dotted, such as learner.lr. default: as text, None for a section. values: all allowed
    values of a Literal or bool key, else empty.
    """

    name: str
    default: str | None
    meaning: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        if self.default is None:
            return f"# {self.name}: {self.meaning}"
        return f"{self.name} = {self.default}  # {self.meaning}"


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Yield the keys of a recipe or section in their order, each section before its own keys."""
    for name, field in model.model_fields.items():
        section, meaning = _section(field.annotation), field.description or ""
        if section is None:
            yield Key(name=f"{prefix}{name}", default=_default(field), meaning=meaning,
                      values=_values(field.annotation))
        else:
            text = str(field.annotation)
            many = "[]" if "list" in text else ".NAME" if "dict" in text else ""
            yield Key(name=f"{prefix}{name}{many}", default=None, meaning=meaning, values=())
            yield from keys(section, f"{prefix}{name}{many}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *(inner for part in (annotation, *get_args(annotation)) for inner in get_args(part))):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _default(field: Any) -> str:
    if field.default is not PydanticUndefined:
        return repr(field.default)
    return repr(field.default_factory()) if field.default_factory else "required"


def _values(annotation: Any) -> tuple[str, ...]:
    """Return the values of Literal and bool, as a recipe writes them."""
    if annotation is bool:
        return ("true", "false")
    if get_origin(annotation) is Literal:
        return tuple(map(str, get_args(annotation)))
    return tuple(value for part in get_args(annotation) for value in _values(part))
