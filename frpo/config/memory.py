"""Read the DeepSpeed JSON that a recipe names. The JSON sets the memory strategy only; the recipe sets the rest."""
from __future__ import annotations

import json
from typing import Any

from frpo.config.sections import repository_file
from frpo.errors import ConfigError

RECIPE_DECIDES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
                  "gradient_clipping", "bf16", "fp16", "optimizer", "scheduler", "data_types",
                  "communication_data_type")
STAGES = (1, 2, 3)
"""Allowed stages of ZeRO. At stage 0 DeepSpeed sums bf16 gradients in bf16 and cannot change the number of ranks."""


def memory_strategy(name: str) -> dict[str, Any]:
    """Read the DeepSpeed JSON `name` (a path, or a file of ds_configs).

    Raises ConfigError if there is no such file, if it is not JSON, if it names no allowed stage of ZeRO, or if it holds
    keys that the recipe sets.
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
        raise ConfigError(f"{path}: {', '.join(clash)} come from the recipe (learner.*, model.dtype); remove them "
                          "from this file")
    stage = strategy.get("zero_optimization", {}).get("stage")
    if stage not in STAGES:
        raise ConfigError(f"{path}: zero_optimization.stage = {stage!r} should be 1, 2 or 3; 1 costs nothing on "
                          "one rank")
    return strategy
