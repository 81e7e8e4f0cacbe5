"""The DeepSpeed JSON that a recipe names: memory strategy only, everything else is the recipe's."""
from __future__ import annotations

import json
from typing import Any

from frpo.config.sections import repository_file
from frpo.errors import ConfigError

RECIPE_DECIDES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
                  "gradient_clipping", "bf16", "fp16", "optimizer", "scheduler")


def memory_strategy(name: str) -> dict[str, Any]:
    """The DeepSpeed JSON `name` (a path, or a file of ds_configs).

    Raises ConfigError if there is none, if it is not JSON or if it holds keys that the recipe decides.
    """
    try:
        path = repository_file("ds_configs", name, ".json")
        strategy = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"learner.deepspeed: {error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"learner.deepspeed: {path} is not JSON: {error}") from None
    clash = [key for key in RECIPE_DECIDES if key in strategy]
    if clash:
        raise ConfigError(f"{path}: {', '.join(clash)} come from the recipe (learner.*, model.dtype); remove them here")
    return strategy
