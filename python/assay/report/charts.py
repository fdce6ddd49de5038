"""Charts as SVG, which takes its colours from the page and holds no text but numbers."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from assay._lazy import require
from assay.report.html import Html
from assay.report.surveying import Distribution

# What matplotlib is told, and the page's own colour that takes its place.
_COLOURS = {"#010101": "var(--ink)", "#020202": "var(--quiet)", "#030303": "var(--bar)", "#040404": "var(--mark)"}
_INK, _QUIET, _BAR, _MARK = _COLOURS
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "assay",
    "text.parse_math": False,
    "font.size": 11.5,
    "axes.edgecolor": _QUIET,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 6),
    "axes.unicode_minus": True,
}
_MARKED = {0.1: "10 %", 0.5: "50 %", 0.9: "90 %"}
_METADATA = ("Creator", "Date", "Format", "Type")
_WIDTH, _HEIGHT = 5.4, 2.5  # inches, of 72 points each


def need_charts() -> None:
    """ImportError without matplotlib, before anything is computed."""
    require("matplotlib", "report")


def histogram(distribution: Distribution, number: int) -> Html:
    """A score's histogram with three quantiles marked. ``number`` tells its elements' ids from other charts'."""
    ticks = require("matplotlib.ticker", "report")
    edges, counts = distribution.edges, distribution.counts
    with _axes() as (figure, axes):
        axes.stairs(counts, edges, fill=True, color=_BAR, linewidth=0)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, counts.max() * 1.02)
        if distribution.logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(ticks.LogLocator(numticks=6))
            axes.xaxis.set_major_formatter(ticks.FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(ticks.NullLocator())
        else:
            axes.xaxis.set_major_locator(ticks.MaxNLocator(6, integer=distribution.whole))
        height = _label_heights(distribution)
        for place, (share, words) in enumerate(_MARKED.items()):
            value = distribution.quantiles[share]
            if edges[0] <= value <= edges[-1]:
                axes.axvline(value, color=_MARK, linewidth=1.3, linestyle=(0, (4, 2)))
                axes.annotate(
                    words,
                    (value, 1.02 + height * place),
                    xycoords=("data", "axes fraction"),
                    ha=("right", "center", "left")[place],
                    color=_MARK,
                )
        return _svg(figure, f"chart-{number}", "Histogram; its quantiles stand below it")


def course(times: Sequence[float], rows: Sequence[int], unit: str) -> Html:
    """Rows that were done by some times, which are in ``unit``."""
    ticks = require("matplotlib.ticker", "report")
    with _axes() as (figure, axes):
        axes.step(times, rows, where="post", color=_BAR, linewidth=1.8)
        axes.set_xlim(0, times[-1] * 1.02)
        axes.set_ylim(0, max(rows) * 1.04)
        axes.xaxis.set_major_locator(ticks.MaxNLocator(6))
        axes.set_xlabel(unit)
        return _svg(figure, "course", "Rows done over time; the numbers stand above it")


@contextmanager
def _axes() -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, on which rows are counted upwards, under settings of ours."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of fonts that it looks for
    matplotlib, figures = require("matplotlib", "report"), require("matplotlib.figure", "report")
    ticks = require("matplotlib.ticker", "report")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc of the working folder may be a stranger's
        matplotlib.rcParams.update(_SETTINGS)
        figure = figures.Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        axes.yaxis.set_major_locator(ticks.MaxNLocator(4, integer=True))
        axes.yaxis.set_major_formatter(ticks.FuncFormatter(_count))
        axes.set_ylabel("rows")
        yield figure, axes


def _svg(figure: Any, name: str, label: str) -> Html:
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    return _for_page(drawn.getvalue(), name, label)


def _label_heights(distribution: Distribution) -> float:
    """How far each quantile's label stands above the last: nothing unless they would run into each other."""
    places = np.array([*(distribution.quantiles[share] for share in _MARKED), *distribution.edges[[0, -1]]])
    places = np.log(places) if distribution.logarithmic else places
    gaps = np.diff(places[:-2]) / (places[-1] - places[-2])
    return 0.1 if gaps.min() < 0.12 else 0.0


def _count(value: float, _: int) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if value >= size:
            return f"{value / (1e3 if unit == ' k' else size):g}{unit}"
    return f"{value:g}"


def _for_page(svg: str, name: str, label: str) -> Html:
    """The drawing as an element of a page: colours and ids of its own, and no style that would be the whole page's."""
    svg = re.sub(r"<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height|version|xmlns(:xlink)?)="[^"]*"', "", head)
    for told, own in _COLOURS.items():
        rest = rest.replace(told, own)
    return Html(f'{head} role="img" aria-label="{label}">{rest}'.strip())
