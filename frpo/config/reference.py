"""Every key of every recipe as text, made from the code that it describes."""
from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator

from frpo.config.keys import keys
from frpo.config.loader import KINDS, suggestion
from frpo.errors import ConfigError
from frpo.objectives.base import ADVANTAGES, SURROGATES
from frpo.objectives.supervised import SUPERVISED

REGISTRIES = {"objective.advantage": ADVANTAGES, "objective.surrogate": SURROGATES, "objective": SUPERVISED,
              "auxiliary.objective": SUPERVISED}
"""What a key names, by the name of the key."""


def key_reference(section: str = "") -> str:
    """One line a key: dotted name, default, meaning; recipes of `frpo train`, then those of other commands.

    section: only of this key or section. Raises ConfigError where no recipe has it.
    """
    chosen = {kind: [key for key in keys(kind) if _is_within(key.name, section)] for kind in KINDS}
    if not any(chosen.values()):
        known = list(dict.fromkeys(name for kind in KINDS for name in kind.model_fields))
        raise ConfigError(f"no recipe has a key {section!r}{suggestion(section, known)}")
    return "\n".join(line for kind, found in chosen.items() if found for line in (
        f"# === recipes of `frpo {kind.COMMAND}` ===",
        *(line for key in found for line in (str(key), *(_choices(key.name) if section else ())))))


def _choices(key: str) -> Iterator[str]:
    """What can be named at a key that takes {name: ..., its own keys}, each with its keys and what they mean."""
    registry = REGISTRIES.get(key)
    for name, cls in registry.classes().items() if registry else ():
        own = "".join(f", {field.name}: {'required' if field.default is dataclasses.MISSING else field.default}"
                      for field in dataclasses.fields(cls))
        yield f"#   {{name: {name}{own}}}"
        yield from (f"#     {line}".rstrip() for line in (inspect.getdoc(cls) or "").splitlines())


def _is_within(name: str, section: str) -> bool:
    name = re.sub(r"\[\]|\.NAME", "", name)
    return not section or name == section or name.startswith(f"{section}.")
