"""`frpo report`: one page about any folders that frpo has filled, whatever ran in them.

A retention matrix tells what was kept, a training its curve and last metrics, and of anything else its pictures and
texts are shown.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from frpo.errors import ConfigError
from frpo.evaluate.curve import draw_loss_curve, draw_reward_curve, read_metrics
from frpo.evaluate.page import Section, TableText, write_page
from frpo.retention.archive import RECIPE, read_archive
from frpo.retention.command import REPORT
from frpo.retention.plan import make_plan
from frpo.retention.reading import collect
from frpo.retention.report import section_of

METRICS, FOLDED = "metrics.jsonl", ("recipe.yaml", "manifest.json", "heldout.json")


def run_report(folders: Sequence[str], output: str | None) -> int:
    """Write the page; into the first folder unless `output` names a file."""
    path = Path(output) if output else Path(folders[0]) / REPORT
    sections = [section(Path(folder)) for folder in folders]
    title = sections[0].title if len(sections) == 1 else f"{len(sections)} runs"
    print(f"Report: {write_page(title, sections, path)}")
    return 0


def section(folder: Path) -> Section:
    """What can be told of a folder. Raises ConfigError where that is nothing."""
    if not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} is no folder; give the run.dir of runs, or folders with their pictures")
    if (folder / RECIPE).is_file():
        return section_of(collect(make_plan(read_archive(folder))), folder)
    if (folder / METRICS).is_file():
        return _training(folder)
    pictures = {path.stem: path for path in sorted(folder.glob("*.png"))}
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}
    if not pictures and not texts:
        raise ConfigError(f"{str(folder)!r} holds no {RECIPE}, no {METRICS}, no picture and no text to tell of")
    return Section(title=folder.name, pictures=pictures, shown=texts)


def _training(folder: Path) -> Section:
    rows = read_metrics(folder / METRICS)
    draw = draw_reward_curve if any("reward/mean" in row or "eval/reward" in row for row in rows) else draw_loss_curve
    pictures = {"Training": draw({folder.name: folder / METRICS}, folder / "curve.png")} if rows else {}
    evaluated = [row for row in rows if any(name.startswith("eval/") for name in row)]
    tables = []
    if evaluated:
        names = [name for name in evaluated[0] if name.startswith("eval/") and name in evaluated[-1]]
        tables.append(TableText(
            title="Held-out metrics", note="at the first and the last evaluation", columns=("metric", "first", "last"),
            rows=tuple((name, *(_short(row[name]) for row in (evaluated[0], evaluated[-1]))) for name in names)))
    folded = {name: (folder / name).read_text(encoding="utf-8") for name in FOLDED if (folder / name).is_file()}
    return Section(title=folder.name, text=(f"{rows[-1]['step']:.0f} steps.",) if rows else (), pictures=pictures,
                   tables=tuple(tables), folded=folded)


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"
