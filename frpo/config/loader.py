"""Load recipe files and dotted overrides into a checked `Recipe`. Every mistake becomes a `ConfigError`.

`sections` defines the meaning of the keys.
"""
from __future__ import annotations

import copyreg
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, overload

from pydantic import BaseModel, ValidationError

from frpo.config.base import FROM_FILE, Section, WholeRecipe
from frpo.config.finetune import FinetuneRecipe
from frpo.config.keys import keys
from frpo.config.other_names import translate
from frpo.config.preference import RewardModelRecipe
from frpo.config.retention import RetentionRecipe
from frpo.config.sections import Recipe, repository_file, repository_files
from frpo.config.text import FLATTER, MAX_DEPTH, as_yaml, parse_yaml, plain, unwritable
from frpo.errors import ConfigError
from frpo.loading import load_function, nearest
from frpo.objectives.preference import preference_losses
from frpo.objectives.supervised import supervised_losses

PolicyRecipe = Recipe | FinetuneRecipe
"""Recipe of a run that trains a policy."""
AnyRecipe = PolicyRecipe | RewardModelRecipe
"""Recipe of one training run."""
Source = str | Path | Mapping[str, Any] | Section
"""Forms in which Python code may give a recipe."""
Kind = TypeVar("Kind", bound=WholeRecipe)
KINDS = (Recipe, FinetuneRecipe, RewardModelRecipe, RetentionRecipe)

NOT_IN_DIGEST = {
    "run": {"name", "dir", "device", "num_steps", "save_every", "keep_last", "max_restarts",
            "gpu_wait_s", "resume"},
    "reference": {"mode", "cache_dir"},
    "model": {"attn_implementation"},
    "rollout": {"assignment", "num_engines", "tensor_parallel_size", "threads", "block_size", "kv_cache_mb",
                "gpu_memory_utilization", "engine_kwargs", "hook_timeout_s", "replay", "max_restarts",
                "startup_timeout_s", "timeout_s"},
    "learner": {"num_ranks", "ranks", "deepspeed", "micro_batch_tokens", "packing", "gradient_checkpointing", "threads",
                "startup_timeout_s", "timeout_s"},
    "placement": {"mode", "sleep", "offload_optimizer", "learner_hosts", "engine_hosts"},
    "weight_sync": {"backend", "staged", "adapters", "bucket_mb", "timeout_s"},
    "evaluate": {"every", "samples", "temperature", "pass_at", "success", "best"},
    "telemetry": {"tensorboard", "wandb", "project", "group", "tags", "traces"},
    "checks": {"max_logprob_gap", "parameters_move", "rewards", "same_function"},
    "rewards": {"actor", "processes", "timeout_s"},
}
"""Keys that may differ between a checkpoint and the recipe that resumes it.

These keys set limits, outputs, and where and in which portions the same numbers are computed. They change only
rounding.
"""

REWORDED = {
    "model_type": "should be a mapping of keys",
    "list_type": "should be a list (an override replaces all of it)",
    "tuple_type": "should be a list",
    "too_short": "should not be empty",
    "finite_number": "should be a finite number",
}
"""Type of a pydantic error -> message in the words of recipes, for messages that name pydantic's own types."""

NAMED = ("advantage", "surrogate", "scalarise", "objective")
"""Keys whose mapping may be {name: ..., keys that belong to the name}."""

SHORT = {**dict.fromkeys(NAMED, "name"), "placement": "mode"}
"""Key whose mapping may be written as one value -> the key inside the mapping that gets this value."""


@overload
def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe: ...


@overload
def load_recipe(path: str | Path, overrides: Sequence[str], kind: type[Kind]) -> Kind: ...


def load_recipe(path: str | Path, overrides: Sequence[str] = (), kind: type[WholeRecipe] = Recipe) -> WholeRecipe:
    """Read a recipe file (or the name of one in recipes/), its `extends:` chain and `section.key=value` overrides.

    kind: Recipe for reinforcement learning, FinetuneRecipe for supervised fine-tuning, RewardModelRecipe for a reward
    or cost model, RetentionRecipe for a matrix.
    Raises ConfigError naming the key, the given value and the allowed values.
    """
    values = _read_overridden(path, overrides)
    found = _kind_of(values, kind)
    if found is not kind:
        raise ConfigError(f"{path} is a recipe of `frpo {found.COMMAND}`, by its sections; this command takes recipes "
                          f"of `frpo {kind.COMMAND}`")
    return _validated(values, kind, str(path), FROM_FILE)


def to_recipe(source: Source, overrides: Sequence[str], kind: type[Kind]) -> Kind:
    """Make a recipe of this kind from a recipe object, a dictionary, a path or a name.

    A dictionary has the keys of a recipe file, `extends` included. Its values may also be sections, and functions or
    rows instead of their names. Raises ConfigError.
    """
    if isinstance(source, WholeRecipe):
        if not isinstance(source, kind):
            raise ConfigError(f"a {kind.__name__} (of `frpo {kind.COMMAND}`) is needed, given a "
                              f"{type(source).__name__}")
        return _validated(_overridden(dump_recipe(source), overrides), kind, "recipe") if overrides else source
    if isinstance(source, Mapping):
        return _validated(_overridden(_with_base(_given(source), Path(), ()), overrides), kind, source="recipe")
    if isinstance(source, str | Path):
        return load_recipe(source, overrides, kind)
    raise ConfigError(f"a recipe is a {kind.__name__}, a dictionary, a file's path or the name of one in recipes/, "
                      f"given {type(source).__name__}")


def _given(value: Any, depth: int = 0) -> Any:
    """Convert sections to mappings of the keys that were set, so that they can be merged over other values."""
    if depth > MAX_DEPTH:
        raise ConfigError(f"recipe: {FLATTER}")
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in value.model_fields_set}
    return {key: _given(item, depth + 1) for key, item in value.items()} if isinstance(value, Mapping) else value


def load_any_recipe(path: str | Path, overrides: Sequence[str] = ()) -> WholeRecipe:
    """Read a recipe of any kind, as `load_recipe` does. The sections of the recipe decide its kind."""
    values = _read_overridden(path, overrides)
    return _validated(values, _kind_of(values, Recipe), str(path), FROM_FILE)


def load_training(path: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Read a recipe of one training, as `load_recipe` does. Raises ConfigError for a retention recipe."""
    values = _read_overridden(path, overrides)
    kind = _kind_of(values, Recipe)
    if kind is RetentionRecipe:
        raise ConfigError(f"{path} is a recipe of `frpo {kind.COMMAND}`; give a recipe of `frpo train`, "
                          "`frpo finetune` or `frpo reward-model`")
    return cast(AnyRecipe, _validated(values, kind, str(path), FROM_FILE))


def load_policy(path: str | Path, overrides: Sequence[str] = ()) -> PolicyRecipe:
    """Read a recipe of `frpo train` or `frpo finetune`, as `load_recipe` does. Raises ConfigError for other kinds."""
    recipe = load_training(path, overrides)
    if isinstance(recipe, RewardModelRecipe):
        raise ConfigError(f"{path} is a recipe of `frpo {recipe.COMMAND}`; give a recipe of `frpo train` or "
                          "`frpo finetune`")
    return recipe


def recipe_text(path: str | Path) -> str:
    """Return the text of a recipe with its `extends:` chain merged, so that it needs no other file. Not checked."""
    return as_yaml(_read_with_bases(_find_recipe(str(path)), seen=()))


def _read_overridden(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    return _overridden(_read_with_bases(_find_recipe(str(path)), seen=()), overrides)


def _overridden(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for override in overrides:
        changes = _merge(changes, _parse_override(override))
    return _merge(values, changes)


def _kind_of(values: dict[str, Any], default: type[WholeRecipe]) -> type[WholeRecipe]:
    """Return the kind of recipe by its keys, or `default`.

    Only a matrix has policies, only RL has rewards, and only an objective on given answers has a name. A name tells
    losses on pairs from other losses. About a class outside frpo, `default` decides if it takes one, else the class.
    """
    if "policies" in values:
        return RetentionRecipe
    if "rewards" in values:
        return Recipe
    objective = values.get("objective")
    name = objective.get("name") if isinstance(objective, dict) else objective
    if not isinstance(name, str):
        return default
    if name in preference_losses():
        return RewardModelRecipe
    if name in supervised_losses():
        return FinetuneRecipe
    return default if default in (FinetuneRecipe, RewardModelRecipe) else _kind_of_class(name)


def _kind_of_class(name: str) -> type[WholeRecipe]:
    """Return the kind of recipe that takes the loss `name` outside frpo. A loss that cannot be loaded is refused later.
    """
    try:
        on_pairs = hasattr(load_function(name, "objective", ValueError), "compares")
    except ValueError:
        return FinetuneRecipe
    return RewardModelRecipe if on_pairs else FinetuneRecipe


def recipe_names(command: str | None = None) -> list[str]:
    """List the names of the recipes in recipes/ that a command (train, finetune, ...) takes; None: of all."""
    found = {path.stem: path for path in repository_files("recipes", ".yaml")}
    return [name for name, path in sorted(found.items())
            if command is None or command == _kind_of(_read_with_bases(path, seen=()), Recipe).COMMAND]


@overload
def recipe_from_dict(values: dict[str, Any]) -> Recipe: ...


@overload
def recipe_from_dict(values: dict[str, Any], kind: type[Kind]) -> Kind: ...


def recipe_from_dict(values: dict[str, Any], kind: type[WholeRecipe] = Recipe) -> WholeRecipe:
    """Make a checked recipe from plain values, as `dump_recipe` returns them."""
    return _validated(values, kind, source="recipe")


def dump_recipe(recipe: WholeRecipe) -> dict[str, Any]:
    """Return the resolved recipe as plain values: every key, defaults included. `recipe_from_dict` reads it back."""
    return plain(recipe)


def _by_values(recipe: WholeRecipe) -> tuple[Any, ...]:
    return recipe_from_dict, (dump_recipe(recipe), type(recipe))


# Another process finds the classes in a recipe by name, as from a recipe file.
for _kind in (Recipe, FinetuneRecipe, RewardModelRecipe):
    copyreg.pickle(_kind, _by_values)


def recipe_digest(recipe: AnyRecipe, within: str | None = None) -> str:
    """Hash everything that a checkpoint depends on: all keys except those of NOT_IN_DIGEST.

    within: a folder. Paths inside this folder are hashed relative to it, so its location makes no difference.
    """
    decisive = {key: relative(value, within) for key, value in _leaves(dump_recipe(recipe)).items()
                if value is not None}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def relative(value: Any, folder: str | None) -> Any:
    """Return a path inside the folder relative to the folder, and any other value unchanged."""
    inside = isinstance(value, str) and folder is not None and value.startswith(f"{folder}/")
    return f"./{value.removeprefix(f'{folder}/')}" if inside else value


def recipe_difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """List 'key: old -> new' for every dotted key of the digest in which two dumped recipes differ."""
    before, after = _leaves(old), _leaves(new)
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in sorted(before | after)
            if before.get(key) != after.get(key)]


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> plain value of everything in the digest. Callers treat an absent key as null."""
    section, _, key = re.sub(r"\.\d+", "", prefix).partition(".")
    if key in NOT_IN_DIGEST.get(section, ()):
        return {}
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {prefix: value}
    return {name: leaf for key, item in value.items()
            for name, leaf in _leaves(item, f"{prefix}.{key}" if prefix else key).items()}


def _find_recipe(name: str, beside: Path | None = None) -> Path:
    """Return the file of a recipe: `beside` if it exists, else the path `name`, else the recipe of this name."""
    try:
        return beside if beside is not None and beside.is_file() else repository_file("recipes", name, ".yaml")
    except FileNotFoundError as error:
        raise ConfigError(f"recipe not found: {error}") from None
    except OSError as error:  # a name too long, a folder above it that may not be entered
        raise ConfigError(f"recipe {name!r:.200} cannot be found: {error.strerror}; check the path") from None


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: `extends:` goes in a circle: {' -> '.join(str(p) for p in (*seen, path))}; "
                          "remove it from one of them")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8") from None
    values = parse_yaml(text, str(path))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections, given {type(values).__name__}")
    return _with_base(values, path.parent, (*seen, path))


def _with_base(values: dict[str, Any], folder: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Merge the values over those of the recipe that they extend. That recipe may lie in `folder`."""
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{seen[-1] if seen else 'recipe'}: extends: should be one recipe's name or path, given "
                          f"{_shown(base)}")
    return _merge(_read_with_bases(_find_recipe(base.removesuffix(".yaml"), folder / base), seen), values)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge `changes` over `base`, mappings key by key. A mapping with a new `name` drops the old name's keys."""
    merged = dict(base)
    for key, value in changes.items():
        if key in SHORT and isinstance(value, dict) and isinstance(merged.get(key), str):
            merged[key] = {SHORT[key]: merged[key]}
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        renamed = both and key in NAMED and {"name"} <= value.keys() & merged[key].keys() and (
            value["name"] != merged[key]["name"])
        merged[key] = _merge(merged[key], value) if both and not renamed else value
    return merged


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {override!r:.200} is not of the form section.key=value")
    if key.count(".") >= MAX_DEPTH:
        raise ConfigError(f"override {override!r:.200}: {FLATTER}")
    value = parse_yaml(text, f"override {override!r:.200}")
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _validated(values: dict[str, Any], kind: type[Kind], source: str, context: str | None = None) -> Kind:
    try:
        recipe = kind.model_validate(values, context=context)
        lines = [*unwritable(dump_recipe(recipe))]
    except ValidationError as error:
        lines = [_explain(dict(problem), kind) for problem in error.errors()]
    except RecursionError:
        lines = [FLATTER]
    if lines:
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines))
    return recipe


def _explain(problem: dict[str, Any], kind: type[WholeRecipe]) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return _unknown(problem, kind)
    if problem["type"] == "missing":
        return f"key {location!r} is required"
    message, given = problem["msg"].removeprefix("Value error, "), problem["input"]
    if problem["type"] == "value_error":
        if problem["loc"] in kind.NAMED and isinstance(given, dict):
            location += f".{_named_key(message, given)}"
        return f"{location}: {message}" if location else message
    message = REWORDED.get(problem["type"], message).replace("Input should", "should")
    return f"{location}: {message}, given {_shown(given)}"


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except (RecursionError, ValueError):  # levels and digits beyond what Python writes
        return f"{type(value).__name__} that is too large to show"


def _unknown(problem: dict[str, Any], kind: type[BaseModel]) -> str:
    """Return the message for an unknown key: the nearest key beside it, or frpo's key for another framework's name.

    The name may stand inside an unknown section, such as lr in actor.optim.lr, where there is no actor.
    """
    path, inner = [str(part) for part in problem["loc"]], problem["input"]
    outer, name = len(path) - 1, path[-1]
    while isinstance(inner, dict) and len(inner) == 1:
        (inside, inner), = inner.items()
        path.append(str(inside))
    beside = _known_keys(problem["loc"][:-1], kind)
    misspelt = len(path) > outer + 1 and nearest(name, beside, cutoff=0.8)
    translated = None if misspelt else translate(path[outer:], [key.name for key in keys(kind)])
    if translated:
        return f"unknown key {'.'.join(path)!r}; {translated}"
    return f"unknown key {'.'.join(map(str, problem['loc']))!r}{suggestion(name, beside)}"


def _named_key(message: str, given: dict[str, Any]) -> str:
    """Return the key that a message is about: the key at its beginning, else the first quoted key, else "name"."""
    if "name" not in given:
        return "name"
    first = [key for key in given if message.startswith(f"{key} ")]
    quoted = sorted((key for key in given if repr(key) in message), key=lambda key: message.index(repr(key)))
    return str([*first, *quoted, "name"][0])


def _known_keys(location: tuple[Any, ...], kind: type[BaseModel]) -> list[str]:
    """Return the keys of the section at a location, whose parts are keys, numbers in lists and names in mappings."""
    found: Any = kind
    for part in location:
        candidates = (found, *get_args(found))
        section = next((each for each in candidates if isinstance(each, type) and issubclass(each, BaseModel)), None)
        holder = next((each for each in candidates if get_origin(each) in (dict, list)), None)
        found = get_args(holder)[-1] if section is None or holder else section.model_fields[part].annotation
    return next(list(each.model_fields) for each in (found, *get_args(found)) if hasattr(each, "model_fields"))


def suggestion(name: str, known: Sequence[str]) -> str:
    """Return '; did you mean X?' for the nearest known name, otherwise a list of all known names."""
    near = nearest(name, known, cutoff=0.5)
    return f"; did you mean {near!r}?" if near else f"; known keys: {', '.join(known)}"
