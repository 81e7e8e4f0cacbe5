"""Report a matrix to a person: results in sentences, then pictures, tables, recipe and environment.

The sentences are made from the comparisons. They report the measured result, whichever way it went.
"""
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from frpo.config.loader import dump_recipe
from frpo.config.sections import Recipe
from frpo.config.text import as_yaml
from frpo.downstream.charts import kept_charts
from frpo.downstream.choice import choice
from frpo.downstream.pictures import draw_all
from frpo.downstream.results import Results
from frpo.downstream.tables import COMPARED, all_tables, heldout_table
from frpo.report.chart import Chart
from frpo.report.page import Section, TableText
from frpo.report.runs import chart_runs, draw_runs, read_runs
from frpo.run.manifest import environment

RESULTS = "results.json"
TOLD = (("over KL", "at the same KL"), ("over updates", "per update"))
BOUND_AT = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)


def section_of(found: Results, folder: Path) -> Section:
    """Make the section of the page. Pictures are written into `folder`."""
    recipe, (pictures, charts) = found.plan.recipe, _trainings(found, folder)
    return Section(
        title=recipe.run.name, text=tuple(sentences(found)), warnings=found.warnings,
        tables=(meanings(found), *all_tables(found), *([heldout_table(found)] if found.heldout else ())),
        pictures=draw_all(found, folder) | pictures, charts=kept_charts(found) | charts,
        shown={"Durations": durations(found)},
        folded={"Recipe": as_yaml(dump_recipe(recipe)),
                "Manifest": json.dumps(environment(), indent=1),
                "Seconds of each stage": json.dumps(found.seconds, indent=1)})


def _trainings(found: Results, folder: Path) -> tuple[dict[str, Path], dict[str, Chart]]:
    """Draw the curves of the policies' trainings side by side, as pictures and charts; none for a matrix with forks."""
    seeds = found.plan.seeds if not found.plan.recipe.regimes else ()
    folders = {stage.policy if found.single else f"{stage.policy}, seed {stage.seed}": stage.run_dir
               for seed in seeds for stage in seed.policies.values() if stage.done}
    runs = read_runs(folders)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw_runs(runs, folder / "trainings.png")
    return ({"Trainings": drawn}, {"Trainings": chart_runs(runs, folders)}) if drawn else ({}, {})


def durations(found: Results) -> str:
    """Return the durations of all stages, of starts and of pushes in one line."""
    told = [f"{len(found.seconds)} stages took {sum(found.seconds.values()) / 60:.1f} minutes"]
    told += [f"a start of engines {np.median(found.starts):.0f} s"] if found.starts else []
    told += [f"a push of weights {np.median(found.pushes):.2f} s"] if found.pushes else []
    return "; ".join(told)


def page_title(found: Results) -> str:
    """Return the title of the page: the run's name, after "Retention: " if the recipe has regimes."""
    name = found.plan.recipe.run.name
    return f"Retention: {name}" if found.plan.recipe.regimes else name[:1].upper() + name[1:]


def meanings(found: Results) -> TableText:
    """Explain the regimes and the measures, each in a line."""
    recipe, first = found.plan.recipe, found.plan.seeds[0]
    measure, rows = recipe.measure, []
    for name, section in recipe.regimes.items():
        rows.append((name, f"what forks go through: {section.means or _training(found, name)}"))
    rows.append(("kept" if recipe.regimes else "reward",
                 f"reward of held-out prompts of {measure.kept.means or _rewards(first.kept)}"))
    rows.append(("several rewards", "each measurement draws new samples, so one export has several rewards, such as "
                                    "that of the evaluation in its training and that of `measure.kept`; they differ "
                                    "by chance"))
    if first.utility is not None and measure.utility is not None:
        rows.append(("utility", f"reward of held-out prompts of {measure.utility.means or _rewards(first.utility)}"))
    if recipe.regimes:
        rows += [("decile", "mean of the lowest tenth of its completions"),
                 ("start, end", "before the first and after the last update of a fork; with one seed, the interval of "
                                "their difference treats the two as independent"),
                 ("over updates", "mean along a fork's updates; it shows how soon the reward is lost"),
                 ("over KL", f"mean over 0 to {measure.max_kl:g} nats between fork and policy; it shows how much "
                             "reward a fine-tuning up to this KL loses")]
    if recipe.compare or recipe.controls:
        rows.append(("[2/3]", "behind a difference: it is above 0 for two of three seeds"))
    rows.append(("KL to the reference", "KL from a policy to the model that it began with, or to its `reference`, in "
                                        f"nats a sequence{', before any fork' if recipe.regimes else ''}"))
    return TableText(title="What the names mean", note="", columns=("name", "meaning"), rows=tuple(rows), laid_out=True)


def _training(found: Results, regime: str) -> str:
    """Return the command and the objective of a regime."""
    recipe = next((stage.recipe for seed in found.plan.seeds for stage in seed.forks if stage.regime == regime), None)
    if recipe is None:
        return "no fork of this plan"
    objective = recipe.objective.advantage if isinstance(recipe, Recipe) else recipe.objective
    return f"frpo {recipe.COMMAND} with {objective.name}"


def _rewards(recipe: Recipe) -> str:
    return f"the task with reward {', '.join(reward.name for reward in recipe.rewards)}"


def sentences(found: Results) -> list[str]:
    """Return each comparison in words, then certificates, reward before training, and the best policy."""
    recipe, told = found.plan.recipe, []
    for regime in recipe.regimes:
        for pair in found.pairs:
            parts = [_compared(found, pair, regime, measure, words) for measure, words in TOLD]
            if any(found.compared(pair, regime, measure).count for measure, _ in TOLD):
                control = "As a control, forks" if pair in recipe.controls else "Forks"
                told.append(f"{control} of {pair[0]} against {pair[1]} through {regime}: {'; '.join(parts)}.")
    if found.certified:
        count = sum(len(each.points) for each in found.certified.values())
        below = sum(each.violations for each in found.certified.values())
        clear = sum(each.clear_violations for each in found.certified.values())
        told.append(f"{below} of {count} measured points lie below the certificate of their policy, {clear} of them by "
                    "more than their own 95 % interval.")
    if found.before_training:
        reward, half_width = found.untrained_spread("kept/reward")
        interval = "" if math.isnan(half_width) else f" ± {half_width:.3f}"
        told.append(f"Reward before training: {reward:.3f}{interval}.")
    return told + choice(found)


def _compared(found: Results, pair: tuple[str, str], regime: str, measure: str, words: str) -> str:
    result, seeds = found.compared(pair, regime, measure), len(found.common_seeds(pair, regime))
    if result.count == 0:
        return f"{words} they cannot be compared: no seed has a mean {measure} for both"
    lacking = f"; {seeds - result.count} of {seeds} seeds have no value" if result.count < seeds else ""
    if result.count == 1 or math.isnan(result.half_width):
        return f"{words} the reward differs by {result.mean:+.3f} (one seed{lacking})"
    verdict = "no difference beyond noise"
    if result.differs:
        verdict = "more is kept" if result.mean > 0 else "less is kept"
    return (f"{words} {verdict} ({result.mean:+.3f} ± {result.half_width:.3f} in reward, {result.positive} of "
            f"{result.count} seeds positive{lacking})")


def write_results(found: Results, path: Path) -> Path:
    """Write all numbers behind tables and pictures as JSON. A number that is not finite becomes null.

    kl_gaps: [low, high] nats between neighbouring probes too far apart, where values along the KL are left blank.
    """
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple | np.ndarray):
            return [plain(item) for item in value]
        if isinstance(value, float | np.floating):
            return float(value) if math.isfinite(value) else None
        return int(value) if isinstance(value, np.integer) else value

    record = {
        "reward": found.reward, "warnings": list(found.warnings),
        "policies": [{"policy": p, "seed": s, **metrics} for (p, s), metrics in found.policies.items()],
        "before_training": [{"policy": p, "seed": s, **metrics} for (p, s), metrics in found.untrained.items()],
        "forks": [{"policy": p, "regime": r, "seed": s, "summary": found.summaries[p, r, s], "step": path_.step_S,
                   "kl": path_.kl_S, "kl_gaps": [gap.kl for gap in path_.gaps(found.reward, math.inf)],
                   "metrics": {name: values for name, values in path_.metrics.items()
                               if name.startswith(("kept/", "utility/", "exact/"))}}
                  for (p, r, s), path_ in found.paths.items()],
        "certificates": [{"policy": p, "seed": s, "kl": BOUND_AT, "bound": each.certificate.bound(np.array(BOUND_AT)),
                          "points": len(each.points), "violations": each.violations,
                          "clear_violations": each.clear_violations} for (p, s), each in found.certified.items()],
        "compared": [{"pair": pair, "regime": regime, "measure": measure,
                      **found.compared(pair, regime, measure).__dict__}
                     for regime in found.plan.recipe.regimes for pair in found.pairs
                     for measure in COMPARED],
        "seconds": found.seconds}
    path.write_text(json.dumps(plain(record), indent=1), encoding="utf-8")
    return path
