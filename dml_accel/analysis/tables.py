"""A comparison in tables and words: results.md, the screen and the report.

Every function takes the record that ``statistics.comparison_record`` returns, which is the content
of the comparison's results.json.
"""

from pathlib import Path
from typing import Any

from dml_accel.analysis.methods import BASELINE, METHODS
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
Top-1 accuracy in %, mean over seeds, after the last epoch. Differences are paired: same seed,
initial weights, data order and augmentation; in brackets the 95% t-interval and the p-value of the
paired t-test over seeds. Equal networks of a run are averaged first. The p-values are not corrected
for multiple comparisons."""


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
        [f"`{run['folder']}`", percent(run["ensemble"]["top1"]), f"{run['seconds']:.0f}"]
        for run in runs
    ]
    return render(
        Path(__file__).parent / "templates" / "results.md.j2",
        record=record,
        title=comparison_title(record),
        comparison=comparison_table(record, "github"),
        about=ABOUT_DIFFERENCES,
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
    title = f"{' against '.join(record['methods'])}: {subject(record)}"
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
    """Return one row per cohort in the layout of the paper's Table 2."""
    others = [method for method in record["methods"] if method != BASELINE]
    widest = max((len(cohort["peers"]) for cohort in record["cohorts"]), default=0)
    headers = [f"Net {index + 1}" for index in range(widest)] + ["n"]
    headers += [_title(method) for method in record["methods"]]
    headers += [f"{_title(method)} - {METHODS[BASELINE].title}" for method in others]
    rows = []
    for cohort in record["cohorts"]:
        nets, peers = _nets(cohort), cohort["peers"]
        summaries = {(s["method"], s["of"], s["name"]): s for s in cohort["summaries"]}
        # While runs are missing, methods may differ in the number of seeds.
        counts = {s["method"]: str(s["top1"]["n"]) for s in cohort["summaries"]}
        row = [*nets, *[""] * (widest - len(nets)), " / ".join(dict.fromkeys(counts.values()))]
        for method in record["methods"]:
            one_each = [summaries.get((method, "peer", peer["name"])) for peer in peers]
            row.append(" / ".join(_mean(summary, "top1", 100) for summary in one_each))
        for method in others:
            # Equal networks share a difference, because they are averaged first.
            archs = dict.fromkeys(peer["arch"] for peer in peers)
            one_each = [summaries.get((method, "architecture", arch)) for arch in archs]
            row.append(" / ".join(_difference(summary, "top1", 100) for summary in one_each))
        rows.append(row)
    return table(rows, headers, style, left=widest)


def metric_table(record: dict[str, Any], metric: str, scale: float, style: str = "github") -> str:
    """Return one row per network and method: mean, deviation, interval and difference.

    Args:
        record: of the comparison.
        metric: its key in the record.
        scale: factor from the record's unit to the table's.
        style: of tabulate.
    """
    headers = ("cohort", "what", "method", "n", "mean", "sd", "95% interval", f"minus {BASELINE}")
    rows = []
    for cohort in record["cohorts"]:
        nets = _nets(cohort)
        for summary in cohort["summaries"]:
            if summary["of"] == "peer" and nets.count(summary["name"].rpartition("-")[0]) == 1:
                continue  # the row of its architecture has the same numbers
            numbers = summary[metric]
            sd = numbers["sd"]
            rows.append(
                [
                    cohort["cohort"],
                    _what(summary),
                    summary["method"],
                    numbers["n"],
                    _mean(summary, metric, scale),
                    "-" if sd is None else f"{scale * sd:.{_digits(scale)}f}",
                    "-" if numbers["mean"] is None else _interval(numbers, scale),
                    _difference(summary, metric, scale),
                ]
            )
    return table(rows, headers, style, left=3)


def macro_f1_table(record: dict[str, Any], style: str = "github") -> str:
    """Return the macro-F1 as ``metric_table`` does; empty where classes are balanced."""
    shown = any(is_unbalanced(run) for run in record["runs"])
    return metric_table(record, "macro_f1", 100, style) if shown else ""


def cost_table(record: dict[str, Any], style: str = "github") -> str:
    """Return what each method costs: time, speed, and accuracy per time of optimizer steps."""
    headers = ("cohort", "method", "s per run", "s in steps", "images per s", "top-1 % per 1,000 s")

    def cell(cost: dict[str, Any], name: str) -> str:
        mean = cost[name]["mean"]
        return "-" if mean is None else f"{mean:.0f}"

    def accuracy(cost: dict[str, Any]) -> str:
        mean = cost["top1_per_training_second"]["mean"]
        return "-" if mean is None else f"{1e5 * mean:.3g}"

    times = ("seconds", "training_seconds", "images_per_second")
    rows = [
        [cohort["cohort"], method, *(cell(cost, name) for name in times), accuracy(cost)]
        for cohort in record["cohorts"]
        for method, cost in cohort["cost"].items()
    ]
    return table(rows, headers, style, left=2)


def published_table(record: dict[str, Any], style: str = "github") -> list[str]:
    """Return a table of published results beside ours, and a note; empty if there are none."""
    rows = []
    for cohort in record["cohorts"]:
        summaries = {(s["method"], s["name"]): s for s in cohort["summaries"]}
        names = [peer["name"] for peer in cohort["peers"]]
        for row in cohort["published"]:
            cells = []
            for method in (BASELINE, "mutual"):
                ours = [_mean(summaries.get((method, name)), "top1", 100) for name in names]
                cells += [" / ".join(_published(row, method)), " / ".join(ours)]
            rows.append([" + ".join(_nets(cohort)), row["source"], *cells])
    if not rows:
        return []
    headers = ("networks", "source", "Ind., published", "Ind., ours", "DML, published", "DML, ours")
    scaled_down = ", ".join(record["scaled_down"])
    note = "Published: 200 epochs on the 50,000 training images of CIFAR-100."
    if scaled_down:
        note += f" Ours are scaled down ({scaled_down}) and not comparable."
    other = [name.replace("_", " ") for name in record["recipe"] if name in _OF_RECIPE]
    if other:
        note += f" Ours follow another recipe ({', '.join(other)})."
    note += " Values marked ? could not be\ncompared with the text of their source."
    return [table(rows, headers, style, left=2), note]


# ---------------------------------------------------------------- cells


def _title(method: str) -> str:
    name, comma, unusual = method.partition(",")
    return (METHODS[name].title if name in METHODS else name) + comma + unusual


def _nets(cohort: dict[str, Any]) -> list[str]:
    return [peer["name"].rpartition("-")[0] for peer in cohort["peers"]]


def _what(summary: dict[str, Any]) -> str:
    """Return what a row summarises; an ensemble of independent networks has a name."""
    deep = summary["of"] == "ensemble" and summary["method"] == BASELINE
    return "deep ensemble" if deep else str(summary["name"])


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


def _difference(summary: dict[str, Any] | None, metric: str, scale: float) -> str:
    numbers = summary["difference"][metric] if summary and summary["difference"] else None
    if numbers is None or numbers["mean"] is None:
        return "-"
    p = "" if numbers["p"] is None else f"; p = {_p_value(numbers['p'])}"
    mean = f"{scale * numbers['mean']:+.{_digits(scale)}f}"
    return f"{mean} ({_interval(numbers, scale, '+')}{p})"


def _p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _published(row: dict[str, Any], method: str) -> list[str]:
    return [f"{value:.2f}" + "?" * (value in row["unchecked"]) for value in row[method]]
