"""What a comparison has to say: results.md and the table on the screen."""

from collections.abc import Sequence
from typing import Any

from dml_accel.analysis.methods import METHODS
from dml_accel.core.tables import percent, table
from dml_accel.models.model_card import without_place


def comparison_markdown(record: dict[str, Any], plot: str) -> str:
    """Return results.md of a comparison: the paper's layout, every number's interval, the runs.

    Args:
        record: the content of its results.json.
        plot: file name of the picture of differences.
    """
    parts = [
        f"# {comparison_title(record)}",
        comparison_table(record, "github"),
        DIFFERENCES_ARE,
        *_published(record),
        f"![Differences to independent training with their 95% intervals]({plot})",
        "## Top-1 accuracy, %",
        statistics_table(record, "top1", 100),
        "## Negative log-likelihood, nats",
        statistics_table(record, "nll", 1),
        "## Cost",
        cost_table(record),
        "## How it was made",
        _origin(record),
    ]
    return "\n\n".join(parts) + "\n"


def comparison_title(record: dict[str, Any]) -> str:
    """Return one line: methods, networks, images, and what was scaled down."""
    title = f"{' against '.join(record['methods'])}: {subject(record)}"
    return title[:1].upper() + title[1:]


def subject(record: dict[str, Any]) -> str:
    """Return one line: networks, images, and what was scaled down."""
    cohorts = ", ".join(" + ".join(_nets(cohort)) for cohort in record["cohorts"])
    where = without_place(record["dataset"])
    smaller = ", ".join(record["scaled_down"])
    title = f"{cohorts or 'nothing finished'} on {where}"
    return title + (f" (scaled down: {smaller})" if smaller else "")


DIFFERENCES_ARE = (
    "Top-1 in %, mean over seeds, last epoch. Differences are paired: same seed, initial weights, "
    "data order and\naugmentation; in brackets the 95% t-interval and the p-value of the paired "
    "t-test, with the seed as the\nunit. Equal networks of a run are averaged first. p-values are "
    "not corrected for the number of rows."
)


def comparison_table(record: dict[str, Any], style: str = "simple") -> str:
    """Return one row per cohort in the layout of the paper's Table 2."""
    cohorts = record["cohorts"]
    widest = max((len(cohort["peers"]) for cohort in cohorts), default=0)
    others = [method for method in record["methods"] if method != "independent"]
    headers = [f"Net {index + 1}" for index in range(widest)] + ["n"]
    headers += [_title(method) for method in record["methods"]]
    headers += [f"{_title(method)} - Ind." for method in others]
    rows = []
    for cohort in cohorts:
        found = {(s["method"], s["of"], s["name"]): s for s in cohort["summaries"]}
        nets = _nets(cohort)
        row = nets + [""] * (widest - len(nets))
        counts = {s["method"]: str(s["top1"]["n"]) for s in cohort["summaries"]}
        row.append(" / ".join(dict.fromkeys(counts.values())))
        for method in record["methods"]:
            keys = [(method, "peer", peer["name"]) for peer in cohort["peers"]]
            row.append(" / ".join(_mean(found.get(key), "top1", 100) for key in keys))
        for method in others:
            architectures = dict.fromkeys(peer["arch"] for peer in cohort["peers"])
            summaries = [found.get((method, "architecture", arch)) for arch in architectures]
            row.append(" / ".join(_difference(s, "top1", 100) for s in summaries))
        rows.append(row)
    return table(rows, headers, style, left=widest)


def _title(method: str) -> str:
    name, comma, unusual = method.partition(",")
    return (METHODS[name].title if name in METHODS else name) + comma + unusual


def _nets(cohort: dict[str, Any]) -> list[str]:
    return [peer["name"].rpartition("-")[0] for peer in cohort["peers"]]


def _mean(summary: dict[str, Any] | None, metric: str, scale: float) -> str:
    mean = summary[metric]["mean"] if summary else None
    return "-" if mean is None else f"{scale * mean:.{_digits(scale)}f}"


def _digits(scale: float) -> int:
    return 2 if scale == 100 else 3


def _interval(numbers: dict[str, Any], scale: float, sign: str = "") -> str:
    if numbers["low"] is None:
        return "no interval"
    digits = _digits(scale)
    return (
        f"{scale * numbers['low']:{sign}.{digits}f} to {scale * numbers['high']:{sign}.{digits}f}"
    )


def _difference(summary: dict[str, Any] | None, metric: str, scale: float) -> str:
    numbers = summary["difference"][metric] if summary and summary["difference"] else None
    if numbers is None or numbers["mean"] is None:
        return "-"
    p = "" if numbers["p"] is None else f"; p = {_p(numbers['p'])}"
    mean = f"{scale * numbers['mean']:+.{_digits(scale)}f}"
    return f"{mean} ({_interval(numbers, scale, '+')}{p})"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def statistics_table(
    record: dict[str, Any], metric: str, scale: float, style: str = "github"
) -> str:
    """Return mean, deviation, interval and difference of a metric, a row per network and method."""
    headers = ("cohort", "what", "method", "n", "mean", "sd", "95% interval", "minus independent")
    rows = []
    for cohort in record["cohorts"]:
        nets = _nets(cohort)
        for summary in cohort["summaries"]:
            if summary["of"] == "peer" and nets.count(summary["name"].rpartition("-")[0]) == 1:
                continue  # its architecture has the same numbers
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


def _what(summary: dict[str, Any]) -> str:
    """Return what a row is about; an ensemble of networks that learned alone has a name."""
    deep = summary["of"] == "ensemble" and summary["method"] == "independent"
    return "deep ensemble" if deep else str(summary["name"])


def cost_table(record: dict[str, Any], style: str = "github") -> str:
    """Return what each method costs: seconds, speed, accuracy for the time of its steps."""
    headers = ("cohort", "method", "s a run", "s of steps", "images/s", "top-1 % a 1,000 s")

    def cell(cost: dict[str, Any], name: str, scale: float = 1.0) -> str:
        mean = cost[name]["mean"]
        return "-" if mean is None else f"{scale * mean:.3g}" if scale != 1 else f"{mean:.0f}"

    rows = [
        [
            cohort["cohort"],
            method,
            cell(cost, "seconds"),
            cell(cost, "training_seconds"),
            cell(cost, "images_per_second"),
            cell(cost, "top1_per_training_second", 1e5),
        ]
        for cohort in record["cohorts"]
        for method, cost in cohort["cost"].items()
    ]
    return table(rows, headers, style, left=2)


def _published(record: dict[str, Any]) -> list[str]:
    found = published_table(record)
    return ["## Beside what others report", *found] if found else []


def published_table(record: dict[str, Any], style: str = "github") -> list[str]:
    """Return what others report for the same networks, ours beside it, and what to know of it.

    Empty where nobody reports any.
    """
    rows = []
    for cohort in record["cohorts"]:
        found = {(s["method"], s["name"]): s for s in cohort["summaries"]}
        names = [peer["name"] for peer in cohort["peers"]]
        for row in cohort["published"]:
            cells = []
            for method in ("independent", "mutual"):
                ours = [_mean(found.get((method, name)), "top1", 100) for name in names]
                theirs = [_quoted(value, row["unchecked"]) for value in row[method]]
                cells += [" / ".join(theirs), " / ".join(ours)]
            rows.append([" + ".join(_nets(cohort)), row["source"], *cells])
    if not rows:
        return []
    headers = ("networks", "source", "their Ind.", "our Ind.", "their DML", "our DML")
    smaller = (
        f" Ours are scaled down ({', '.join(record['scaled_down'])}) and not comparable."
        if record["scaled_down"]
        else ""
    )
    return [
        table(rows, headers, style, left=2),
        f"Theirs: 200 epochs on the 50,000 images of CIFAR-100.{smaller} A value marked ? "
        "could not be\ncompared with the text of its source.",
    ]


def _quoted(value: float, unchecked: Sequence[float]) -> str:
    return f"{value:.2f}" + ("?" if value in unchecked else "")


def _origin(record: dict[str, Any]) -> str:
    recipe = ", ".join(f"{name} {value}" for name, value in record["recipe"].items())
    commits = {run["commit"] for run in record["runs"]}
    where = {
        (run["device"], run["world_size"], run["mixed_precision"], *run["versions"].items())
        for run in record["runs"]
    }
    lines = [
        f"- Command: `{record['command']}`",
        f"- Seeds {', '.join(map(str, record['seeds']))}; recipe of the paper"
        + (f", but {recipe}" if recipe else ""),
        *(
            f"- {world} process(es) on {device}, precision {precision}; "
            + ", ".join(f"{k} {v}" for k, v in versions)
            for device, world, precision, *versions in sorted(where)
        ),
        f"- Commits: {', '.join(sorted(str(commit) for commit in commits))}",
    ]
    if record["missing"]:
        lines.append(f"- Not finished yet: {', '.join(record['missing'])}")
    lines += [f"- Failed: {folder}: {reason}" for folder, reason in record["failed"].items()]
    rows = [
        [f"`{run['folder']}`", percent(run["ensemble"]["top1"]), f"{run['seconds']:.0f}"]
        for run in record["runs"]
    ]
    runs = table(rows, ("run folder", "ensemble top-1 %", "seconds"), "github", left=1)
    return "\n".join(lines) + "\n\n" + runs
