"""Tables and texts of results, for terminals, Markdown and HTML."""

import contextlib
import os
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tabulate

_USUAL_COLUMNS = 80
_HEADERS = ("network", "parameters", "top-1 %", "top-5 %", "NLL (nats)", "ECE %")
_UNBALANCED = 1.5  # images of the largest class over those of the smallest


def table(rows: list[list[Any]], headers: Sequence[str], style: str, left: int) -> str:
    """Return a table: the first ``left`` columns are text, the others numbers.

    The style ``simple`` is the screen's: on a terminal that is too narrow, every row becomes a
    block with one line per cell, broken between words.
    """
    align = ["left"] * left + ["right"] * (len(headers) - left)
    # tabulate 0.9 cannot align the columns of a table without rows.
    given = {"colalign": align} if rows else {}
    # Markdown without room beside the headers: a table of methods then fits 100 columns.
    usual = tabulate.MIN_PADDING
    tabulate.MIN_PADDING = 0 if style == "github" else usual
    try:
        text = str(tabulate.tabulate(rows, headers, tablefmt=style, disable_numparse=True, **given))
    finally:
        tabulate.MIN_PADDING = usual
    columns = terminal_columns(sys.stdout) if style == "simple" else None
    if columns is None or max(map(_width, text.splitlines()), default=0) <= columns:
        return text
    return "\n\n".join(_block(row, headers, columns) for row in rows)


def _block(row: Sequence[Any], headers: Sequence[str], columns: int) -> str:
    """Return one row of a table as lines that are at most so many columns wide."""
    indent = " " * (min(max(map(_width, headers)), columns // 2) + 2)
    lines = []
    for header, cell in zip(headers, map(str, row), strict=True):
        start = header + indent[len(header) :]
        if _width(start) > len(indent):  # a line of its own
            lines.append(header)
            start = indent
        # textwrap counts letters; those of two columns are taken from its width.
        room = max(columns - _width(cell) + len(cell), len(indent) + 1)
        wrapper = textwrap.TextWrapper(
            room, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False
        )
        lines += wrapper.wrap(cell) or [header]
    return "\n".join(lines)


def _width(line: str) -> int:
    """Return how many columns of a terminal a text takes: two for each Chinese letter."""
    return len(line) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in line)


def results_table(results: dict[str, Any], style: str = "simple") -> str:
    """Return the metrics of every peer and the ensemble as a table.

    Macro-F1 is shown where the classes are unbalanced; elsewhere it says what top-1 does.

    Args:
        results: the content of results.json or evaluation.json.
        style: of tabulate.
    """
    named = [(p["name"], f"{p['params']:,}", p["test"]) for p in results["peers"]]
    named.append(("ensemble", "", results["ensemble"]))
    if "ema_ensemble" in results:
        named += [(f"{p['name']}, averaged", "", p["ema"]["test"]) for p in results["peers"]]
        named.append(("ensemble, averaged", "", results["ema_ensemble"]))
    rows, headers = [[name, size, *_cells(one)] for name, size, one in named], list(_HEADERS)
    if is_unbalanced(results):
        # Without the unit of the NLL the table fits 80 columns.
        headers = ["NLL" if one.startswith("NLL") else one for one in headers] + ["macro-F1 %"]
        for row, (_, _, metrics) in zip(rows, named, strict=True):
            row.append(percent(metrics.get("macro_f1")))
    return table(rows, headers, style, left=1)


def is_unbalanced(results: Mapping[str, Any]) -> bool:
    """Whether the classes of a split differ much in size; unknown in older results."""
    return (results.get("imbalance") or 1.0) > _UNBALANCED


def _cells(metrics: dict[str, Any]) -> list[str]:
    shares = [percent(metrics["top1"]), percent(metrics["top5"])]
    nll = "-" if metrics["nll"] is None else f"{metrics['nll']:.4f}"
    return [*shares, nll, percent(metrics["ece"])]


def terminal_columns(stream: Any) -> int | None:
    """Return how wide the terminal is that a stream writes to; None if it writes elsewhere."""
    columns = 0
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone, the stream closed
        if not stream.isatty():
            return None
        columns = os.get_terminal_size(stream.fileno()).columns
    return columns or _USUAL_COLUMNS  # some terminals do not say


def percent(share: float | None) -> str:
    """Return a share in percent; a dash if there is none."""
    return "-" if share is None else f"{100 * share:.2f}"


def printable(text: str) -> str:
    """Return untrusted text safe for a terminal: one line, no control sequences."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def render(template: Path, *, html: bool = False, **values: Any) -> str:
    """Return a file of text made from a Jinja template; in HTML, values are escaped."""
    import jinja2  # imported late: only the ends of runs need it

    environment = jinja2.Environment(
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(template.read_text(encoding="utf-8")).render(**values)


def ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers in few words: ``0-3 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(f"{lo}-{hi}" if hi > lo else str(lo) for lo, hi in runs)
