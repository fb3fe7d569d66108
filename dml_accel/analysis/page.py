"""One page about any finished runs: tables, pictures, where each number comes from.

The page stands alone: nothing in it is loaded from elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from dml_accel.analysis import statistics as comparison
from dml_accel.analysis import tables as comparison_report
from dml_accel.analysis.pictures import Picture, growth, pictures
from dml_accel.analysis.runs import Run, by_method, comparable
from dml_accel.analysis.subruns import SubRun
from dml_accel.core.files import write_text

_TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"


@dataclass(frozen=True)
class Section:
    """What there is to say about runs that differ in method and seed alone."""

    title: str
    note: str
    table: str
    published: list[str]
    accuracy: str
    cost: str
    pictures: list[Picture]
    runs: list[dict[str, str]]


def write_page(runs: Sequence[Run], path: Path, images: int) -> None:
    """Write the report.

    Args:
        runs: finished runs.
        path: the file.
        images: how many images of each split to analyse networks on; 0 for no analyses.

    Raises:
        UsageError: a run's weights or images cannot be read.
    """
    groups = comparable(runs)
    sections = [_section(group, images) for group in groups]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text())
    text = template.render(
        sections=sections,
        growth=growth(groups),
        runs=len(runs),
        differences_are=comparison_report.DIFFERENCES_ARE,
    )
    write_text(path, text)


def _section(runs: Sequence[Run], images: int) -> Section:
    first = runs[0]
    kept = list({(run.method, run.config.seed): run for run in reversed(runs)}.values())[::-1]
    methods = list(by_method(kept))
    finished = [
        comparison.finished(
            SubRun(run.cohort, run.method, run.config.seed, str(run.folder.resolve()), run.config),
            run.results,
            run.description,
            run.events,
        )
        for run in sorted(kept, key=lambda run: (methods.index(run.method), run.config.seed))
    ]
    plan = [one.sub for one in finished]
    theirs = first.description["classes"] == 100 and "cifar100" in first.config.dataset
    record = comparison.record(first.config, plan, finished, theirs, "", {})
    more = len(runs) - len(kept)
    notes = [f"{more} more with the method and seed of one here: left out."] if more else []
    elsewhere = [str(run.folder) for run in kept if run.events[0]["event"] == "resume"]
    if elsewhere:
        notes.append(
            f"Begun from the checkpoint of another run, so that curves and cost lack their "
            f"beginning: {', '.join(elsewhere)}."
        )
    return Section(
        title=comparison_report.subject(record),
        note=" ".join(notes),
        table=comparison_report.comparison_table(record, "html"),
        published=comparison_report.published_table(record, "html"),
        accuracy=comparison_report.statistics_table(record, "top1", 100, "html"),
        cost=comparison_report.cost_table(record, "html"),
        pictures=pictures(kept, record, images),
        runs=[
            {
                "folder": str(run.folder),
                "method": run.method,
                "seed": str(run.config.seed),
                "command": run.description["command"],
            }
            for run in kept
        ],
    )
