"""The measures by which a policy is chosen: which names there are, as far as that is known before anything has run."""
from __future__ import annotations

import difflib
from collections.abc import Iterator

from frpo.config.retention import RetentionRecipe
from frpo.config.sections import Recipe
from frpo.errors import ConfigError

NUMBERS = ("start", "end", "end - start", "end KL", "over updates", "over KL", "at KL 0.5", "at KL 1", "at KL 2",
           "start decile", "end decile", "decile over updates", "decile over KL", "utility")
"""Of a fork."""
SAMPLED = ("length", "length_p90", "truncated", "interval", "prompts")
"""Of the samples of any task, besides its rewards."""


def check_measures(recipe: RetentionRecipe, kept: Recipe) -> None:
    """Raise ConfigError where `choose` names what nothing will measure. kept: the recipe of measure.kept."""
    section = recipe.choose
    for key, names in (("choose.measure (--choose)", [section.measure] if section else []),
                       ("choose.bounds (--within)", section.bounds if section else [])):
        for name in names:
            if not _possible(name, recipe, kept):
                known = list(known_measures(recipe, kept))
                near = [each for each in known if each.endswith(f"/{name}")] or difflib.get_close_matches(name, known)
                meant = f"; did you mean {near[0]!r}?" if near else ";"
                raise ConfigError(f"{key}: {name!r} is no measure of policies{meant} There are {', '.join(known)}")


def known_measures(recipe: RetentionRecipe, kept: Recipe) -> Iterator[str]:
    """Names that can be told before, the usual ones first."""
    yield from ("kept/reward", "eval/kl", *(f"kept/{reward.name}/mean" for reward in kept.rewards))
    yield from (f"kept/pass@{k}" for k in kept.evaluate.pass_at)
    if recipe.regimes or all(recipe.policies[name].reference for name in recipe.shown):
        yield "kept/decile"
    yield from (f"{regime}/{number}" for regime in recipe.regimes for number in NUMBERS
                if number != "utility" or recipe.measure.utility)
    yield from (f"kept/{name}" for name in SAMPLED)


def _possible(name: str, recipe: RetentionRecipe, kept: Recipe) -> bool:
    """Whether it is known, or of a kind of which only the run can tell the names."""
    area, _, rest = name.partition("/")
    if area in recipe.regimes and rest.partition("/")[0] in ("kept", "exact", "utility"):
        return True
    if area in ("kept", "eval", *recipe.regimes) or not rest:
        known = set(known_measures(recipe, kept)) | {"eval/kl_interval"}
        return bool({name, name.replace("eval/", "kept/", 1), name.replace("/interval", "/mean")} & known)
    return {"exact": recipe.measure.exact, "utility": recipe.measure.utility}.get(area, True) is not None
