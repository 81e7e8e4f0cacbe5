"""Convert recipes between YAML text and plain values. The YAML is stricter than usual, to avoid common mistakes."""
from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, cast

import yaml
from pydantic import BaseModel

from frpo.errors import ConfigError

MAX_DEPTH = 100
"""Most levels of lists and mappings in a recipe. Reading and writing recurse, and fail a few hundred levels deeper."""

FLATTER = f"lists and mappings are nested more than {MAX_DEPTH} levels deep; make them flatter"


SURROGATE, HALF = re.compile("[\ud800-\udfff]"), "half a character; write the whole one, or remove it"

DIGITS = sys.int_info.default_max_str_digits
"""Most digits of an integer that Python reads and writes."""


class _RecipeYaml(yaml.SafeLoader):
    """Stricter YAML: 1e-6 is a number and a date is text. A key given twice and a lone surrogate are errors.

    A list or mapping that contains itself, and too many levels of them, are errors too.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open: list[str | None] = []  # the anchors of the nodes around the one that is read

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        wrong = FLATTER if len(self._open) > MAX_DEPTH else (
            f"*{event.anchor} stands inside &{event.anchor}, so it would contain itself; write the value out"
            if isinstance(event, yaml.AliasEvent) and event.anchor in self._open else None)
        if wrong:
            raise yaml.composer.ComposerError(None, None, wrong, event.start_mark)
        self._open.append(getattr(event, "anchor", None))
        try:
            return super().compose_node(parent, index)
        finally:
            self._open.pop()

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # the value is none of its tag
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value!r:.40} cannot be read as {kind}; put text into quotes", node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
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
    loader: _RecipeYaml | None = None
    try:
        loader = _RecipeYaml(text)  # a SafeLoader
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{where}{_place(error.problem_mark)}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None
    except ValueError as error:  # of the scanner, such as a character beyond Unicode
        raise ConfigError(f"{where}{_place(loader.get_mark() if loader else None)}: not valid YAML: {error}") from None
    finally:
        if loader:
            loader.dispose()


def _place(mark: yaml.Mark | None) -> str:
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""


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


def unwritable(value: Any, key: str = "") -> Iterator[str]:
    """Yield messages on parts of plain values that the file of a recipe cannot hold, each after its dotted key.

    Such a part comes from Python, or from a tag of YAML such as !!set.
    """
    if isinstance(value, dict | list):
        if key.count(".") > MAX_DEPTH:
            yield f"{key:.60}: {FLATTER}"
            return
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            inside = f"{key}.{name}" if key else str(name)
            if isinstance(name, str) and SURROGATE.search(name):
                yield f"{inside}: the key has a lone surrogate, {HALF}"
            yield from unwritable(item, inside)
    elif type(value) is str:
        if lone := SURROGATE.search(value):
            yield f"{key}: holds the lone surrogate {lone[0]!r}, {HALF}"
    elif type(value) is int:
        if abs(value) >= 10**DIGITS:
            yield f"{key}: holds an integer of more than {DIGITS} digits; write it as text"
    elif value is not None and type(value) not in (bool, float):
        yield (f"{key}: holds {type(value).__name__}, which the file of a recipe cannot hold; give text, a number, "
               "true, false, null, a list or a mapping")
