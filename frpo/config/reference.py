"""Every key of a recipe with its default and meaning, as text: the reference is made from the code it describes."""
from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from frpo.config.finetune import FinetuneRecipe
from frpo.config.retention import RetentionRecipe
from frpo.config.sections import Recipe


def key_reference() -> str:
    """One line a key: dotted name, default, meaning; recipes of `frpo train`, then those of other commands."""
    return "\n".join(line for kind in (Recipe, FinetuneRecipe, RetentionRecipe)
                     for line in (f"# === recipes of `frpo {kind.COMMAND}` ===", *_lines(kind, "")))


def _lines(model: type[BaseModel], prefix: str) -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is None:
            lines.append(f"{prefix}{name} = {_default(field)}  # {field.description}")
        else:
            text = str(field.annotation)
            many = "[]" if "list" in text else ".NAME" if "dict" in text else ""
            lines.append(f"# {prefix}{name}{many}: {field.description}")
            lines += _lines(section, f"{prefix}{name}{many}.")
    return lines


def _section(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *(inner for part in (annotation, *get_args(annotation)) for inner in get_args(part))):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _default(field: Any) -> str:
    if field.default is not PydanticUndefined:
        return repr(field.default)
    return repr(field.default_factory()) if field.default_factory else "required"
