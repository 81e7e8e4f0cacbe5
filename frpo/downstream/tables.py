"""Make the tables of a matrix for both terminal and page: titles, columns, rows of text."""
from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from frpo.config.retention import TableSection
from frpo.downstream.results import Results
from frpo.downstream.retained import Paired, paired
from frpo.report.page import TableText
from frpo.telemetry.intervals import mean_interval

POLICY_COLUMNS = (("KL to reference, nats", "eval/kl"), ("reward", "kept/reward"), ("lowest decile", "kept/decile"),
                  ("reward, exact", "exact/reward"), ("lowest decile, exact", "exact/decile"),
                  ("J at lambda 0.2, exact", "exact/J_0.2"), ("log-odds of the worst, exact", "exact/comply"))
FORK_COLUMNS = ("start", "end", "end - start", "end KL", "over updates", "decile over updates", "over KL",
                "decile over KL", "at KL 0.5", "at KL 1", "at KL 2", "utility")
COMPARED = ("over KL", "decile over KL", "at KL 0.5", "at KL 1", "at KL 2", "over updates", "decile over updates",
            "end", "end KL", "utility")
BEFORE = "before training"
COUNT = re.compile(r"\(\d+ of \d+\)")
BLANK = "; -: KL not reached, or neighbouring probes too far apart"


def all_tables(found: Results) -> list[TableText]:
    """Return the recipe's own tables, then states, policies, frontier, forks, comparisons by regime, certificates.

    Empty tables are left out. Without forks, the frontier replaces the table of several policies.
    """
    tables, several = [], len(found.plan.recipe.shown) > 1
    for section in found.plan.recipe.tables:
        tables += [own_table(found, section), own_differences(found, section)]
    tables.append(state_table(found))
    if found.plan.recipe.regimes or not several:
        tables.append(policy_table(found))
    if several:
        tables.append(frontier_table(found))
    for title, group in found.groups.items():
        regimes = dict.fromkeys(regime for _, _, regime in group)
        tables += [fork_table(found, title), *(pair_table(found, regime) for regime in regimes)]
    tables.append(certificate_table(found))
    return [table for table in tables if table.rows and len(table.columns) > 1]


def state_table(found: Results) -> TableText:
    recipe = found.plan.recipe
    regimes = tuple(recipe.regimes)
    rows = []
    for policy in recipe.needed():
        cells = [_state(found.states.get((policy, regime))) for regime in (None, *regimes)]
        rows.append((policy, *cells))
    return TableText(title="What has run", note=f"finished of {len(recipe.seeds)} seed(s), and number of failures",
                     columns=("policy", "trained", *regimes), rows=tuple(rows))


def policy_table(found: Results) -> TableText:
    known = [column for column in POLICY_COLUMNS
             if any(column[1] in metrics for metrics in found.policies.values())]
    rows = [(policy, *(level(found, policy, metric) for _, metric in known)) for policy in found.plan.recipe.shown]
    if len(rows) == 1:
        rows = [*before_row(found, [metric for _, metric in known]), *rows]
    title = "Policies before any fine-tuning" if found.plan.recipe.regimes else "Policies"
    return TableText(title=title, note=how_told(found) + seeds_told(rows),
                     columns=("policy", *(title for title, _ in known)), rows=tuple(rows))


def frontier_table(found: Results) -> TableText:
    """Return a table of the reward that each policy reached, the KL that it spent, and the reward that its forks kept.
    """
    regimes = found.plan.recipe.regimes
    measures = (("KL spent, nats", "eval/kl"), ("reward reached", "kept/reward"), ("lowest decile", "kept/decile"),
                *((f"kept through {regime} {name}", f"{regime}/{name}") for regime in regimes
                  for name in ("over updates", "over KL")))
    known = [(title, measure) for title, measure in measures
             if any(not math.isnan(found.value(policy, measure)) for policy in found.plan.recipe.shown)]
    before = before_row(found, [measure for _, measure in known], interval=not regimes)
    rows = [(policy + (" (chosen)" if policy == found.chosen else ""),
             *(level(found, policy, measure, interval=not regimes) for _, measure in known))
            for policy in found.plan.recipe.shown]
    rows = [*before, *rows]
    title = "Frontier: reward reached, KL spent, reward kept" if regimes else "Reward reached, KL spent"
    how = how_told(found) if not regimes else "one seed" if found.single else "mean over seeds"
    unknown = "; -: not known, see the warnings" if any("-" in row for row in rows) else ""
    began = f"; {BEFORE}: what all trained policies began with" if before else ""
    return TableText(title=title, rows=tuple(rows), note=how + unknown + seeds_told(rows) + began,
                     columns=("policy", *(title for title, _ in known)))


def before_row(found: Results, measures: Sequence[str], *, interval: bool = True) -> list[tuple[str, ...]]:
    """Return a row with the values with which all trained policies began; no row if unknown. Measures that need forks
    stay blank.
    """
    if not found.before_training:
        return []
    cells = []
    for measure in measures:
        mean, half_width = found.untrained_spread(measure)
        cells.append("" if math.isnan(mean) else _shown([mean], half_width=half_width if interval else math.nan))
    return [(BEFORE, *cells)]


def own_table(found: Results, section: TableSection) -> TableText:
    """Return a table of the recipe in the recipe's layout. Rows of which nothing has run are left out."""
    shown, scale = (percent, 100.0) if section.percent else (level, 1.0)
    rows = []
    for row in section.rows:
        if not any(found.forks(*fork) for fork in row.forks):
            continue
        cells = []
        for fork in row.forks:
            value = shown(found, fork[0], f"{fork[1]}/{row.measure}")
            beside = mean_interval(found.measured(fork, row.beside).values())[0] if row.beside else math.nan
            cells.append(value + ("" if math.isnan(beside) else f" [{scale * beside:.{0 if section.percent else 3}f}]"))
        if section.before:
            cells.insert(0, _shown(found.before(row.forks, row.measure).values(), section.percent))
        if section.published:
            cells.append("\n".join(f"{what} {' / '.join(map(_published, numbers))}".strip()
                                    for what, numbers in row.published.items()))
        rows.append((row.title, *cells))
    return TableText(
        title=section.title, rows=tuple(rows), laid_out=True,
        columns=("", *([section.before] if section.before else []), *section.columns,
                 *([f"published: {section.published}"] if section.published else [])),
        note=("in %, " if section.percent else "") + how_told(found) + (f"; {section.note}" if section.note else "")
             + (BLANK if any("KL" in row.measure for row in section.rows) else "") + seeds_told(rows))


def own_differences(found: Results, section: TableSection) -> TableText:
    """Return the differences between columns of a table of the recipe, seed by seed."""
    places = {name: place for place, name in enumerate(section.columns)}
    rows = []
    for row in section.rows:
        pairs = [paired(*(found.measured(row.forks[places[name]], row.measure) for name in pair))
                 for pair in section.differences]
        if any(each.count for each in pairs):
            rows.append((row.title, *(difference(each, section.percent) for each in pairs)))
    return TableText(title=f"{section.title}: differences seed by seed", laid_out=True,
                     columns=("", *(f"{a} - {b}" for a, b in section.differences)), rows=tuple(rows),
                     note=("in points, " if section.percent else "") + "mean ± 95 % interval [seeds of positive sign]; "
                     "*: the interval excludes zero, each taken alone")


def fork_table(found: Results, title: str) -> TableText:
    """Return the table of the forks of one group (`Results.groups`)."""
    group = found.groups[title]
    known = [name for name in FORK_COLUMNS
             if any(name in values for fork, values in found.summaries.items()
                    if fork[:2] in {each[1:] for each in group})]
    rows = [(name, _updates(found, policy, regime), *(level(found, policy, f"{regime}/{measure}") for measure in (
                *known, *(f"kept/{each}/mean" for each in found.components))))
            for name, policy, regime in group]
    how = "enumerated" if found.exact else "sampled"
    return TableText(
        title=f"Kept {title}", rows=tuple(rows),
        columns=("", "updates", *known, *(f"end, {each}" for each in found.components)),
        note=f"{how} reward of the original task on held-out prompts, before (start) and after the updates (end), "
             f"{how_told(found)}; over KL: averaged from 0 to {found.plan.recipe.measure.max_kl:g} nats from the "
             f"policy, without probes whose KL fell back{BLANK}{seeds_told(rows)}")


def pair_table(found: Results, regime: str) -> TableText:
    known = [name for name in COMPARED if any(name in values for (_, r, _), values in found.summaries.items()
                                              if r == regime)]
    rows = []
    for pair in found.pairs:
        if not found.common_seeds(pair, regime):
            continue
        matched = paired(*(found.policy_by_seed(policy, "eval/kl") for policy in pair))
        control = " (control)" if pair in found.plan.recipe.controls else ""
        rows.append((f"{pair[0]} - {pair[1]}{control}", difference(matched),
                     *(difference(found.compared(pair, regime, name)) for name in known)))
    note = "one seed: no interval, any difference may be chance; -: no value" if found.single else (
        "mean ± 95 % interval [seeds of positive sign / seeds with a value for both]; -: no seed has one; *: the "
        "interval excludes zero, which must not happen for a control. Each interval is taken alone: one in twenty "
        "excludes zero by chance")
    return TableText(title=f"Differences through {regime}, {'one seed' if found.single else 'seed by seed'}", note=note,
                     columns=("policies", "KL to reference", *known), rows=tuple(rows))


def certificate_table(found: Results) -> TableText:
    rows = []
    for policy in found.plan.recipe.forked:
        certified = [each for (name, _), each in found.certified.items() if name == policy]
        if not certified:
            continue
        slack = [float(gap) for each in certified for gap in each.slack]
        bounds = [_shown(float(each.certificate.bound(np.array([kl]))[0]) for each in certified)
                  for kl in (0.25, 0.5, 1.0, 2.0)]
        rows.append((policy, *bounds, str(len(slack)), str(sum(each.violations for each in certified)),
                     str(sum(each.clear_violations for each in certified)),
                     f"{min(slack):+.3f}" if slack else "", f"{sum(slack) / len(slack):.3f}" if slack else ""))
    return TableText(
        title="Certificate: lower bound of the reward after any fine-tuning, by its KL",
        note="lower confidence limit from samples of the policy alone, mean over seeds; points: all probes of all "
             "forks; beyond error: below the bound by more than the point's own interval",
        columns=("policy", "B(0.25)", "B(0.5)", "B(1)", "B(2)", "points", "below the bound", "beyond error",
                 "smallest slack", "mean slack"), rows=tuple(rows))


def how_told(found: Results) -> str:
    """Explain the numbers and intervals in cells."""
    return "one seed ± 95 % interval over its held-out prompts, where they were sampled" if found.single else (
        "mean over seeds ± 95 % interval by Student's t")


def seeds_told(rows: Iterable[Sequence[str]]) -> str:
    """Explain the count behind a mean, if any cell has one."""
    counts = any(COUNT.search(cell) for row in rows for cell in row[1:])
    return "; (1 of 3): seeds that have a value" if counts else ""


def level(found: Results, policy: str, measure: str, *, interval: bool = True) -> str:
    """Return the mean over seeds ± half-width of its 95 % interval, and the number of seeds with a value if not all."""
    return _shown(found.of_policy(policy, measure).values(), half_width=found.spread(policy, measure)[1] if interval
                  else math.nan)


def percent(found: Results, policy: str, measure: str) -> str:
    """Return the same text as `level` for shares, in per cent."""
    return _shown(found.of_policy(policy, measure).values(), True, found.spread(policy, measure)[1])


def _updates(found: Results, policy: str, regime: str) -> str:
    """Return the number of updates of a fork. If seeds differ, list all numbers."""
    last = {path.step_S[-1] for path in found.forks(policy, regime).values()}
    return " or ".join(f"{update:g}" for update in sorted(last))


def _shown(values: Iterable[float], share: bool = False, half_width: float | None = None) -> str:
    """Return the mean as text. half_width: half-width of its interval; None: computed from the values."""
    values = list(values)
    mean, over_values = mean_interval(values)
    half_width = over_values if half_width is None else half_width
    if math.isnan(mean):
        return "-"
    scale, digits = (100.0, 1) if share else (1.0, 3)
    width = "" if math.isnan(half_width) else f" ± {scale * half_width:.{digits}f}"
    count = sum(not math.isnan(value) for value in values)
    return f"{scale * mean:.{digits}f}{width}" + (f" ({count} of {len(values)})" if count < len(values) else "")


def difference(found: Paired, points: bool = False) -> str:
    """Return a difference as text. points: the difference is of shares, and shown in percentage points."""
    if found.count == 0:
        return "-"
    scale, digits = (100.0, 1) if points else (1.0, 3)
    width = "" if math.isnan(found.half_width) else f" ± {scale * found.half_width:.{digits}f}"
    mean = f"{scale * found.mean:+.{digits}f}"
    star = "*" if found.count > 1 and found.differs and float(mean) != 0 else ""
    return f"{mean}{width}{star} [{found.positive}/{found.count}]"


def _published(number: float | None) -> str:
    return "-" if number is None else f"{number:g}"


def heldout_table(found: Results) -> TableText:
    names = dict.fromkeys(name for record in found.heldout.values() for name in record["overlap"])
    rows = [("held out", *(str(record["heldout"]) for record in found.heldout.values())),
            *((f"seen by {name}", *(str(record["overlap"].get(name, "")) for record in found.heldout.values()))
              for name in names)]
    return TableText(title="Held-out prompts, recorded before training",
                     note="and how many of them each training has seen", rows=tuple(rows),
                     columns=("prompts", *(f"seed {seed}" for seed in found.heldout)))


def _state(seeds: Mapping[str, list[int]] | None) -> str:
    if seeds is None:
        return ""
    parts = [f"{len(seeds.get('done', []))}/{sum(map(len, seeds.values()))}"]
    if "failed" in seeds:
        parts.append(f"{len(seeds['failed'])} failed")
    return ", ".join(parts)
