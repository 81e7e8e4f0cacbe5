"""The two protocols of an objective, the registry of advantage estimators, and how a group treats missing rewards.

Estimators turn the rewards of one group into advantages (float64, controller); token losses turn flat tensors into a
sum (learner). No formula of any objective is here, and none of these types knows about batches, ranks or padding.

Shape suffixes: G samples of a group, K valid ones among them, N tokens with or without a loss.
"""
from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints, runtime_checkable

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

Class = TypeVar("Class", bound=type)
Metrics = dict[str, tuple[float | Tensor, float | Tensor, str]]
"""name -> (sum, count, "mean"), or (largest value, count, "max")."""


@dataclass(frozen=True, kw_only=True)
class GroupAdvantages:
    """Advantages of one group (float64, in units of the reward times the estimator's scale) and what describes them.

    stats always holds "zero_advantage" (1.0 if every advantage is 0), "abstained" (NaN rewards) and "invalid"
    (infinite ones).
    """

    advantages_G: np.ndarray
    stats: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class AdvantageEstimator(Protocol):
    """Rewards of one whole group -> advantages; `build_estimator` rebuilds it from `name` and its dataclass fields."""

    name: ClassVar[str]

    def advantages(self, rewards_G: np.ndarray) -> GroupAdvantages: ...


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """Flat tensors over N tokens. Log-probs are in nats of the sampled token under the tempered policy.

    Only `logprobs_N` requires grad. `ref_logprobs_N` is None where no reference was run. `mask_N` is True where a loss
    exists. The weights are divided already (by length, by the global number of sequences), so a loss only sums.
    """

    logprobs_N: Tensor
    old_logprobs_N: Tensor
    ref_logprobs_N: Tensor | None
    advantage_N: Tensor
    policy_weight_N: Tensor
    kl_weight_N: Tensor
    mask_N: Tensor

    def __post_init__(self) -> None:
        tensors = [getattr(self, f.name) for f in dataclasses.fields(self)]
        shapes = {tuple(tensor.shape) for tensor in tensors if tensor is not None}
        assert len(shapes) == 1, f"LossInputs would broadcast: {shapes}"


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """A scalar to call backward on, and detached sums that telemetry divides once."""

    loss_sum: Tensor
    metrics: Metrics


class TokenLoss(Protocol):
    """Flat token tensors -> their summed loss. Works on one rank and communicates with no other."""

    def __call__(self, inputs: LossInputs) -> LossOutput: ...


@dataclass(frozen=True, kw_only=True)
class ValidRewards:
    """The K finite rewards of a group and where they stood among its G samples."""

    rewards_K: np.ndarray
    mask_G: np.ndarray
    abstained: int
    invalid: int

    @property
    def flat(self) -> bool:
        """Whether nothing can be compared: fewer than two rewards, or all of them equal."""
        return self.rewards_K.size < 2 or self.rewards_K.max() == self.rewards_K.min()

    def place(self, formula: Callable[[np.ndarray], np.ndarray],
              stats: Mapping[str, float] | None = None) -> GroupAdvantages:
        """Advantages formula(rewards_K) at their places and 0 elsewhere; a flat group never reaches the formula."""
        advantages_G = np.zeros(self.mask_G.size)
        if not self.flat:
            advantages_G[self.mask_G] = formula(self.rewards_K)
        counts = {"zero_advantage": float(not advantages_G.any()),
                  "abstained": float(self.abstained), "invalid": float(self.invalid)}
        return GroupAdvantages(advantages_G=advantages_G, stats={**counts, **(stats or {})})


def valid_rewards(rewards_G: np.ndarray) -> ValidRewards:
    """Take NaN (abstained; None counts as NaN) and infinite (invalid) rewards out of a group.

    Raises ValueError unless the rewards are one-dimensional.
    """
    rewards_G = np.asarray(rewards_G, dtype=np.float64)
    if rewards_G.ndim != 1:
        raise ValueError(f"rewards of one group must be one-dimensional, given shape {rewards_G.shape}")
    mask_G = np.isfinite(rewards_G)
    return ValidRewards(rewards_K=rewards_G[mask_G], mask_G=mask_G,
                        abstained=int(np.isnan(rewards_G).sum()), invalid=int(np.isinf(rewards_G).sum()))


_REGISTRY: dict[str, type] = {}


def estimator(name: str) -> Callable[[Class], Class]:
    """Register a frozen keyword-only dataclass as the advantage estimator `name` of recipes.

    Raises ValueError where the name is taken by another class.
    """

    def register(cls: Class) -> Class:
        frozen = dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
        assert frozen, f"{cls.__qualname__} must be a frozen dataclass"
        other = _REGISTRY.get(name, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            taken = f"{other.__module__}:{other.__qualname__}"
            raise ValueError(f"estimator {name!r} is {taken} already; choose another name")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def estimators() -> dict[str, type]:
    """Every registered estimator by name; a file put into this package is found without being listed anywhere."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")
    return dict(sorted(_REGISTRY.items()))


def build_estimator(values: Mapping[str, Any]) -> AdvantageEstimator:
    """The estimator that {"name": ..., **its fields} describes; name may be "package.module:Class".

    Raises ValueError naming what was given, what is allowed and the nearest of it.
    """
    parameters = dict(values)
    name = parameters.pop("name", None)
    if not isinstance(name, str):
        allowed = f"{', '.join(estimators())} or 'package.module:Class'"
        raise ValueError(f"advantage needs a name, one of {allowed}; given {dict(values)}")
    cls = _load_class(name) if ":" in name else estimators().get(name)
    if cls is None:
        raise ValueError(unknown("advantage", name, estimators()) + ", or 'package.module:Class'")
    return cls(**_checked(cls, name, parameters))


def unknown(what: str, given: str, allowed: Collection[str]) -> str:
    """The message for a name that does not exist: what was given, the nearest and all that is allowed."""
    near = difflib.get_close_matches(str(given), list(allowed), n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown {what} {given!r}{hint}; allowed: {', '.join(allowed) or 'none'}"


def require_one_of(what: str, given: Any, allowed: Collection[str]) -> None:
    """Raise ValueError unless `given` is one of the allowed names."""
    if given not in allowed:
        raise ValueError(unknown(what, given, allowed))


def _load_class(path: str) -> type:
    module_name, _, class_name = path.partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"advantage {path!r} cannot be imported: {error}; expected 'package.module:Class'") from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and callable(getattr(cls, "advantages", None))):
        raise ValueError(f"advantage {path!r} must be a dataclass with a method advantages(rewards_G)")
    if cls.__module__.partition(".")[0] != __package__.partition(".")[0]:
        cls.name = path  # a saved recipe must find the class again in a process that never imported it
    return cls


def _checked(cls: type, name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    types = get_type_hints(cls)
    for key in parameters:
        if key not in fields:
            raise ValueError(unknown(f"key of advantage {name!r}:", key, fields))
    for key, declared in fields.items():
        if key not in parameters and declared.default is declared.default_factory is dataclasses.MISSING:
            raise ValueError(f"advantage {name!r} needs a value for {key!r}")
    return {key: _typed(f"{key} of advantage {name!r}", value, types[key]) for key, value in parameters.items()}


def _typed(what: str, value: Any, declared: Any) -> Any:
    strict = ConfigDict(strict=True, arbitrary_types_allowed=True)
    try:
        return TypeAdapter(declared, config=strict).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise ValueError(f"{what} must be {message}, given {value!r}{_yaml_hint(value)}") from error


def _yaml_hint(value: Any) -> str:
    """YAML 1.1 reads `1e-3` and `inf` as text, which looks right in the recipe."""
    try:
        number = float(value) if isinstance(value, str) else None
    except ValueError:
        return ""
    if number is None:
        return ""
    return f" (text, not a number: write {'.inf' if number == float('inf') else repr(number)})"
