"""Pictures of results."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where something is drawn: that takes a second
    from matplotlib.figure import Figure

from dml_accel.analysis.intervals import Summary

_SIZE = (4.4, 3.1)  # inches: readable on a phone's width, too
_COLOURS = ("#4c78a8", "#e4572e", "#54a24b", "#b279a2", "#f2a900", "#72b7b2", "#9d755d", "#8c8c8c")
_INK = {"light": "#222222", "dark": "#e6e6e6"}
Curve = Sequence[tuple[float, Summary]]


def _figure(**options: Any) -> Figure:
    from matplotlib.figure import Figure

    return Figure(**options)


def colours(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each name, the same in all pictures of a page."""
    return {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(names)}


def as_uri(draw: Callable[[], Figure], theme: str) -> str:
    """Return a picture as a data URI of SVG, for a light or a dark page."""
    ink = _INK[theme]
    style = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "dml_accel",  # the same picture is the same file
        "font.family": "sans-serif",
        "font.sans-serif": ["system-ui", "Helvetica", "Arial", "DejaVu Sans"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "legend.frameon": False,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink
        ),
    }
    content = io.BytesIO()
    import matplotlib

    with matplotlib.rc_context(style):
        draw().savefig(content, format="svg", facecolor="none", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def curves(
    found: Mapping[str, Curve],
    colour: Mapping[str, str],
    x: str,
    y: str,
    scale: float = 1.0,
    marks: str = "",
) -> Figure:
    """Draw a mean and its 95% band over something, a line for each name.

    Args:
        found: the points of each line; without an interval there is no band.
        colour: of each name, as ``colours`` returns them.
        x: what the horizontal axis shows, with its unit.
        y: what the vertical axis shows.
        scale: what values are multiplied by.
        marks: matplotlib's marker for each point.
    """
    figure, axes = _axes(x, y)
    for name, points in found.items():
        known = [(at, one) for at, one in points if one.mean is not None]
        means = [scale * one.mean for _, one in known if one.mean is not None]
        axes.plot([at for at, _ in known], means, marks or "-", color=colour[name], label=name)
        banded = [(at, one.low, one.high) for at, one in known if one.low is not None]
        if banded:
            low = [scale * (one or 0.0) for _, one, _ in banded]
            high = [scale * (one or 0.0) for _, _, one in banded]
            axes.fill_between(
                [at for at, _, _ in banded], low, high, color=colour[name], alpha=0.18, linewidth=0
            )
    low, high = axes.get_ylim()  # an interval of few seeds may reach where no value can be
    axes.set_ylim(max(0.0, low), min(100.0, high) if scale == 100 else high)
    _legend(figure, len(found))
    return figure


def calibration(
    found: Mapping[str, Sequence[tuple[float, float]]], colour: Mapping[str, str]
) -> Figure:
    """Draw accuracy against confidence, a line for each name; the diagonal is calibrated."""
    figure, axes = _axes("confidence", "accuracy")
    axes.plot([0, 1], [0, 1], color="0.5", linewidth=1, linestyle=":")
    for name, points in found.items():
        axes.plot(*zip(*points, strict=True), "o-", color=colour[name], label=name, markersize=3)
    _legend(figure, len(found))
    return figure


def matrix(values: Sequence[Sequence[float]], names: Sequence[str], what: str) -> Figure:
    """Draw a table of numbers as colours, each number in its cell, rows to columns."""
    figure = _figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    middle = (max(map(max, values)) + min(map(min, values))) / 2
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            ink = "black" if value > middle else "white"
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=ink, fontsize=8)
    figure.colorbar(image, label=what)
    return figure


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    figure = _figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _legend(figure: Figure, entries: int) -> None:
    if entries > 1:
        columns = 2 if entries > 3 else entries
        figure.legend(loc="outside upper center", ncols=columns, fontsize="small")


def differences(record: dict[str, Any], title: str) -> Figure:
    """Draw every method's top-1 difference to independent training with its 95% interval.

    One row per network, cohort mean and ensemble; a difference without interval (one seed) is a
    hollow point.

    Args:
        record: the content of a comparison's results.json.
        title: what was compared; may be empty.
    """
    rows = [
        (cohort, summary)
        for cohort in record["cohorts"]
        for summary in cohort["summaries"]
        if summary["difference"]
        and summary["of"] != "peer"
        and summary["difference"]["top1"]["mean"] is not None
    ]
    width = 8 if title else _SIZE[0]  # without a title it stands on a page
    figure = _figure(figsize=(width, 1.6 + 0.4 * max(1, len(rows))), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, summary) in enumerate(rows):
        found = summary["difference"]["top1"]
        mean = 100 * found["mean"]
        if found["low"] is None:
            axes.plot(mean, place, "o", color="tab:blue", fillstyle="none")
        else:
            reach = [[mean - 100 * found["low"]], [100 * found["high"] - mean]]
            axes.errorbar(mean, place, xerr=reach, fmt="o", color="tab:blue", capsize=3)
    axes.axvline(0, color="0.5", linewidth=1)
    axes.set_yticks(range(len(rows)), [_label(record, *row) for row in rows])
    axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)  # the first row on top
    wide = "top-1 minus independent, percentage points (95% interval)"
    axes.set_xlabel(wide if title else "percentage points of top-1")
    if title:
        axes.set_title(title, fontsize="medium", wrap=True)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)


def _label(record: dict[str, Any], cohort: dict[str, Any], summary: dict[str, Any]) -> str:
    where = f"{cohort['cohort']}: " if len(record["cohorts"]) > 1 else ""
    name = summary["name"].removesuffix("_cifar")
    return f"{where}{name}, {summary['method']} (n = {summary['difference']['top1']['n']})"


def confusion(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """Draw what share of each class (rows) is taken for which (columns).

    Up to 100 classes are named, up to 20 have the number of images in each cell.
    """
    shares = [[count / max(1, sum(line)) for count in line] for line in counts]
    side = min(14.0, 3.5 + 0.3 * len(classes))
    figure = _figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if len(classes) <= 100:
        size = 9 if len(classes) <= 30 else 6
        # Names may be a stranger's: "$" would begin mathematics.
        names = [name.replace("$", r"\$")[:24] for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
        axes.set_yticks(range(len(names)), names, fontsize=size)
    if len(classes) <= 20:
        for row, line in enumerate(counts):
            for column, count in enumerate(line):
                ink = "white" if shares[row][column] > 0.5 else "black"
                if count:
                    axes.text(
                        column, row, str(count), ha="center", va="center", color=ink, fontsize=8
                    )
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    figure.colorbar(image, label="share of the class", shrink=0.8)
    return figure
