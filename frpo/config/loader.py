"""Recipe files and dotted overrides into a checked `Recipe`; every mistake becomes one `ConfigError`.

It does not know what the keys mean: that is `sections`.
"""
from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from frpo.config.sections import Recipe, repository_file
from frpo.errors import ConfigError

NOT_IN_DIGEST = {
    "run": {"name", "dir", "num_steps", "save_every", "keep_last", "resume"},
    "rollout": {"startup_timeout_s", "timeout_s"},
    "learner": {"startup_timeout_s", "timeout_s"},
    "weight_sync": {"timeout_s"},
    "evaluate": {"every", "samples", "temperature"},
    "telemetry": {"tensorboard", "wandb", "traces"},
    "checks": {"max_logprob_gap", "parameters_move"},
}
"""Keys that may differ between a checkpoint and the recipe that resumes it."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file (or the name of one in recipes/), its `extends:` chain and `section.key=value` overrides.

    Raises ConfigError naming the key, the value given and what is allowed.
    """
    values = _read_with_bases(_find_recipe(str(path)), seen=())
    for override in overrides:
        values = _merge(values, _parse_override(override))
    return _validated(values, source=str(path))


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """A checked recipe from plain values, as `dump_recipe` gives them."""
    return _validated(values, source="recipe")


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain values: every key, defaults included; `recipe_from_dict` reads it back."""
    return _plain(recipe)


def recipe_digest(recipe: Recipe) -> str:
    """Hash of everything that a checkpoint depends on (not the run's length, folders, limits or sinks)."""
    values = dump_recipe(recipe)
    for section, keys in NOT_IN_DIGEST.items():
        values[section] = {key: value for key, value in values[section].items() if key not in keys}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def recipe_difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys in which two dumped recipes differ, as 'key: old -> new' lines, keys outside the digest left out."""
    lines = []
    for key in sorted(set(old) | set(new)):
        if prefix and key in NOT_IN_DIGEST.get(prefix.rstrip("."), ()):
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += recipe_difference(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if dataclasses.is_dataclass(value):
        return {"name": value.name, **{f.name: getattr(value, f.name) for f in dataclasses.fields(value)}}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _find_recipe(name: str) -> Path:
    try:
        return repository_file("recipes", name, ".yaml")
    except FileNotFoundError as error:
        raise ConfigError(f"recipe not found: {error}") from None


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: `extends:` goes in a circle: {' -> '.join(str(p) for p in (*seen, path))}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections, given {type(values).__name__}")
    base = values.pop("extends", None)
    if base is None:
        return values
    beside = path.parent / base
    base_path = beside if beside.is_file() else _find_recipe(base.removesuffix(".yaml"))
    return _merge(_read_with_bases(base_path, (*seen, path)), values)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, mappings key by key; a renamed estimator drops the keys of the old one."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        renamed = both and key == "advantage" and value.get("name", merged[key].get("name")) != merged[key].get("name")
        merged[key] = _merge(merged[key], value) if both and not renamed else value
    return merged


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-6 as a string; a text that is a number in scientific notation becomes one."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and value[:1] in "-+.0123456789" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _validated(values: dict[str, Any], source: str) -> Recipe:
    try:
        return Recipe.model_validate(_numbers(values))
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def _explain(problem: dict[str, Any]) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1])
        return f"unknown key {location!r}{suggestion(str(problem['loc'][-1]), known)}"
    if problem["type"] == "missing":
        return f"key {location!r} is required"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    shown = "" if isinstance(given, dict | BaseModel) or problem["type"] == "value_error" else f" (given {given!r})"
    return f"{location}: {message}{shown}" if location else message


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


def suggestion(name: str, known: Sequence[str]) -> str:
    """'; did you mean X?' for the nearest known name, otherwise all of them."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
