"""Hooks of mkdocs: pages about keys and commands are made from the code that they describe, when the site is built."""
from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re
from collections.abc import Iterator
from typing import Any
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
        yield _table(command, alone)
    for name, found in sections.items():
        if len(found) > 1:
            yield f"### {name} {{ #{command}-{name} }}"
            yield f"{_escaped(found[0].meaning).capitalize()}."
            yield _table(command, found[1:])


def _table(command: str, found: list[Key]) -> str:
    rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for key in found:
        values = ", ".join(f"`{value}`" for value in key.values)
        default = "a section" if key.default is None else _code(_as_yaml(key.default))
        shown = re.sub(r"([._\]])(?=\w)", r"\1<wbr>", key.name)
        rows.append(f'| <code id="{command}.{key.name}">{shown}</code> | {default} | {values} '
                    f"| {_escaped(key.meaning)} |")
    return "\n".join(rows)


def _as_yaml(default: str) -> str:
    """A default as a recipe has it."""
    text = re.fullmatch(r"'([\w./-]+)'", default)
    return text[1] if text else {"None": "null", "True": "true", "False": "false"}.get(default, default)


def name_tables() -> str:
    """What the keys that take {name: ..., its own keys} can name."""
    return "\n\n".join(text for key, registry in REGISTRIES.items() if key != "auxiliary.objective"
                       for text in _of_registry(key, registry))


def _of_registry(key: str, registry: Any) -> Iterator[str]:
    command = "finetune" if key == "objective" else "train"
    yield f"### Names of {key} ({command}) {{ #names-{command}-{key.rpartition('.')[2]} }}"
    rows = ["| name | its keys and their defaults | in short |", "|---|---|---|"]
    for name, cls in registry.classes().items():
        own = ", ".join(_code(f"{field.name}: {_as_yaml(repr(field.default))}") for field in dataclasses.fields(cls))
        rows.append(f"| `{name}` | {own or 'none'} | {_escaped(inspect.getdoc(cls).splitlines()[0])} |")
    yield "\n".join(rows)


def command_helps() -> str:
    """The help of every command, as it prints it."""
    found = [("frpo", "frpo", _help("--help"))]
    found += [(name, f"frpo {name}", _help(name, "--help")) for name in (command.__name__ for command in COMMANDS)]
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
