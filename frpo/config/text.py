"""Convert recipes between YAML text and plain values. The YAML is stricter than usual, to avoid common mistakes."""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, cast

import yaml
from pydantic import BaseModel

from frpo.errors import ConfigError


class _RecipeYaml(yaml.SafeLoader):
    """Stricter YAML: 1e-6 is a number and a date is text. A key given twice and a lone surrogate are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise yaml.constructor.ConstructorError(
                None, None, f"{value[error.start]!r} is a lone surrogate, half a character", node.start_mark) from None
        return value


_RecipeYaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if not tag.endswith((":float", ":timestamp"))]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_RecipeYaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+.0123456789"))


class _RecipeDumper(yaml.SafeDumper):
    """Quote text that `_RecipeYaml` would not read as text."""


_RecipeDumper.yaml_implicit_resolvers = _RecipeYaml.yaml_implicit_resolvers


def parse_yaml(text: str, where: str) -> Any:
    """Parse a value as in recipes. Raises ConfigError, naming `where`."""
    try:
        return yaml.load(text, Loader=_RecipeYaml)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{where}{place}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def as_yaml(values: Mapping[str, Any]) -> str:
    """Format plain values as the text of a recipe."""
    return yaml.dump(values, Dumper=_RecipeDumper, sort_keys=False)


def plain(value: Any) -> Any:
    """Convert sections and objectives to mappings, also inside lists and mappings. An objective's mapping has its name.
    """
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if dataclasses.is_dataclass(value):
        chosen = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return {"name": cast(Any, value).name, **chosen}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
