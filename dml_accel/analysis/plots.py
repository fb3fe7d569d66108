"""Figures from numbers: curves with bands, calibration, matrices, differences with intervals."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dml_accel.analysis.statistics import Curve
from dml_accel.core.files import replacing

if TYPE_CHECKING:  # imported when something is drawn, because that takes a second
    from matplotlib.figure import Figure

_SIZE = (4.4, 3.1)  # inches: readable on a phone, too
_WIDTH_WITH_TITLE = 8  # inches, outside of a page
_LETTERS_OF_LABEL = 22  # on one line beside a row
# Okabe and Ito's, which are told apart by colour-blind people, too; without yellow and black, which
# are not seen on a light and on a dark page.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c8c8c")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
_INK = {"light": "#222222", "dark": "#e6e6e6"}
_WHOLE = ("epoch", "K")  # axes whose ticks are whole numbers
_FEWEST_FOR_BAND = 3  # seeds: the interval of two is a dozen times as wide as their distance

Dash = str | tuple[int, tuple[float, ...]]


@dataclass(frozen=True)
class Style:
    """How a line looks: its colour, and matplotlib's pattern of its dashes."""

    colour: str
    dash: Dash = "-"


def styles(names: Sequence[str]) -> dict[str, Style]:
    """Return a style for each name: 35 that differ in colour or dashes."""
    turns = [divmod(place, len(_COLOURS)) for place in range(len(names))]
    looks = [Style(_COLOURS[at], DASHES[turn % len(DASHES)]) for turn, at in turns]
    return dict(zip(names, looks, strict=True))


def as_uris(draw: Callable[[], Figure]) -> dict[str, str]:
    """Return a figure as data URIs of SVG, for a light and for a dark page."""
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
        **dict.fromkeys(inked, _INK["light"]),
    }
    content = io.BytesIO()
    with matplotlib.rc_context(style):
        draw().savefig(content, format="svg", facecolor="none", metadata={"Date": None})
    text = content.getvalue().decode()
    # Only the ink differs: drawing is what takes the time of a report.
    return {theme: _as_uri(text.replace(_INK["light"], ink)) for theme, ink in _INK.items()}


def _as_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, or as SVG if the file is called so, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg" if path.suffix == ".svg" else "png", dpi=150)


# ---------------------------------------------------------------- lines


def curves(
    lines: Mapping[str, Curve],
    style: Mapping[str, Style],
    x: str,
    y: str,
    scale: float = 1.0,
    mark: str = "",
) -> Figure:
    """Draw means with 95% bands, one line for each name; with fewer than 3 seeds, each seed.

    Args:
        lines: the points of each line.
        style: of each name, as ``styles`` returns it.
        x: label of the horizontal axis, with its unit.
        y: label of the vertical axis.
        scale: factor of the values.
        mark: matplotlib's format of points; empty for none.
    """
    figure, axes = _axes(x, y)
    for name, line in lines.items():
        look = style[name]
        means = [(at, scale * one.mean) for at, one in line.points if one.mean is not None]
        given = {"color": look.colour, "linestyle": look.dash}
        axes.plot(*_columns(means, 2), marker=mark, label=name, **given)
        few = 1 < max((one.n for _, one in line.points), default=0) < _FEWEST_FOR_BAND
        for seed in line.seeds if few else ():
            points = [(at, scale * value) for at, value in seed]
            axes.plot(*_columns(points, 2), linewidth=0.6, alpha=0.7, **given)
        band = [
            (at, scale * one.low, scale * one.high)
            for at, one in line.points
            if one.low is not None and one.high is not None and one.n >= _FEWEST_FOR_BAND
        ]
        if band:
            axes.fill_between(*_columns(band, 3), color=look.colour, alpha=0.18, linewidth=0)
    if x in _WHOLE and axes.get_xlim()[1] >= 1:
        axes.xaxis.get_major_locator().set_params(integer=True)
    low, high = axes.get_ylim()  # the interval of few seeds may reach impossible values
    axes.set_ylim(max(low, 0.0), min(high, 102.0) if "%" in y else high)
    _legend(figure, list(lines))
    return figure


def _columns(points: Sequence[Sequence[float]], width: int) -> list[list[float]]:
    """Return points as columns, of which there are so many even without points."""
    return [list(column) for column in zip(*points, strict=True)] or [[] for _ in range(width)]


def calibration(
    lines: Mapping[str, list[tuple[float, float]]], style: Mapping[str, Style]
) -> Figure:
    """Draw accuracy against mean confidence; calibrated networks lie on the diagonal."""
    figure, axes = _axes("confidence", "accuracy")
    axes.plot([0, 1], [0, 1], color="0.5", linewidth=1, linestyle=":")
    for name, points in lines.items():
        look = style[name]
        given = {"color": look.colour, "linestyle": look.dash}
        axes.plot(*_columns(points, 2), marker="o", label=name, markersize=3, **given)
    _legend(figure, list(lines))
    return figure


def scaling(points: Sequence[tuple[int, float, float]]) -> Figure:
    """Draw the time of a step and the efficiency against the number of processes.

    Args:
        points: processes, milliseconds, per cent; by rising number of processes.
    """
    figure = _new_figure(_WIDTH_WITH_TITLE, _SIZE[1])
    worlds, *values = _columns(sorted(points), 3)
    labels = ("predicted ms per step", "efficiency, %")
    for axes, label, line in zip(figure.subplots(1, 2), labels, values, strict=True):
        axes.plot(worlds, line, marker="o", color=_COLOURS[0])
        axes.set_xscale("log", base=2)
        axes.set_xticks(worlds, [f"{world:g}" for world in worlds], minor=False)
        axes.tick_params(axis="x", labelrotation=45)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("processes")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25, linewidth=0.6)
    return figure


# ---------------------------------------------------------------- matrices


def matrix(
    values: Sequence[Sequence[float]], names: Sequence[str], unit: str, ends: tuple[float, float]
) -> Figure:
    """Draw a square matrix as colours, with the number in each cell.

    Args:
        values: row by row.
        names: of rows and columns.
        unit: of the values.
        ends: of the scale of colours, which all matrices of a kind share.
    """
    figure = _new_figure(*_SIZE)
    axes = figure.add_subplot()
    low, high = ends
    image = axes.imshow(values, cmap="viridis", vmin=low, vmax=high)
    # Names below the columns, too, would leave little room for the matrix.
    numbers = range(1, len(names) + 1)
    axes.set_xticks(range(len(names)), list(map(str, numbers)))
    rows = [f"{name}   {number}" for name, number in zip(names, numbers, strict=True)]
    axes.set_yticks(range(len(names)), rows)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            ink = "black" if value > (low + high) / 2 else "white"
            size = min(8, 40 / len(names))
            axes.text(
                column, row, _number(value), ha="center", va="center", color=ink, fontsize=size
            )
    figure.colorbar(image, label=unit)
    return figure


def _number(value: float) -> str:
    """Return a number in few letters: with three decimals, or of two digits if it is large."""
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.1e}"


# ---------------------------------------------------------------- differences


def differences(record: dict[str, Any], title: str) -> Figure:
    """Draw every method's top-1 difference to independent training with its 95% interval.

    One row per method, the largest difference on top: of the mean over the cohort's networks, and
    hollow that of their ensemble. A difference without an interval (one seed) has no bar.

    Args:
        record: the content of a comparison's results.json.
        title: of the figure; empty on a page, which has its own.
    """
    panels = [(cohort, rows) for cohort in record["cohorts"] if (rows := list(_rows(cohort)))]
    count = [max(1, len(rows)) for _, rows in panels] or [1]
    height = 1.0 + 0.6 * len(count) + 0.36 * sum(count)
    figure = _new_figure(_WIDTH_WITH_TITLE if title else _SIZE[0], height)
    all_axes = figure.subplots(len(count), squeeze=False, height_ratios=count)[:, 0]
    for axes, (cohort, rows) in zip(all_axes, panels, strict=False):
        for place, (_, both) in enumerate(rows):
            for of, numbers in both.items():
                _draw_difference(axes, place, numbers, of == "ensemble")
        axes.set_yticks(range(len(rows)), [_row_label(cohort, *row) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
        if len(panels) > 1:
            axes.set_title(cohort["cohort"], fontsize="small", loc="left")
    for axes in all_axes:
        axes.axvline(0, color="0.5", linewidth=1)
    wide = "top-1 minus independent, percentage points (95% interval); hollow: the ensembles"
    all_axes[-1].set_xlabel(wide if title else "points of top-1")
    if title:
        figure.suptitle(title, fontsize="medium", wrap=True)
    return figure


def _rows(cohort: dict[str, Any]) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Yield each method and its differences, the largest first."""
    by_method: dict[str, dict[str, dict[str, Any]]] = {}
    for summary in cohort["summaries"]:
        several = len(cohort["peers"]) > 1  # the ensemble of one network is that network
        if summary["of"] == "cohort" or (summary["of"] == "ensemble" and several):
            numbers = summary["difference"] and summary["difference"]["top1"]
            if numbers and numbers["mean"] is not None:
                by_method.setdefault(summary["method"], {})[summary["of"]] = numbers
    yield from sorted(by_method.items(), key=lambda item: -next(iter(item[1].values()))["mean"])


def _row_label(cohort: dict[str, Any], method: str, both: dict[str, dict[str, Any]]) -> str:
    """Return the name of a method, and its seeds if it has not those of the others."""
    n = next(iter(both.values()))["n"]
    seeds = {next(iter(other.values()))["n"] for _, other in _rows(cohort)}
    name = method if len(seeds) == 1 else f"{method} (n = {n})"
    # At most two lines, or they would cover those of other rows.
    return "\n".join(textwrap.wrap(name, _LETTERS_OF_LABEL, max_lines=2, placeholder=" ..."))


def _draw_difference(axes: Any, place: int, numbers: dict[str, Any], hollow: bool) -> None:
    mean, low, high = (numbers[key] for key in ("mean", "low", "high"))
    at = place + (0.18 if hollow else -0.12)
    given: dict[str, Any] = {"color": _COLOURS[5 if hollow else 0]}
    given |= {"markersize": 4, "markerfacecolor": "none"} if hollow else {"markersize": 5}
    if low is None:
        axes.plot(100 * mean, at, "o", **given)
    else:
        reach = [[100 * mean - 100 * low], [100 * high - 100 * mean]]
        line = {"capsize": 2, "elinewidth": 0.8 if hollow else 1.4}
        axes.errorbar(100 * mean, at, xerr=reach, fmt="o", **given, **line)


# ---------------------------------------------------------------- parts


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


def _legend(figure: Figure, names: Sequence[str]) -> None:
    if len(names) < 2:
        return
    columns = 1 if max(map(len, names)) > 26 else 2 if len(names) > 3 else len(names)
    # Lines keep the height that they have in a figure without a legend.
    lines = -(-len(names) // columns)
    figure.set_figheight(figure.get_figheight() + 0.17 * max(0, lines - 2))
    figure.legend(loc="outside upper center", ncols=columns, fontsize="small", handlelength=2.8)
