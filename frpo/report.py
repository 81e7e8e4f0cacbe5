"""`frpo report`: one page about any folders that frpo has filled, whatever ran in them.

A retention matrix tells what was kept, a training its curve and last metrics, and of anything else its pictures and
texts are shown.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from frpo.errors import ConfigError
from frpo.evaluate.curve import read_metrics
from frpo.evaluate.page import Section, TableText, write_page
from frpo.evaluate.runs import answers_over_time, chart_runs, draw_runs, read_runs
from frpo.retention.archive import RECIPE, read_archive
from frpo.retention.command import REPORT
from frpo.retention.plan import make_plan
from frpo.retention.reading import collect
from frpo.retention.report import section_of

METRICS, FOLDED = "metrics.jsonl", ("recipe.yaml", "manifest.json", "heldout.json")


def run_report(folders: Sequence[str], output: str | None) -> int:
    """Write the page; into the first folder unless `output` names a file."""
    path = Path(output) if output else Path(folders[0]) / REPORT
    sections = [*_side_by_side(list(map(Path, folders))), *(section(Path(folder)) for folder in folders)]
    title = sections[0].title if len(folders) == 1 else f"{len(folders)} runs"
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


def _side_by_side(folders: Sequence[Path]) -> list[Section]:
    """One section about all trainings among the folders, if there are several."""
    trainings = [folder for folder in folders if (folder / METRICS).is_file() and not (folder / RECIPE).is_file()]
    if len(trainings) < 2:
        return []
    names = [folder.name for folder in trainings]
    named = {folder.name if names.count(folder.name) == 1 else str(folder): folder for folder in trainings}
    return [Section(title="Side by side", **_curves(named, trainings[0] / "side_by_side.png"))]


def _curves(folders: Mapping[str, Path], picture: Path) -> dict[str, Any]:
    """Pictures and charts of a section about these runs."""
    runs = read_runs(folders)
    drawn = draw_runs(runs, picture)
    return {"pictures": {"Training": drawn}, "charts": {"Training": chart_runs(runs, folders)}} if drawn else {}


def _training(folder: Path) -> Section:
    rows = read_metrics(folder / METRICS)
    evaluated = [row for row in rows if any(name.startswith("eval/") for name in row)]
    tables = []
    if evaluated:
        names = [name for name in evaluated[0] if name.startswith("eval/") and name in evaluated[-1]]
        tables.append(TableText(
            title="Held-out metrics", note="at the first and the last evaluation", columns=("metric", "first", "last"),
            rows=tuple((name, *(_short(row[name]) for row in (evaluated[0], evaluated[-1]))) for name in names)))
    said = answers_over_time(folder)
    tables += [said] if said else []
    folded = {name: (folder / name).read_text(encoding="utf-8") for name in FOLDED if (folder / name).is_file()}
    return Section(title=folder.name, text=(f"{rows[-1]['step']:.0f} steps.",) if rows else (),
                   tables=tuple(tables), folded=folded, **_curves({folder.name: folder}, folder / "curve.png"))


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"
