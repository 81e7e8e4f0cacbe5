"""Check the measures by which a policy is chosen: list their names, as far as known before anything has run."""
from __future__ import annotations

from collections.abc import Iterator, Sequence

from frpo.config.loader import PolicyRecipe
from frpo.config.retention import RetentionRecipe
from frpo.config.sections import Recipe
from frpo.errors import ConfigError
from frpo.loading import nearest

NUMBERS = ("start", "end", "end - start", "end KL", "over updates", "over KL", "at KL 0.5", "at KL 1", "at KL 2",
           "start decile", "end decile", "decile over updates", "decile over KL", "utility")
"""Names of the numbers of a fork."""
SAMPLED = ("length", "length_p90", "truncated")
"""Names of the measures of any task's samples, besides its rewards."""


def check_measures(recipe: RetentionRecipe, kept: Recipe, policies: Sequence[PolicyRecipe]) -> None:
    """Raise ConfigError if `choose` names a measure that nothing will measure.

    kept: the recipe of measure.kept. policies: the training recipes of policies, which have evaluations of their own.
    """
    section = recipe.choose
    known = [*dict.fromkeys(_known(recipe, kept))]
    own = {f"eval/{name}" for each in policies if isinstance(each, Recipe) for name in _sampled(each)}
    for key, names in (("choose.measure (--choose)", [section.measure] if section else []),
                       ("choose.bounds (--within)", section.bounds if section else [])):
        for name in names:
            if name not in {*known, *own} and not _known_afterwards(name, recipe, policies):
                near = next((each for each in known if each.endswith(f"/{name}")), None) or nearest(name, known)
                meant = f"; did you mean {near!r}?" if near else "."
                raise ConfigError(f"{key}: {name!r} is not a measure of policies{meant} Allowed: {', '.join(known)}")


def _known(recipe: RetentionRecipe, kept: Recipe) -> Iterator[str]:
    """Yield the names that are known before the run, the usual ones first."""
    yield from ("kept/reward", "eval/kl", *(f"kept/{name}" for name in _sampled(kept)))
    if recipe.regimes or all(recipe.policies[name].reference for name in recipe.forked):
        yield "kept/decile"
    yield from (f"{regime}/{number}" for regime in recipe.regimes for number in NUMBERS
                if number != "utility" or recipe.measure.utility)


def _sampled(recipe: Recipe) -> Iterator[str]:
    yield from ("reward", *(f"{reward.name}/mean" for reward in recipe.rewards))
    yield from (*(f"pass@{k}" for k in recipe.evaluate.pass_at), *SAMPLED)


def _known_afterwards(name: str, recipe: RetentionRecipe, policies: Sequence[PolicyRecipe]) -> bool:
    """Return whether `name` is of a kind whose names are known only after the run."""
    area, _, rest = name.partition("/")
    possible = {"": False, "kept": False, "exact": recipe.measure.exact is not None,
                "utility": recipe.measure.utility is not None,
                "eval": not all(isinstance(each, Recipe) for each in policies)}
    possible |= dict.fromkeys(recipe.regimes, rest.startswith(("kept/", "exact/", "utility/")))
    return bool(rest) and possible.get(area, True)
