"""Pictures of results."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def differences(record: dict[str, Any], title: str) -> Figure:
    """Draw every method's top-1 difference to independent training with its 95% interval.

    One row per network, cohort mean and ensemble; a difference without interval (one seed) is a
    hollow point.

    Args:
        record: the content of a comparison's results.json.
        title: what was compared.
    """
    rows = [
        (cohort, summary)
        for cohort in record["cohorts"]
        for summary in cohort["summaries"]
        if summary["difference"]
        and summary["of"] != "peer"
        and summary["difference"]["top1"]["mean"] is not None
    ]
    figure = Figure(figsize=(8, 1.6 + 0.4 * max(1, len(rows))), layout="constrained")
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
    axes.set_xlabel("top-1 minus independent, percentage points (95% interval)")
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
