"""The report: one HTML page with the tables and figures of finished runs.

The page is self-contained: it loads nothing and runs nothing.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dml_accel.analysis import plots, tables
from dml_accel.analysis.figures import (
    ReportFigure,
    analyse_runs,
    cohort_size_figures,
    comparison_figures,
)
from dml_accel.analysis.methods import BASELINE, MAY_DIFFER
from dml_accel.analysis.published import is_cifar100
from dml_accel.analysis.runs import Run, group_by_method, group_comparable
from dml_accel.analysis.statistics import comparison_record
from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.core.files import read_json, write_text
from dml_accel.core.recipes import in_words
from dml_accel.core.tables import render
from dml_accel.data.progress import Progress
from dml_accel.models.timm_config import FILE, read_timm_config

_TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"


@dataclass(frozen=True)
class Section:
    """The part of the page about runs that differ only in method and seed.

    Attributes:
        title: networks, data set, and what was scaled down.
        notes: what to know about the runs.
        table: the comparison, a row for each method; HTML as all tables here.
        methods: the flags of every method.
        published: a table of published results and a note; empty if there are none.
        accuracy: top-1 of every network and method.
        macro_f1: the same of macro-F1, where classes are unbalanced; else empty.
        cost: time and speed of every method.
        figures: of these runs.
        runs: where the numbers come from.
    """

    title: str
    notes: list[str]
    table: str
    methods: str
    published: list[str]
    accuracy: str
    macro_f1: str
    cost: str
    figures: list[ReportFigure]
    runs: list[Run]


def write_page(runs: Sequence[Run], path: Path, images: int) -> None:
    """Write the report.

    Args:
        runs: finished runs.
        path: the file.
        images: how many images of each split to analyse networks on; 0 for no analyses.
    """
    analyses = analyse_runs(runs, images)
    groups = group_comparable(runs)
    sections = [_section(group, analyses) for group in groups]
    sizes = cohort_size_figures(groups)
    text = render(
        _TEMPLATE,
        html=True,  # escaped, because names and commands in the files of a run are untrusted
        sections=sections,
        cohort_sizes=sizes,
        drawn=_draw([*sizes, *(figure for section in sections for figure in section.figures)]),
        runs=len(runs),
        about_differences=tables.ABOUT_DIFFERENCES,
        about_cost=tables.ABOUT_COST,
    )
    write_text(path, text)


def _draw(figures: Sequence[ReportFigure]) -> dict[ReportFigure, dict[str, str]]:
    """Return the pictures of figures for both themes."""
    drawn = {}
    with Progress("drawing", len(figures), unit="figures", every=10.0) as progress:
        for figure in figures:
            drawn[figure] = plots.as_uris(figure.draw)
            progress.add(1)
    return drawn


def _section(runs: Sequence[Run], analyses: Mapping[str, dict[str, Any]]) -> Section:
    # Reversed, so that the first run with a method and seed is the one that is kept.
    first_of_each = {(run.method, run.config.seed): run for run in reversed(runs)}
    kept = list(first_of_each.values())[::-1]
    of_method, comparisons = group_by_method(kept), _comparisons_of(kept)
    by_method = {method: of_method[method] for method in _as_asked(kept, comparisons)}
    methods = list(by_method)
    cifar100, notes = _recognise_cifar100(runs[0])
    if len(kept) < len(runs):
        notes.append(
            f"{len(runs) - len(kept)} more with the method and seed of one of these: left out."
        )
    elsewhere = [run.name for run in kept if run.began_elsewhere]
    if elsewhere:
        notes.append(
            "Started from the checkpoint of another run, so their curves and costs lack the "
            f"beginning: {', '.join(elsewhere)}."
        )
    changed = runs[0].config.differences(Config())
    named = MAY_DIFFER | {"dataset"}
    shared = {name: mine for name, (mine, _) in changed.items() if name not in named}
    if shared:
        stages = (
            " (stages of a method may have fewer epochs)" if any(r.earlier for r in kept) else ""
        )
        notes.append(f"All runs{stages}: {in_words(shared)}.")
    notes += _said_by(comparisons)
    record = comparison_record(
        runs[0].config,
        sorted(kept, key=lambda run: (methods.index(run.method), run.config.seed)),
        methods=methods,
        seeds=list({run.config.seed for run in kept}),
        cifar100=cifar100,
    )
    return Section(
        title=tables.subject(record),
        notes=notes,
        table=tables.comparison_table(record, "html"),
        methods=tables.methods_table(record, "html"),
        published=tables.published_table(record, "html"),
        accuracy=tables.metric_table(record, "top1", 100, "html"),
        macro_f1=tables.macro_f1_table(record, "html"),
        cost=tables.cost_table(record, "html"),
        figures=comparison_figures(by_method, record, _by_method(by_method, analyses)),
        runs=kept,
    )


def _by_method(
    by_method: Mapping[str, Sequence[Run]], analyses: Mapping[str, dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Return the analyses of runs by method; without methods that have none."""
    found = {
        method: [analyses[run.name] for run in runs if run.name in analyses]
        for method, runs in by_method.items()
    }
    return {method: some for method, some in found.items() if some}


def _comparisons_of(runs: Sequence[Run]) -> dict[Path, Any]:
    """Return the results.json of the comparisons that runs are part of, by their folders."""
    found = {}
    for root in dict.fromkeys(parent for run in runs for parent in run.folder.parents[1:3]):
        with contextlib.suppress(UsageError):  # there is none
            found[root] = read_json(root / "results.json")
    return found


def _as_asked(runs: Sequence[Run], comparisons: Mapping[Path, Any]) -> list[str]:
    """Return the methods of runs in the order in which they were asked for.

    That of runs of a comparison is in its results.json. All others follow as they appear, or
    independent training first if there is no comparison.
    """
    places: dict[Path, int] = {}
    for root, record in comparisons.items():
        with contextlib.suppress(KeyError, TypeError):  # something else
            for one in record["runs"]:
                places[root / one["folder"]] = len(places)
    last = len(places)
    if places:
        ordered = sorted(runs, key=lambda run: places.get(run.folder, last))
    else:
        ordered = sorted(runs, key=lambda run: run.method != BASELINE)
    return list(dict.fromkeys(run.method for run in ordered))


def _said_by(comparisons: Mapping[Path, Any]) -> list[str]:
    """Return which methods comparisons have left out, or could not finish, and why."""
    said: list[str] = []
    for record in comparisons.values():
        with contextlib.suppress(AttributeError):  # something else
            said += [
                f"Left out: {name}: {why}." for name, why in record.get("left_out", {}).items()
            ]
            said += [f"Failed: {name}: {why}." for name, why in record.get("failed", {}).items()]
            said += [f"Note: {note}." for note in record.get("notes", [])]
    return list(dict.fromkeys(said))


def _recognise_cifar100(run: Run) -> tuple[bool, list[str]]:
    """Return whether a run's images are CIFAR-100's, and a note if its class names are missing."""
    for folder in run.peer_folders.values():
        # From a damaged folder on to the next: all peers have the same classes.
        with contextlib.suppress(UsageError, KeyError):
            names = read_timm_config(folder / FILE).content["label_names"]
            return is_cifar100(names), []
    if run.description["classes"] != 100 or "cifar100" not in run.config.data.dataset:
        return False, []
    text = "There are no weights with class names: taken for CIFAR-100 by the data set's name."
    return True, [text]
