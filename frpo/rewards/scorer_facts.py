"""Read and write `frpo_scorer.json`: what a folder with a reward model says about the texts it was trained on.

`frpo reward-model` writes the file beside the model, `scorer` reads it. This module does not import torch.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from frpo.errors import ModelError

FILE = "frpo_scorer.json"

Kind = Literal["bradley_terry", "cost"]
TextFormat = Literal["chat", "text"]
Dtype = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class ScorerFacts:
    """What a reward model was trained on and how well it does.

    kind: "bradley_terry" (larger is better) or "cost" (above 0 is harmful).
    format: "chat" if prompts and answers were rendered by the tokenizer's chat template, "text" if they were not.
    template: `template_digest` of that chat template; "" for text.
    system_prompt: the system message that was put before every prompt; None if there was none.
    max_length: most tokens of a prompt with its answer in training.
    dtype: precision of the model in training.
    heldout: metric -> its value on held-out rows.
    data: digest of the training data.
    """

    kind: Kind
    format: TextFormat
    template: str
    system_prompt: str | None
    max_length: int
    dtype: Dtype
    heldout: Mapping[str, float] = field(default_factory=dict)
    data: str = ""

    @classmethod
    def read(cls, folder: str | Path) -> Self | None:
        """Read the file in `folder`. Returns None if there is none. Raises ModelError if it is not a record of facts.
        """
        path = Path(folder) / FILE
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}; export the reward model again") from None
        return cls(**_checked(path, found))

    def write(self, folder: str | Path) -> Path:
        """Write the file into `folder`. Returns its path."""
        path = Path(folder) / FILE
        path.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


def template_digest(template: str) -> str:
    """Return the first 16 hex digits of the SHA-256 of a chat template's text."""
    return hashlib.sha256(template.encode()).hexdigest()[:16]


def _checked(path: Path, found: Any) -> dict[str, Any]:
    """Return the fields among the keys of the file. Keys of later versions are left out."""
    names = {each.name for each in fields(ScorerFacts)}
    allowed = {"kind": get_args(Kind), "format": get_args(TextFormat), "dtype": get_args(Dtype)}
    if not isinstance(found, dict) or (missing := sorted(names - {*found})):
        lacks = f"lacks {', '.join(missing)}" if isinstance(found, dict) else "is no mapping"
        raise ModelError(f"{path} {lacks}; export the reward model again")
    for name, values in allowed.items():
        if found[name] not in values:
            raise ModelError(f"{path}: {name} is {found[name]!r}; allowed are {', '.join(map(repr, values))}")
    return {name: found[name] for name in names}
