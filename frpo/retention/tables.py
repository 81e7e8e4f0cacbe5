"""The tables of a matrix, once, for terminal and page: titles, columns, rows of text."""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from frpo.evaluate.page import TableText
from frpo.evaluate.retained import Paired, paired
from frpo.retention.results import Results, pairs
from frpo.telemetry import mean_interval

POLICY_COLUMNS = (("KL to reference, nats", "eval/kl"), ("reward", "kept/reward"), ("lowest decile", "kept/decile"),
                  ("reward, exact", "exact/reward"), ("lowest decile, exact", "exact/decile"),
                  ("J at lambda 0.2, exact", "exact/J_0.2"), ("log-odds of the worst, exact", "exact/comply"))
FORK_COLUMNS = ("end KL", "end", "over updates", "decile over updates", "over KL", "decile over KL", "at KL 0.5",
                "at KL 1", "at KL 2", "utility")
COMPARED = ("over KL", "decile over KL", "at KL 0.5", "at KL 1", "at KL 2", "over updates", "decile over updates",
            "end", "end KL", "utility")


def all_tables(found: Results) -> list[TableText]:
    """State, policies, forks by regime, comparisons by regime, certificates; without those that would be empty."""
    tables = [state_table(found), policy_table(found), frontier_table(found)]
    for regime in found.plan.recipe.regimes:
        tables += [fork_table(found, regime), pair_table(found, regime)]
    tables.append(certificate_table(found))
    return [table for table in tables if table.rows]


def state_table(found: Results) -> TableText:
    recipe = found.plan.recipe
    regimes = tuple(recipe.regimes)
    rows = []
    for policy in recipe.needed():
        cells = [_state(found.states.get((policy, regime))) for regime in (None, *regimes)]
        rows.append((policy, *cells))
    return TableText(title="What has run", note=f"finished of {len(recipe.seeds)} seed(s); failures are counted",
                     columns=("policy", "trained", *regimes), rows=tuple(rows))


def policy_table(found: Results) -> TableText:
    known = [column for column in POLICY_COLUMNS
             if any(column[1] in metrics for metrics in found.policies.values())]
    rows = [(policy, *(level(found.policy_by_seed(policy, metric).values()) for _, metric in known))
            for policy in found.plan.recipe.forked]
    return TableText(title="Policies before any fine-tuning", note="mean over seeds ± 95 % interval",
                     columns=("policy", *(title for title, _ in known)), rows=tuple(rows))


def frontier_table(found: Results) -> TableText:
    """What each policy reached, spent and kept, side by side."""
    regimes = found.plan.recipe.regimes
    measures = (("KL spent, nats", "eval/kl"), ("reward reached", "kept/reward"), ("lowest decile", "kept/decile"),
                *((f"kept through {regime} {name}", f"{regime}/{name}") for regime in regimes
                  for name in ("over updates", "over KL")))
    known = [(title, measure) for title, measure in measures
             if any(not math.isnan(found.value(policy, measure)) for policy in found.plan.recipe.forked)]
    rows = [(policy + (" (chosen)" if policy == found.chosen else ""),
             *(_number(found.value(policy, measure)) for _, measure in known))
            for policy in found.plan.recipe.forked]
    return TableText(title="Frontier: reward reached, KL spent, reward kept", note="mean over seeds",
                     columns=("policy", *(title for title, _ in known)), rows=tuple(rows))


def fork_table(found: Results, regime: str) -> TableText:
    known = [name for name in FORK_COLUMNS if any(name in found.summaries[fork] for fork in found.summaries
                                                  if fork[1] == regime)]
    rows = [(policy, *(level(found.by_seed(policy, regime, name).values()) for name in known))
            for policy in found.plan.recipe.forked if found.forks(policy, regime)]
    how = "enumerated" if found.exact else "sampled"
    return TableText(
        title=f"What forks keep through {regime}", columns=("policy", *known), rows=tuple(rows),
        note=f"{how} reward of the original task on held-out prompts, mean over seeds ± 95 % interval; over KL: "
             f"averaged from 0 to {found.plan.recipe.measure.max_kl:g} nats from the policy")


def pair_table(found: Results, regime: str) -> TableText:
    known = [name for name in COMPARED if any(name in values for (_, r, _), values in found.summaries.items()
                                              if r == regime)]
    rows = []
    for pair in pairs(found):
        if not (found.forks(pair[0], regime) and found.forks(pair[1], regime)):
            continue
        matched = paired(*(found.policy_by_seed(policy, "eval/kl") for policy in pair))
        control = " (control)" if pair in found.plan.recipe.controls else ""
        rows.append((f"{pair[0]} - {pair[1]}{control}", difference(matched),
                     *(difference(found.compared(pair, regime, name)) for name in known)))
    return TableText(title=f"Differences through {regime}, seed by seed",
                     note="mean ± 95 % interval [seeds of positive sign]; * leaves zero out, which a control must not",
                     columns=("policies", "KL to reference", *known), rows=tuple(rows))


def certificate_table(found: Results) -> TableText:
    rows = []
    for policy in found.plan.recipe.forked:
        certified = [each for (name, _), each in found.certified.items() if name == policy]
        if not certified:
            continue
        slack = [float(gap) for each in certified for gap in each.slack]
        bounds = [level(float(each.certificate.bound([kl])[0]) for each in certified) for kl in (0.25, 0.5, 1.0, 2.0)]
        rows.append((policy, *bounds, str(len(slack)), str(sum(each.violations for each in certified)),
                     str(sum(each.clear_violations for each in certified)),
                     f"{min(slack):+.3f}" if slack else "", f"{sum(slack) / len(slack):.3f}" if slack else ""))
    return TableText(
        title="Certificate: reward that any fine-tuning leaves, by the KL it takes",
        note="lower confidence limit from samples of the policy alone, mean over seeds; points are all probes of all "
             "forks; below by more than a point's own interval counts as beyond error",
        columns=("policy", "B(0.25)", "B(0.5)", "B(1)", "B(2)", "points", "below the bound", "beyond error",
                 "smallest slack", "mean slack"), rows=tuple(rows))


def level(values: Iterable[float]) -> str:
    mean, half_width = mean_interval(values)
    if math.isnan(mean):
        return "-"
    return f"{mean:.3f}" + ("" if math.isnan(half_width) else f" ± {half_width:.3f}")


def difference(found: Paired) -> str:
    if found.count == 0:
        return "-"
    width = "" if math.isnan(found.half_width) else f" ± {found.half_width:.3f}"
    star = "*" if found.count > 1 and found.differs else ""
    return f"{found.mean:+.3f}{width}{star} [{found.positive}/{found.count}]"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _state(seeds: Mapping[str, list[int]] | None) -> str:
    if seeds is None:
        return ""
    parts = [f"{len(seeds.get('done', []))}/{sum(map(len, seeds.values()))}"]
    if "failed" in seeds:
        parts.append(f"{len(seeds['failed'])} failed")
    return ", ".join(parts)
