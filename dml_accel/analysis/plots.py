"""Figures from numbers: curves with bands, calibration, matrices, differences with intervals."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dml_accel.analysis.statistics import Curve
from dml_accel.core.files import replacing

if TYPE_CHECKING:  # imported when something is drawn, because that takes a second
    from matplotlib.figure import Figure

_SIZE = (4.4, 3.1)  # inches: readable on a phone, too
_WIDTH_WITH_TITLE = 8  # inches, outside of a page
_COLOURS = ("#4c78a8", "#e4572e", "#54a24b", "#b279a2", "#f2a900", "#72b7b2", "#9d755d", "#8c8c8c")
_INK = {"light": "#222222", "dark": "#e6e6e6"}


def colours(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each name, for all figures of a page."""
    return {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(names)}


def as_uri(draw: Callable[[], Figure], theme: str) -> str:
    """Return a figure as a data URI of SVG.

    Args:
        draw: draws it, with matplotlib's parameters set for the theme.
        theme: of the page, ``light`` or ``dark``.
    """
    import matplotlib

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "dml_accel",  # equal figures are equal files
        "font.family": "sans-serif",
        "font.sans-serif": ["system-ui", "Helvetica", "Arial", "DejaVu Sans"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "legend.frameon": False,
        **dict.fromkeys(inked, _INK[theme]),
    }
    content = io.BytesIO()
    with matplotlib.rc_context(style):
        draw().savefig(content, format="svg", facecolor="none", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def curves(
    lines: Mapping[str, Curve],
    colour: Mapping[str, str],
    x: str,
    y: str,
    scale: float = 1.0,
    marks: str = "-",
) -> Figure:
    """Draw means with 95% bands, one line for each name.

    Args:
        lines: the points of each line; those without an interval have no band.
        colour: of each name, as ``colours`` returns it.
        x: label of the horizontal axis, with its unit.
        y: label of the vertical axis.
        scale: factor of the values.
        marks: matplotlib's format of lines and points.
    """
    figure, axes = _axes(x, y)
    for name, points in lines.items():
        means = [(at, scale * one.mean) for at, one in points if one.mean is not None]
        axes.plot(*_columns(means, 2), marks, color=colour[name], label=name)
        band = [
            (at, scale * one.low, scale * one.high)
            for at, one in points
            if one.low is not None and one.high is not None
        ]
        if band:
            axes.fill_between(*_columns(band, 3), color=colour[name], alpha=0.18, linewidth=0)
    low, high = axes.get_ylim()  # the interval of few seeds may reach impossible values
    axes.set_ylim(max(0.0, low), min(100.0, high) if scale == 100 else high)
    _legend(figure, len(lines))
    return figure


def _columns(rows: Sequence[tuple[float, ...]], count: int) -> list[list[float]]:
    return [[row[column] for row in rows] for column in range(count)]


def calibration(
    lines: Mapping[str, Sequence[tuple[float, float]]], colour: Mapping[str, str]
) -> Figure:
    """Draw accuracy against confidence, one line for each name, and the diagonal."""
    figure, axes = _axes("confidence", "accuracy")
    axes.plot([0, 1], [0, 1], color="0.5", linewidth=1, linestyle=":")
    for name, points in lines.items():
        axes.plot(*_columns(points, 2), "o-", color=colour[name], label=name, markersize=3)
    _legend(figure, len(lines))
    return figure


def matrix(values: Sequence[Sequence[float]], names: Sequence[str], unit: str) -> Figure:
    """Draw a square matrix as colours, with the number in each cell."""
    figure = _new_figure(*_SIZE)
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    middle = (max(map(max, values)) + min(map(min, values))) / 2
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            ink = "black" if value > middle else "white"
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=ink, fontsize=8)
    figure.colorbar(image, label=unit)
    return figure


def differences(record: dict[str, Any], title: str) -> Figure:
    """Draw every method's top-1 difference to independent training with its 95% interval.

    One row per architecture, cohort mean and ensemble; a difference without an interval (one seed)
    is a hollow point.

    Args:
        record: the content of a comparison's results.json.
        title: of the figure; empty on a page, which has its own.
    """
    rows = [
        (cohort, summary)
        for cohort in record["cohorts"]
        for summary in cohort["summaries"]
        if summary["difference"]
        and summary["of"] != "peer"
        and summary["difference"]["top1"]["mean"] is not None
    ]
    height = 1.6 + 0.4 * max(1, len(rows))
    figure = _new_figure(_WIDTH_WITH_TITLE if title else _SIZE[0], height)
    axes = figure.add_subplot()
    for place, (_, summary) in enumerate(rows):
        mean, low, high = (summary["difference"]["top1"][key] for key in ("mean", "low", "high"))
        if low is None:
            axes.plot(100 * mean, place, "o", color="tab:blue", fillstyle="none")
        else:
            reach = [[100 * mean - 100 * low], [100 * high - 100 * mean]]
            axes.errorbar(100 * mean, place, xerr=reach, fmt="o", color="tab:blue", capsize=3)
    axes.axvline(0, color="0.5", linewidth=1)
    axes.set_yticks(range(len(rows)), [_row_label(record, *row) for row in rows])
    axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)  # the first row on top
    wide = "top-1 minus independent, percentage points (95% interval)"
    axes.set_xlabel(wide if title else "percentage points of top-1")
    if title:
        axes.set_title(title, fontsize="medium", wrap=True)
    return figure


def _row_label(record: dict[str, Any], cohort: dict[str, Any], summary: dict[str, Any]) -> str:
    prefix = f"{cohort['cohort']}: " if len(record["cohorts"]) > 1 else ""
    name = summary["name"].removesuffix("_cifar")
    return f"{prefix}{name}, {summary['method']} (n = {summary['difference']['top1']['n']})"


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    figure = _new_figure(*_SIZE)
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _legend(figure: Figure, entries: int) -> None:
    if entries > 1:
        columns = 2 if entries > 3 else entries
        figure.legend(loc="outside upper center", ncols=columns, fontsize="small")
