"""Build interactive curves for a page: panels for Plotly, and the completions of each point.

A panel is a Plotly figure as plain values. The caller chooses the values of a curve. A picture shows the same curves
in print, and for readers without scripts. Lines differ in color and in dash.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, TypeVar

import numpy as np

Name = TypeVar("Name")
Numbers = Sequence[float] | np.ndarray

STYLES = {"#0072b2": "solid", "#d55e00": "dashed", "#009e73": "dashdot", "#cc79a7": "dotted", "#e69f00": "solid",
          "#56b4e9": "dashed", "#6a3d9a": "dashdot", "#000000": "dotted"}
"""Line styles: color -> dash, in matplotlib's names. Color-blind readers can distinguish the colors (after Okabe and
Ito).
"""

DASHES = {"solid": "solid", "dashed": "dash", "dashdot": "dashdot", "dotted": "dot"}
"""Dashes: matplotlib's name -> Plotly's name."""


def colored(names: Iterable[Name]) -> Iterator[tuple[Name, str]]:
    """Pair each name with a color of STYLES."""
    return zip(names, cycle(STYLES))


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Panels and samples. panels: title -> figure. samples: key of a point (its customdata) -> its completions."""

    panels: Mapping[str, Mapping[str, Any]]
    samples: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


def panel(traces: Sequence[Mapping[str, Any]], x: str, y: str, note: str = "") -> dict[str, Any]:
    """Return a figure with these axes. note: text at the top of the figure."""
    axis = {"gridcolor": "#e6e8ec", "zerolinecolor": "#c4c9d1"}
    return {"data": list(traces), "layout": {
        "xaxis": {**axis, "title": {"text": x}}, "yaxis": {**axis, "title": {"text": y}}, "hovermode": "closest",
        "margin": {"l": 60, "r": 15, "t": 10, "b": 45}, "height": 340, "plot_bgcolor": "white",
        "legend": {"orientation": "h", "y": -0.25}, **({"annotations": [_note(note)]} if note else {})}}


def _note(text: str) -> dict[str, Any]:
    return {"text": text, "xref": "paper", "yref": "paper", "x": 0.01, "y": 0.99, "xanchor": "left", "yanchor": "top",
            "align": "left", "showarrow": False, "font": {"size": 10}, "bgcolor": "rgba(255, 255, 255, 0.8)"}


def line(name: str, color: str, x: Numbers, y: Numbers, **more: Any) -> dict[str, Any]:
    """Return a line without points. All traces with the same name are shown or hidden together."""
    return {"type": "scatter", "mode": "lines", "name": name, "legendgroup": name, "x": _plain(x), "y": _plain(y),
            "line": {"color": color, "dash": DASHES[STYLES[color]], "width": 2}, "hoverinfo": "skip", **more}


def points(name: str, color: str, x: Numbers, y: Numbers, told: Sequence[str],
           keys: Sequence[str] | None = None, interval: Numbers | None = None, **more: Any) -> dict[str, Any]:
    """Return points that show the texts `told` under the pointer. keys: keys of `Chart.samples`."""
    trace = {"type": "scatter", "mode": "markers", "name": name, "legendgroup": name, "x": _plain(x), "y": _plain(y),
             "marker": {"color": color, "size": 7}, "text": list(told), "showlegend": False,
             "hovertemplate": "%{text}<extra>%{fullData.name}</extra>", **more}
    if keys is not None:
        trace["customdata"] = list(keys)
    if interval is not None:
        trace["error_y"] = {"type": "data", "array": _plain(interval), "thickness": 1, "color": color}
    return trace


def _plain(values: Numbers) -> list[float | None]:
    """Return the values as plain floats. A value that is not finite becomes None, which leaves a gap."""
    return [float(value) if math.isfinite(value) else None for value in values]
