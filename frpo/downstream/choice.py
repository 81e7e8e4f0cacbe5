"""Report in sentences which policy is best, by how much, and whether the lead is chance or a tie."""
from __future__ import annotations

import math

from frpo.config.retention import ChooseSection
from frpo.downstream.results import Results
from frpo.downstream.tables import level

TOLD = ("kept", "eval", "exact", "utility")
"""Areas of the metrics that are listed if the requested metric is missing."""


def choice(found: Results) -> list[str]:
    """Return sentences about the best policy; empty if the recipe has no `choose`."""
    section = found.plan.recipe.choose
    if section is None:
        return []
    what, ranked = _wanted(found), found.ranked
    if not ranked:
        return [f"No policy has a {what}.", *_lacking(found)]
    best, value = ranked[0], found.value(ranked[0], section.measure)
    told = [f"Largest {what}: {best}, {_level(found, best)}, {found.plan.model_of(best)}."]
    equal = [name for name in ranked if found.value(name, section.measure) == value]
    if len(equal) == len(ranked) > 1:
        return [*told, f"All {len(ranked)} policies have the same {section.measure}, {value:.3g}: none is best, the "
                       "first is taken."]
    if len(equal) > 1:
        return [*told, f"Equal: {', '.join(equal)}; the first is taken."]
    return [*told, *_doubts(found, best, ranked[1:])]


def is_lacking(found: Results) -> bool:
    """Return whether the recipe chooses by a measure that no policy has."""
    return bool(_missing(found))


def _doubts(found: Results, best: str, others: list[str]) -> list[str]:
    """Name the policies from which the best policy cannot be distinguished."""
    measure = _section(found).measure
    leads = {name: found.lead(best, name, measure) for name in others}
    if unknown := [name for name, lead in leads.items() if math.isnan(lead.half_width)]:
        return [f"This lead may be chance: {measure} has no interval from one seed "
                f"({', '.join(f'{name} {_level(found, name)}' for name in unknown)}); run more seeds to get one."]
    close = {name: lead for name, lead in leads.items() if not lead.differs}
    if not close:
        return []
    told = ", ".join(f"{name} ({_level(found, name)}, {lead.mean:.3f} ± {lead.half_width:.3f} less)"
                     for name, lead in close.items())
    means = "over held-out prompts of one seed" if found.single else "over seeds"
    return [f"The best is not distinguishable from {told}; ±: 95 % interval {means}."]


def _lacking(found: Results) -> list[str]:
    missing = _missing(found)
    if not missing:
        return []
    recipe = found.plan.recipe
    names = {name for metrics in found.policies.values() for name in metrics if name.partition("/")[0] in TOLD}
    names |= {f"{regime}/{name}" for (_, regime, _), values in found.summaries.items() for name in values}
    known = sorted(name for name in names if "interval" not in name
                   and any(not math.isnan(found.value(policy, name)) for policy in recipe.forked))
    return [f"Not measured: {', '.join(missing)}; available measures: {', '.join(known)}."]


def _missing(found: Results) -> list[str]:
    """List the measures of `choose` that no policy has."""
    section = found.plan.recipe.choose
    names = dict.fromkeys([section.measure, *section.bounds] if section else [])
    return [name for name in names if all(math.isnan(found.value(policy, name)) for policy in found.plan.recipe.forked)]


def _wanted(found: Results) -> str:
    section = _section(found)
    bounds = ", ".join(f"{name} in [{_end(low)}, {_end(high)}]" for name, (low, high) in section.bounds.items())
    return section.measure + (f" with {bounds}" if bounds else "")


def _level(found: Results, policy: str) -> str:
    return level(found, policy, _section(found).measure)


def _section(found: Results) -> ChooseSection:
    section = found.plan.recipe.choose
    assert section is not None, "asked only where the recipe chooses"
    return section


def _end(limit: float | None) -> str:
    return "any" if limit is None else f"{limit:g}"
