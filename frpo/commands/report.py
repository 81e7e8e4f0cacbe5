"""`frpo report`: write one page about any folders that frpo has filled.

The section of a retention matrix shows what was kept. The section of a training shows its curves and its first and last
metrics. The section of another folder shows its pictures and texts.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from frpo.downstream.archive import RECIPE, read_archive
from frpo.downstream.command import REPORT
from frpo.downstream.plan import make_plan
from frpo.downstream.reading import collect
from frpo.downstream.report import section_of
from frpo.errors import ConfigError
from frpo.report.curve import read_metrics
from frpo.report.page import Section, TableText, write_page
from frpo.report.runs import answers_over_time, chart_runs, draw_runs, read_runs

METRICS, FOLDED = "metrics.jsonl", ("recipe.yaml", "manifest.json", "heldout.json")
SIDE_BY_SIDE = "side_by_side.html"


def run_report(runs: Sequence[str], output: str | None) -> int:
    """Write the page. runs: folders, or files in them.

    The page of one run is written into the run's folder, a page of several runs into the first folder, unless `output`
    names a file. The page in a run's own folder has its pictures beside it. Every other page has its pictures in a
    folder NAME_pictures.
    """
    folders = [path.parent if (path := Path(run)).is_file() else path for run in runs]
    own = len(folders) == 1 and output is None
    path = Path(output) if output else folders[0] / (REPORT if own else SIDE_BY_SIDE)
    drawn = path.with_name(f"{path.stem}_pictures")
    places = folders if own else [drawn / f"{n}-{folder.resolve().name}" for n, folder in enumerate(folders, 1)]
    told = [section(folder, place) for folder, place in zip(folders, places)]
    sections = [*_side_by_side(folders, drawn), *told]
    title = sections[0].title if len(folders) == 1 else f"{len(folders)} runs"
    print(f"Report: {write_page(title, sections, path)}")
    return 0


def section(folder: Path, place: Path) -> Section:
    """Make the section about a folder; draw new pictures into `place`. Raises ConfigError if nothing can be shown."""
    if not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} is not a folder; give the run.dir of a run, or a folder with pictures")
    if (folder / RECIPE).is_file():
        return section_of(collect(make_plan(read_archive(folder))), place)
    if (folder / METRICS).is_file():
        return _training(folder, place)
    pictures = {path.stem: path for path in sorted(folder.glob("*.png"))}
    if not pictures:
        raise ConfigError(f"{str(folder)!r} is not a run: it holds no {RECIPE}, no {METRICS} and no picture; give the "
                          "run.dir of a run, which holds one of these")
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}
    return Section(title=folder.name, pictures=pictures, shown=texts)


def _side_by_side(folders: Sequence[Path], place: Path) -> list[Section]:
    """Make one section about all trainings among the folders, if there are several; else return an empty list."""
    trainings = [folder for folder in folders if (folder / METRICS).is_file() and not (folder / RECIPE).is_file()]
    if len(trainings) < 2:
        return []
    names = [folder.name for folder in trainings]
    named = {folder.name if names.count(folder.name) == 1 else str(folder): folder for folder in trainings}
    return [Section(title="Side by side", **_curves(named, place / "side_by_side.png"))]


def _curves(folders: Mapping[str, Path], picture: Path) -> dict[str, Any]:
    """Draw pictures and charts for a section about these runs."""
    runs = read_runs(folders)
    picture.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw_runs(runs, picture)
    return {"pictures": {"Training": drawn}, "charts": {"Training": chart_runs(runs, folders)}} if drawn else {}


def _training(folder: Path, place: Path) -> Section:
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
                   tables=tuple(tables), folded=folded, **_curves({folder.name: folder}, place / "curve.png"))


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"
