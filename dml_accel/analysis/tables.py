"""A comparison in tables and words: results.md, the screen and the report.

Every function takes the record that ``statistics.comparison_record`` returns, which is the content
of the comparison's results.json.
"""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dml_accel.analysis.methods import BASELINE, METHODS
from dml_accel.analysis.published import Published, all_published
from dml_accel.core.config import OptimConfig
from dml_accel.core.tables import is_unbalanced, percent, render, table
from dml_accel.models.model_card import public_name

# Flags by which a run follows another recipe than the published ones; its length is told apart.
_OF_RECIPE = {
    *OptimConfig.names(),
    "augment",
    "mixup",
    "cutmix",
    "label_smoothing",
    "class_weights",
}
_OF_RECIPE -= {"epochs", "max_steps"}

ABOUT_DIFFERENCES = """\
Top-1 accuracy in %, mean over seeds, after the last epoch. Differences are of the mean over the
cohort's networks, and paired: same seed, initial weights, data order and augmentation; in brackets
the 95% t-interval. p is that of the paired t-test over seeds; p Holm is the same after Holm's
correction for how many methods are compared with independent training: a family is all methods in
one cohort, for one row of it (a network, the mean over networks, the ensemble) and one metric.
Equal networks of a run are averaged first."""
ABOUT_COST = """\
A pass is one network predicting one training image in an optimizer step, a backward pass counted as
two; per image of the step, and in millions over the run. Evaluations are not counted."""


def comparison_markdown(record: dict[str, Any], plot: str) -> str:
    """Return results.md: the paper's layout, every number with its interval, all runs.

    Args:
        record: of the comparison.
        plot: file name of the figure of differences.
    """
    runs = record["runs"]
    # Runs may come from several machines, each of which is listed once.
    machines = {
        (
            (run["device"], run["world_size"], run["mixed_precision"]),
            tuple(run["versions"].items()),
        )
        for run in runs
    }
    rows = [
        [f"`{run['folder']}`", percent(run["ensemble"]["top1"]), f"{_own_seconds(run):.0f}"]
        for last in runs
        for run in (*last["earlier"], last)
    ]
    return render(
        Path(__file__).parent / "templates" / "results.md.j2",
        record=record,
        title=comparison_title(record),
        comparison=comparison_table(record, "github"),
        about=ABOUT_DIFFERENCES,
        methods=methods_table(record),
        about_cost=ABOUT_COST,
        published=published_table(record),
        plot=plot,
        top1=metric_table(record, "top1", 100),
        macro_f1=macro_f1_table(record),
        nll=metric_table(record, "nll", 1),
        cost=cost_table(record),
        machines=sorted(machines),
        commits=sorted({str(run["commit"]) for run in runs}),
        runs=table(rows, ("run folder", "ensemble top-1 %", "s"), "github", left=1),
    )


def comparison_title(record: dict[str, Any]) -> str:
    """Return one line: methods, networks, data set, and what was scaled down."""
    methods = record["methods"]
    title = " against ".join(methods) if len(methods) < 4 else f"{len(methods)} methods"
    title += f": {subject(record)}"
    return title[:1].upper() + title[1:]


def subject(record: dict[str, Any]) -> str:
    """Return one line: networks, data set, and what was scaled down."""
    cohorts = ", ".join(" + ".join(_nets(cohort)) for cohort in record["cohorts"])
    smaller = ", ".join(record["scaled_down"])
    split = "" if record["split"] == "test" else f", split {record['split']}"
    title = f"{cohorts or 'no finished run'} on {public_name(record['dataset'])}{split}"
    return title + (f" (scaled down: {smaller})" if smaller else "")


# ---------------------------------------------------------------- tables


def comparison_table(record: dict[str, Any], style: str = "simple") -> str:
    """Return one row per method: top-1 and the difference to independent training.

    Where there are several cohorts, each has a table of its own below its name.
    """
    tables = [_comparison_of(cohort, record["methods"], style) for cohort in record["cohorts"]]
    if len(tables) < 2:
        return "".join(tables)
    name = {"github": "**{}**", "html": "<h4>{}</h4>"}.get(style, "{}:")
    titles = [name.format(html.escape(cohort["cohort"])) for cohort in record["cohorts"]]
    return "\n\n".join(f"{one}\n\n{two}" for one, two in zip(titles, tables, strict=True))


def _comparison_of(cohort: dict[str, Any], methods: Sequence[str], style: str) -> str:
    nets, several = _nets(cohort), len(cohort["peers"]) > 1
    archs = {peer["arch"]: net for peer, net in zip(cohort["peers"], nets, strict=True)}
    equal = several and len(archs) == 1
    headers = ["method", "n"]
    headers += [f"mean of {len(nets)} {nets[0]}"] if equal else list(archs.values())
    headers += ["ensemble"] * several + [f"minus {BASELINE}", "p", "p Holm"]
    by_method: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for summary in cohort["summaries"]:
        by_method.setdefault(summary["method"], {})[summary["of"], summary["name"]] = summary
    rows = []
    for method, found in by_method.items():
        shown = [found[("architecture", arch)] for arch in archs]
        # A method that trains one of several different networks has no mean over them.
        mean = found[("cohort", "cohort mean")]
        cells = [_mean(one, "top1", 100) for one in shown]
        cells += [_mean(found[("ensemble", "ensemble")], "top1", 100)] * several
        n = max(one["top1"]["n"] for one in shown)
        # One that trained some of the equal networks says which.
        only = f" ({', '.join(mean['only'])})" if equal and mean["only"] else ""
        rows.append([method + only, n, *cells, *_difference(mean, "top1", 100)])
    lacking = [method for method in methods if method not in by_method]
    rows += [[method, 0, *["-"] * (len(headers) - 2)] for method in lacking]
    return table(rows, headers, style, left=1)


def methods_table(record: dict[str, Any], style: str = "github") -> str:
    """Return what each method is, in words and as the flags of its runs."""
    rows = []
    for method in record["methods"]:
        name, _, varied = method.partition(",")
        text = METHODS[name].text if name in METHODS else ""
        flags = record["flags"].get(method)
        shown = "no finished run" if flags is None else flags or "the defaults"
        rows.append([method, "a variant: see its flags" if varied else text, shown])
    return table(rows, ("method", "what it is", "flags of its runs"), style, left=3)


def metric_table(record: dict[str, Any], metric: str, scale: float, style: str = "github") -> str:
    """Return one row per network and method: mean, deviation, interval and difference.

    Args:
        record: of the comparison.
        metric: its key in the record.
        scale: factor from the record's unit to the table's.
        style: of tabulate.
    """
    headers = ["what", "method", "n", "mean", "sd", "95% interval"]
    headers += [f"minus {BASELINE}", "p", "p Holm"]
    several = len(record["cohorts"]) > 1
    rows = []
    for cohort in record["cohorts"]:
        for summary in cohort["summaries"]:
            numbers = summary[metric]
            if _is_shown_elsewhere(summary, cohort) or not numbers["n"]:
                continue
            sd = numbers["sd"]
            rows.append(
                [
                    *([cohort["cohort"]] if several else []),
                    _what(summary, cohort),
                    summary["method"],
                    numbers["n"],
                    _mean(summary, metric, scale),
                    "-" if sd is None else f"{scale * sd:.{_digits(scale)}f}",
                    "-" if numbers["mean"] is None else _interval(numbers, scale),
                    *_difference(summary, metric, scale),
                ]
            )
    return table(rows, ["cohort"] * several + headers, style, left=2 + several)


def macro_f1_table(record: dict[str, Any], style: str = "github") -> str:
    """Return the macro-F1 as ``metric_table`` does; empty where classes are balanced."""
    shown = any(is_unbalanced(run) for run in record["runs"])
    return metric_table(record, "macro_f1", 100, style) if shown else ""


def cost_table(record: dict[str, Any], style: str = "github") -> str:
    """Return what each method costs: time, speed, passes, and accuracy per time of steps."""
    digits = {"seconds": 0, "training_seconds": 0, "images_per_second": 0}
    digits |= {"passes_per_image": 1, "million_passes": 2}
    headers = ["method", "s per run", "s in steps", "images per s", "passes per image"]
    headers += ["million passes per run", "top-1 % per 1,000 s"]
    several = len(record["cohorts"]) > 1

    def cell(cost: dict[str, Any], name: str) -> str:
        mean = cost[name]["mean"]
        return "-" if mean is None else f"{mean:,.{digits[name]}f}"

    def accuracy(cost: dict[str, Any]) -> str:
        mean = cost["top1_per_training_second"]["mean"]
        return "-" if mean is None else f"{1e5 * mean:.3g}"

    rows = [
        [
            *([cohort["cohort"]] if several else []),
            method,
            *(cell(cost, name) for name in digits),
            accuracy(cost),
        ]
        for cohort in record["cohorts"]
        for method, cost in cohort["cost"].items()
    ]
    return table(rows, ["cohort"] * several + headers, style, left=1 + several)


def published_table(record: dict[str, Any], style: str = "github") -> list[str]:
    """Return a table of published results beside ours, and a note; empty if there are none."""
    rows = []
    for cohort in record["cohorts"]:
        for row in cohort["published"]:
            one = Published(**row | {"unchecked": frozenset(row["unchecked"])})
            n = "" if one.n is None else one.n
            theirs = (one.numbers(), n, _ours(one, cohort), one.differs)
            rows.append([one.source, one.method, one.cohort, *theirs])
    if not rows:
        return []
    headers = ("source", "method", "networks", "published", "n", "ours", "what differs")
    scaled_down = ", ".join(record["scaled_down"])
    note = "Published: on the 50,000 training images of CIFAR-100; the paper trains for 200 epochs."
    if scaled_down:
        note += f" Ours are scaled down ({scaled_down}) and not comparable."
    other = [name.replace("_", " ") for name in record["recipe"] if name in _OF_RECIPE]
    if other:
        note += f" Ours follow another recipe ({', '.join(other)})."
    note += " Values marked ? could not be\ncompared with the text of their source."
    return [table(rows, headers, style, left=len(headers)), note]


def _ours(published: Published, cohort: dict[str, Any]) -> str:
    """Return our numbers for the networks of a published result, by the same method."""
    nets, peers = _nets(cohort), cohort["peers"]
    found = {
        (s["of"], s["name"]): s for s in cohort["summaries"] if s["method"] == published.method
    }
    if len(published.nets) == len(nets) and len(published.top1) > 1:
        shown = [("peer", peer["name"]) for peer in peers]
    else:
        archs = {net: peer["arch"] for net, peer in zip(nets, peers, strict=True)}
        shown = [("architecture", archs[net]) for net in dict.fromkeys(published.nets)]
    return " / ".join(_mean(found.get(key), "top1", 100) for key in shown)


def all_published_table() -> str:
    """Return all published results that we know of as a table."""
    headers = ("source", "method", "networks", "n", "top-1 %", "what differs")
    rows = [
        [one.source, one.method, one.cohort, one.n or "", one.numbers(), one.differs]
        for one in all_published()
    ]
    return table(rows, headers, "github", left=len(headers))


# ---------------------------------------------------------------- cells


def _own_seconds(run: dict[str, Any]) -> float:
    """Return the seconds of a run without the stages before it."""
    return float(run["seconds"]) - sum(one["seconds"] for one in run["earlier"])


def _nets(cohort: dict[str, Any]) -> list[str]:
    return [peer["name"].rpartition("-")[0] for peer in cohort["peers"]]


def _is_shown_elsewhere(summary: dict[str, Any], cohort: dict[str, Any]) -> bool:
    """Whether another row has the same numbers, because networks are alone or equal."""
    nets, archs = _nets(cohort), {peer["arch"] for peer in cohort["peers"]}
    if summary["of"] == "peer":
        return nets.count(summary["name"].rpartition("-")[0]) == 1
    if summary["of"] == "cohort":
        return len(archs) == 1
    return bool(summary["of"] == "ensemble" and len(nets) == 1)


def _what(summary: dict[str, Any], cohort: dict[str, Any]) -> str:
    """Return what a row summarises; an ensemble of independent networks has a name."""
    if summary["of"] == "ensemble" and summary["method"] == BASELINE:
        return "deep ensemble"
    if summary["of"] != "architecture":
        return str(summary["name"])
    pairs = zip(_nets(cohort), cohort["peers"], strict=True)
    nets = [net for net, peer in pairs if peer["arch"] == summary["name"]]
    return f"mean of {len(nets)} {nets[0]}" if len(nets) > 1 else nets[0]


def _digits(scale: float) -> int:
    return 2 if scale == 100 else 3


def _mean(summary: dict[str, Any] | None, metric: str, scale: float) -> str:
    mean = summary[metric]["mean"] if summary else None
    return "-" if mean is None else f"{scale * mean:.{_digits(scale)}f}"


def _interval(numbers: dict[str, Any], scale: float, sign: str = "") -> str:
    if numbers["low"] is None:
        return "no interval"
    low, high = (f"{scale * numbers[end]:{sign}.{_digits(scale)}f}" for end in ("low", "high"))
    return f"{low} to {high}"


def _difference(summary: dict[str, Any], metric: str, scale: float) -> list[str]:
    """Return the cells of a difference: its mean and interval, p, and p after Holm."""
    numbers = summary["difference"][metric] if summary["difference"] else None
    if numbers is None or numbers["mean"] is None:
        return ["-"] * 3
    mean = f"{scale * numbers['mean']:+.{_digits(scale)}f} ({_interval(numbers, scale, '+')})"
    return [mean, *(_p_value(numbers.get(key)) for key in ("p", "p_holm"))]


def _p_value(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"
