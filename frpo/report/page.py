"""Write one HTML page that needs no other file: sections of text, tables and pictures are embedded in the page.

The caller chooses the content of a section.
"""
from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from frpo.report.chart import Chart

TEMPLATE = "page.html"


@dataclass(frozen=True, kw_only=True)
class TableText:
    """Table as text. note: how to read the table. rows: cells; the first cell of a row is its name. laid_out: never
    transpose the table.
    """

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    laid_out: bool = False

    @property
    def narrow(self) -> TableText:
        """Transpose a table that has more columns than lines, unless `laid_out`."""
        lines = (self.columns, *self.rows)
        if self.laid_out or len(self.columns) <= len(lines):
            return self
        columns, *rows = zip(*lines, strict=True)
        return replace(self, columns=columns, rows=tuple(rows))


@dataclass(frozen=True, kw_only=True)
class Section:
    """Section of the page. warnings: facts that a reader has to know first. pictures: title -> PNG file.

    charts: title -> curves. With scripts, and not in print, a chart replaces the picture of the same title.
    shown: title -> preformatted text. folded: title -> preformatted text that a click opens.
    """

    title: str
    text: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    tables: tuple[TableText, ...] = ()
    pictures: Mapping[str, Path] = field(default_factory=dict)
    charts: Mapping[str, Chart] = field(default_factory=dict)
    shown: Mapping[str, str] = field(default_factory=dict)
    folded: Mapping[str, str] = field(default_factory=dict)


def write_page(title: str, sections: Sequence[Section], path: Path) -> Path:
    """Write the page to `path` and return `path`. The page opens without a network."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"embedded": _embedded, "data": _data}
    library = get_plotlyjs() if any(section.charts for section in sections) else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = environment.get_template(TEMPLATE).render(title=title, sections=sections, library=library)
    path.write_text(text, encoding="utf-8")
    return path


def _data(chart: Chart) -> Markup:
    """Return a chart as JSON that is safe inside a script element."""
    return Markup(json.dumps({"panels": chart.panels, "samples": chart.samples}).replace("<", "\\u003c"))


def _embedded(picture: Path) -> str:
    """Return the bytes of a picture as a data URL."""
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode("ascii")
