"""Implement `frpo sweep`: vary the keys of a recipe over values. The combinations are the policies of a matrix."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frpo.config.loader import recipe_from_dict
from frpo.config.retention import RetentionRecipe
from frpo.config.text import parse_yaml
from frpo.errors import ConfigError

GIVEN = {"run.dir": "every policy has its own in the folder of --dir", "run.seed": "give the seeds as --seeds 0 1 2",
         "run.name": "every policy is named after its values"}
"""Keys that a sweep sets itself, and the advice for each."""


def sweep_recipe(recipe: str, overrides: Sequence[str], *, over: Sequence[str], seeds: Sequence[int], folder: str,
                 downstream: Sequence[str] = (), choose: str | None = None, within: Sequence[str] = ()
                 ) -> RetentionRecipe:
    """Make the matrix of a sweep. over: section.key=[values] each. within: measure=[low, high] each.

    Raises ConfigError for a mistake in keys, values or names.
    """
    values = _assignments(over, "--over", "objective.kl_coef=[0.001,0.01]")
    for key in (*values, *(override.partition("=")[0] for override in overrides)):
        if key in GIVEN:
            raise ConfigError(f"a sweep sets {key} itself, so leave it out: {GIVEN[key]}")
    regimes = {Path(each).stem: {"recipe": each} for each in downstream}
    if len(regimes) < len(downstream):
        raise ConfigError(f"--downstream {' '.join(downstream)}: two recipes have the same name, but their forks need "
                          "different folder names; rename a file, or leave one out")
    base = {"recipe": recipe, "overrides": list(overrides)}
    chosen = {"measure": choose} if choose else {}
    return recipe_from_dict({
        "run": {"name": f"sweep of {Path(recipe).stem}", "dir": folder}, "seeds": list(seeds),
        "policies": {"policy": {**base, "over": values}},
        "downstream": regimes, "measure": {"kept": base}, "certificate": None,
        "choose": {**chosen, "bounds": _assignments(within, "--within", "eval/kl=[null,0.5]")}}, RetentionRecipe)


def _assignments(texts: Sequence[str], option: str, example: str) -> dict[str, list[Any]]:
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        values = parse_yaml(value, f"{option} {text!r}")
        if not equals or not key or not isinstance(values, list) or not values:
            raise ConfigError(f"{option} {text!r} is not of the form {example}")
        if key in found:
            raise ConfigError(f"{option} {key} is given twice; give it once, with one list, such as {example}")
        found[key] = values
    return found
