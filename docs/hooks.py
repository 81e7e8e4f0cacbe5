"""Hooks of mkdocs: pages about keys and commands are made from the code that they describe, when the site is built."""
from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re
from collections.abc import Iterator
from typing import Any, get_args
from unittest import mock

from frpo.__main__ import COMMANDS
from frpo.commands.arguments import parse
from frpo.config.keys import Key, keys
from frpo.config.loader import KINDS
from frpo.config.reference import REGISTRIES

MARKER = re.compile(r"^<!-- (keys|names|commands) -->$", re.MULTILINE)
WIDTH = "96"
"""Columns of a command's help."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what is generated in the place of its marker."""
    made = {"keys": lambda: key_tables(), "names": lambda: name_tables(), "commands": lambda: command_helps()}
    return MARKER.sub(lambda found: made[found[1]](), markdown)


def key_tables() -> str:
    """A chapter a kind of recipe, a section a section of it, a row a key."""
    return "\n\n".join(text for kind in KINDS for text in _of_kind(kind))


def _of_kind(kind: type) -> Iterator[str]:
    command = kind.COMMAND
    yield f"## Recipes of frpo {command} {{ #{command} }}"
    sections: dict[str, list[Key]] = {}
    for key in keys(kind):
        sections.setdefault(re.split(r"[.\[]", key.name)[0], []).append(key)
    alone = [found[0] for found in sections.values() if len(found) == 1]
    if alone:
        yield f"### Keys without a section {{ #{command}-alone }}"
        yield _table(kind, alone)
    for name, found in sections.items():
        if len(found) > 1:
            yield f"### {name} {{ #{command}-{name} }}"
            yield f"{_escaped(found[0].meaning[:1].upper() + found[0].meaning[1:])}."
            yield _table(kind, found[1:])


def _table(kind: type, found: list[Key]) -> str:
    command = kind.COMMAND
    rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for key in found:
        values = ", ".join(f"`{value}`" for value in key.values)
        default = _code(_default(command, key)) if key.default is not None else _section_default(kind, key.name)
        shown = re.sub(r"([._\]])(?=\w)", r"\1<wbr>", key.name)
        rows.append(f'| <code id="{command}.{key.name}">{shown}</code> | {default} | {values} '
                    f"| {_escaped(key.meaning)} |")
    return "\n".join(rows)


def _default(command: str, key: Key) -> str:
    """A key's default as a recipe has it."""
    registry = REGISTRIES.get(command, {}).get(key.name)
    for name, cls in registry.classes().items() if registry else ():
        if key.default.startswith(f"{cls.__name__}("):
            own = "".join(f", {field.name}: {_as_yaml(repr(field.default))}" for field in dataclasses.fields(cls))
            return f"{{name: {name}{own}}}"
    return _as_yaml(key.default)


def _section_default(kind: type, name: str) -> str:
    """Whether a section within another one is there if a recipe says nothing."""
    section = kind
    *outer, last = re.sub(r"\[\]|\.NAME", "", name).split(".")
    for part in outer:
        annotation = section.model_fields[part].annotation
        section = next(found for found in _classes(annotation) if hasattr(found, "model_fields"))
    field = section.model_fields[last]
    return "required" if field.is_required() else "`null`" if field.default is None else "its keys' own"


def _classes(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for part in get_args(annotation):
        yield from _classes(part)


def _as_yaml(default: str) -> str:
    """A value's repr as a recipe has it."""
    text = re.fullmatch(r"'([\w./-]+)'", default)
    return text[1] if text else {"None": "null", "True": "true", "False": "false"}.get(default, default)


def name_tables() -> str:
    """What the keys that take {name: ..., its own keys} can name."""
    repeated = ("auxiliary.objective", "objective.constraint.advantage")
    return "\n\n".join(text for command, registries in REGISTRIES.items() for key, registry in registries.items()
                       if key not in repeated for text in _of_registry(command, key, registry))


def _of_registry(command: str, key: str, registry: Any) -> Iterator[str]:
    yield f"### Names of {key} ({command}) {{ #names-{command}-{key.rpartition('.')[2]} }}"
    rows = ["| name | its keys and their defaults | in short |", "|---|---|---|"]
    for name, cls in registry.classes().items():
        own = ", ".join(_code(f"{field.name}: {_as_yaml(repr(field.default))}") for field in dataclasses.fields(cls))
        rows.append(f"| `{name}` | {own or 'none'} | {_escaped(inspect.getdoc(cls).splitlines()[0])} |")
    yield "\n".join(rows)


def command_helps() -> str:
    """The help of every command, as it prints it."""
    found = [("frpo", "frpo", _help("--help"))]
    names = [command.__name__.replace("_", "-") for command in COMMANDS]
    found += [(name, f"frpo {name}", _help(name, "--help")) for name in names]
    return "\n\n".join(f"## {title} {{ #{anchor} }}\n\n```text\n{text}\n```" for anchor, title, text in found)


def _help(*arguments: str) -> str:
    text = io.StringIO()
    with mock.patch.dict(os.environ, {"COLUMNS": WIDTH, "NO_COLOR": "1"}), contextlib.redirect_stdout(text), \
            contextlib.suppress(SystemExit):
        parse(arguments, COMMANDS)
    return text.getvalue().rstrip()


def _code(text: str) -> str:
    return "`" + text.replace("|", "&#124;") + "`"


def _escaped(text: str) -> str:
    """Text that no character of is Markdown, but for names in backticks."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([\\*_{}\[\]#])", r"\\\1", part).replace("<", "&lt;").replace("|", "&#124;")
                  for part in parts[::2]]
    return "`".join(parts)
