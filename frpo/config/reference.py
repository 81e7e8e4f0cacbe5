"""Every key of every recipe as text, made from the code that it describes."""
from __future__ import annotations

import re

from frpo.config.keys import keys
from frpo.config.loader import KINDS, suggestion
from frpo.errors import ConfigError


def key_reference(section: str = "") -> str:
    """One line a key: dotted name, default, meaning; recipes of `frpo train`, then those of other commands.

    section: only of this key or section. Raises ConfigError where no recipe has it.
    """
    chosen = {kind: [key for key in keys(kind) if _is_within(key.name, section)] for kind in KINDS}
    if not any(chosen.values()):
        known = list(dict.fromkeys(name for kind in KINDS for name in kind.model_fields))
        raise ConfigError(f"no recipe has a key {section!r}{suggestion(section, known)}")
    return "\n".join(line for kind, found in chosen.items() if found
                     for line in (f"# === recipes of `frpo {kind.COMMAND}` ===", *map(str, found)))


def _is_within(name: str, section: str) -> bool:
    name = re.sub(r"\[\]|\.NAME", "", name)
    return not section or name == section or name.startswith(f"{section}.")
