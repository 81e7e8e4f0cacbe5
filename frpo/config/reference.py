"""Print every key of every recipe as text, generated from the code that defines the keys."""
from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping

from frpo.config.keys import keys
from frpo.config.loader import KINDS, suggestion
from frpo.errors import ConfigError
from frpo.objectives.base import ADVANTAGES, SURROGATES
from frpo.objectives.preference import PREFERENCE
from frpo.objectives.registry import Registry
from frpo.objectives.scalarise import SCALARISERS
from frpo.objectives.supervised import SUPERVISED

REGISTRIES: Mapping[str, Mapping[str, Registry]] = {
    "train": {"objective.advantage": ADVANTAGES, "objective.surrogate": SURROGATES, "objective.scalarise": SCALARISERS,
              "objective.constraint.advantage": ADVANTAGES, "auxiliary.objective": SUPERVISED},
    "finetune": {"objective": SUPERVISED}, "reward-model": {"objective": PREFERENCE}}
"""Command -> key -> registry of the classes that the key can name."""


def key_reference(section: str = "") -> str:
    """Return one line for each key: dotted name, default, meaning. Recipes of `frpo train` come before other recipes.

    section: return only this key or section. Raises ConfigError if no recipe has it.
    """
    chosen = {kind: [key for key in keys(kind) if _is_within(key.name, section)] for kind in KINDS}
    if not any(chosen.values()):
        known = list(dict.fromkeys(name for kind in KINDS for name in kind.model_fields))
        raise ConfigError(f"no recipe has a key {section!r}{suggestion(section, known)}")
    return "\n".join(line for kind, found in chosen.items() if found for line in (
        f"# === recipes of `frpo {kind.COMMAND}` ===",
        *(line for key in found for line in (str(key), *(_choices(kind.COMMAND, key.name) if section else ())))))


def _choices(command: str, key: str) -> Iterator[str]:
    """Yield the names that a key with {name: ..., own keys} can take, each with its own keys and their meaning."""
    registry = REGISTRIES.get(command, {}).get(key)
    for name, cls in registry.classes().items() if registry else ():
        own = "".join(f", {field.name}: {'required' if field.default is dataclasses.MISSING else field.default}"
                      for field in dataclasses.fields(cls))
        yield f"#   {{name: {name}{own}}}"
        yield from (f"#     {line}".rstrip() for line in (inspect.getdoc(cls) or "").splitlines())


def _is_within(name: str, section: str) -> bool:
    name = re.sub(r"\[\]|\.NAME", "", name)
    return not section or name == section or name.startswith(f"{section}.")
