"""The figures of a report: which numbers of which runs go into which plot."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from dml_accel.analysis import plots
from dml_accel.analysis.methods import BASELINE
from dml_accel.analysis.plots import Style
from dml_accel.analysis.probes import NOISE, analyse
from dml_accel.analysis.runs import Run, networks_of, recipe_of
from dml_accel.analysis.statistics import (
    Curve,
    curve,
    loss_over_epochs,
    metric_over_epochs,
    summarise,
)
from dml_accel.core.errors import UsageError
from dml_accel.data.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RunsByMethod = Mapping[str, Sequence[Run]]
AnalysesByMethod = Mapping[str, Sequence[dict[str, Any]]]
Styles = Mapping[str, Style]
_MOST_DASHED = 7  # methods whose networks differ in dashes: as many as there are colours


@dataclass(frozen=True)
class ReportFigure:
    """A figure with its title and caption; ``draw`` draws it."""

    title: str
    text: str
    draw: Callable[[], Figure]


def comparison_figures(
    by_method: RunsByMethod, record: dict[str, Any], analyses: AnalysesByMethod
) -> list[ReportFigure]:
    """Return the figures of runs that differ only in method and seed.

    Args:
        by_method: the runs, methods in the order of the figures.
        record: of their comparison; see ``statistics.comparison_record``.
        analyses: of runs that were analysed; see ``analyse_runs``.
    """
    style = plots.styles(list(by_method))
    figures = []
    if BASELINE in by_method and len(by_method) > 1:
        title = "Difference to independent training"
        text = "Mean over the networks; hollow: their ensemble. Paired by seed, 95% t-interval."
        text += " A point without a bar is a single seed."
        figures.append(ReportFigure(title, text, partial(plots.differences, record, "")))
    figures += _curves(by_method, style)
    figures += _divergences(by_method)
    if analyses:
        figures += _analysis_figures(analyses, style)
    return figures


# ---------------------------------------------------------------- curves over epochs


def _curves(by_method: RunsByMethod, style: Styles) -> list[ReportFigure]:
    def metric(value: Callable[[dict[str, Any]], float | None]) -> dict[str, Curve]:
        return {method: metric_over_epochs(runs, value) for method, runs in by_method.items()}

    def pairs(value: Callable[[dict[str, Any]], float | None]) -> dict[str, Curve]:
        several = {m: runs for m, runs in by_method.items() if len(runs[0].nets) > 1}
        return {method: metric_over_epochs(runs, value) for method, runs in several.items()}

    band = "Mean over seeds; the band is the 95% interval, or with two seeds a line for each."
    entropy = metric(lambda test: _mean(test["entropy"].values()))
    figures = _by_network(by_method, style, band)
    rows = [
        (
            "Test accuracy of the ensemble",
            "Mean posterior of the cohort.",
            pairs(lambda test: test["ensemble"]["top1"]),
            "top-1, %",
        ),
        ("Entropy of the posteriors on the test images", band, entropy, "nats"),
        (
            "Agreement of the peers",
            "Share of test images on which two peers predict the same class, mean over pairs.",
            pairs(lambda test: test["agreement"]),
            "agreement, %",
        ),
        (
            "KL between the peers' posteriors",
            "On the test images, mean over ordered pairs.",
            pairs(_mean_kl),
            "nats",
        ),
    ]
    for title, text, lines, y in rows:
        figures += _over_epochs(title, text, lines, style, y)
    return figures


def _over_epochs(
    title: str, text: str, lines: Mapping[str, Curve], style: Styles, y: str
) -> list[ReportFigure]:
    shown = {name: line for name, line in lines.items() if line.points}
    if not any(len(line.points) > 1 for line in shown.values()):
        return []  # a single point is not a curve
    scale = 100.0 if "%" in y else 1.0
    return [ReportFigure(title, text, partial(plots.curves, shown, style, "epoch", y, scale))]


def _by_network(by_method: RunsByMethod, style: Styles, text: str) -> list[ReportFigure]:
    """Return accuracies and losses of each network where the peers' networks differ."""
    most = max((runs[0].nets for runs in by_method.values()), key=len)
    nets = list(dict.fromkeys(most))
    if len(nets) == 1:
        nets, text = [""], text.replace("over seeds", "over peers and seeds", 1)
    splits = ["test", *(["val"] if _have_validation(by_method) else [])]
    names = {"test": "Test accuracy", "val": "Validation accuracy"}
    found: list[tuple[str, str, dict[tuple[str, str], Curve]]] = []
    for split in splits:
        lines = {
            (method, net): metric_over_epochs(runs, partial(_top1_of, net), split)
            for method, runs in by_method.items()
            for net in nets
        }
        found.append((names[split], "top-1, %", lines))
    for title, part in (
        ("Cross-entropy in training", "cross_entropy"),
        ("KL term in training", "kl"),
    ):
        lines = {
            (method, net): loss_over_epochs(runs, part, net)
            for method, runs in by_method.items()
            for net in nets
            if part != "kl" or method != BASELINE
        }
        found.append((title, "nats", lines))
    figures = []
    together = len(by_method) <= _MOST_DASHED
    for title, y, by_both in found:
        for group in [nets] if together else [[net] for net in nets]:
            looks, named = _named(by_both, group, style, dashed=together)
            whose = f" of {group[0]}" if group[0] and not together else ""
            figures += _over_epochs(title + whose, text, named, looks, y)
    return figures


def _named(
    lines: Mapping[tuple[str, str], Curve], nets: Sequence[str], style: Styles, dashed: bool
) -> tuple[dict[str, Style], dict[str, Curve]]:
    """Return the style and the curve of each method and network by the name of both."""
    looks, curves = {}, {}
    for (method, net), line in lines.items():
        if net not in nets:
            continue
        name, look = method, style[method]
        if len(nets) > 1 and dashed:
            name = f"{method}, {net}"
            look = Style(look.colour, plots.DASHES[nets.index(net) % len(plots.DASHES)])
        looks[name], curves[name] = look, line
    return looks, curves


def _have_validation(by_method: RunsByMethod) -> bool:
    return any(
        event.get("val")
        for runs in by_method.values()
        for event in runs[0].events
        if event["event"] == "eval"
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean; None without values, or if one of them is None (not finite)."""
    numbers = list(values)
    finite = [number for number in numbers if number is not None]
    return statistics.fmean(finite) if finite and len(finite) == len(numbers) else None


def _top1_of(net: str, metrics: dict[str, Any]) -> float | None:
    """Return the mean top-1 of the peers with a network; of all peers if none is named."""
    peers = metrics["peers"].items()
    return _mean(peer["top1"] for name, peer in peers if net in ("", name.rpartition("-")[0]))


def _mean_kl(test: dict[str, Any]) -> float | None:
    return _mean(value for a, row in test["kl"].items() for b, value in row.items() if a != b)


# ---------------------------------------------------------------- matrices of peers


def _divergences(by_method: RunsByMethod) -> list[ReportFigure]:
    """Return the KL between all pairs of peers after the last epoch, a figure for each method."""
    tables = {
        method: [run.last_metrics["kl"] for run in runs]
        for method, runs in by_method.items()
        if len(runs[0].nets) > 1
    }
    text = "Teachers in rows: KL(row || column) on the test images, mean over seeds."
    return _matrices("KL between posteriors after the last epoch", text, tables, "nats")


def _disagreements(analyses: AnalysesByMethod) -> list[ReportFigure]:
    text = "Share of test images on which two peers predict different classes, mean over seeds."
    tables = {method: [run["disagreement"] for run in runs] for method, runs in analyses.items()}
    several = {method: runs for method, runs in tables.items() if len(runs[0]) > 1}
    return _matrices("Disagreement", text, several, "share of images")


def _matrices(
    title: str,
    text: str,
    tables: Mapping[str, Sequence[dict[str, dict[str, float | None]]]],
    unit: str,
) -> list[ReportFigure]:
    """Return a figure for each method, all with the same scale of colours."""
    means = {method: _mean_matrix(runs) for method, runs in tables.items()}
    every = [value for values, _ in means.values() for row in values for value in row]
    # One method that has diverged would leave a single colour for all others.
    most = max(every, default=0.0)
    usual = 100 * statistics.median([value for value in every if value > 0] or [most])
    ends = (min(every, default=0.0), min(most, usual))
    text += " All methods have the same colours."
    return [
        ReportFigure(f"{title}: {method}", text, partial(plots.matrix, values, names, unit, ends))
        for method, (values, names) in means.items()
    ]


def _mean_matrix(
    tables: Sequence[dict[str, dict[str, float | None]]],
) -> tuple[list[list[float]], list[str]]:
    """Return the mean of tables {row: {column: value}}, and the names of rows and columns."""
    names = sorted(tables[0])
    means = [[_mean(table[a][b] for table in tables) or 0.0 for b in names] for a in names]
    return means, names


# ---------------------------------------------------------------- analyses of networks


def analyse_runs(runs: Sequence[Run], images: int) -> dict[str, dict[str, Any]]:
    """Return the analyses of all runs that have their weights, by the names of the runs.

    Args:
        runs: finished ones.
        images: how many of each split to analyse networks on; 0 for no analyses.
    """
    todo = [run for run in runs if images and len(run.peer_folders) == len(run.peers)]
    analyses: dict[str, dict[str, Any]] = {}
    with Progress("analysing", len(todo), unit="runs", every=10.0, quiet=not todo) as progress:
        for run in todo:
            try:
                analyses[run.name] = analyse(run, images)
            except UsageError as error:
                print(
                    f"warning: {run.name} is not analysed, because {error}; --analyse 0 analyses "
                    "nothing, without a warning",
                    file=sys.stderr,
                )
            progress.add(1)
    return analyses


def _analysis_figures(analyses: AnalysesByMethod, style: Styles) -> list[ReportFigure]:
    def noise(metric: str) -> dict[str, Curve]:
        return _over_peers(analyses, NOISE, lambda peer, at: peer["noise"][NOISE.index(at)][metric])

    marks = (10.0, 25.0, 50.0, 75.0, 90.0)
    entropy = _over_peers(analyses, marks, lambda peer, at: peer["entropy"][f"q{at:g}"])
    bins = {method: _merge_bins(runs) for method, runs in analyses.items()}
    sigma, how = "standard deviation of the noise", "Gaussian noise on every weight, 3 draws."
    loss, accuracy = "cross-entropy, nats", "top-1, %"
    return [
        ReportFigure(
            "Training loss under weight noise",
            f"{how} A minimum is flat if the loss grows slowly.",
            partial(plots.curves, noise("train_loss"), style, sigma, loss),
        ),
        ReportFigure(
            "Test accuracy under weight noise",
            how,
            partial(plots.curves, noise("test_top1"), style, sigma, accuracy, 100.0),
        ),
        ReportFigure(
            "Entropy of single posteriors",
            "Quantiles over the test images, mean over peers and seeds.",
            partial(plots.curves, entropy, style, "quantile, %", "nats", mark="o"),
        ),
        *_disagreements(analyses),
        ReportFigure(
            "Calibration",
            "Accuracy against confidence in 15 bins, over all peers and seeds.",
            partial(plots.calibration, bins, style),
        ),
    ]


def _over_peers(
    analyses: AnalysesByMethod,
    places: Sequence[float],
    value: Callable[[dict[str, Any], float], float | None],
) -> dict[str, Curve]:
    """Return a curve for each method: at each place a mean over peers, summarised over runs."""

    def one(run: dict[str, Any]) -> dict[float, float | None]:
        # Peers first: the seed is the unit of the interval.
        return {at: _mean(value(p, at) for p in run["peers"].values()) for at in places}

    return {method: curve([one(run) for run in runs]) for method, runs in analyses.items()}


def _merge_bins(analyses: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return mean confidence and accuracy of each bin over peers and runs, weighted by images."""
    totals: dict[int, tuple[float, float, float]] = {}
    for one in analyses:
        for peer in one["peers"].values():
            for row in peer["calibration"]:
                share, confidence, accuracy = totals.get(row["bin"], (0.0, 0.0, 0.0))
                totals[row["bin"]] = (
                    share + row["share"],
                    confidence + row["share"] * row["confidence"],
                    accuracy + row["share"] * row["accuracy"],
                )
    return [(c / share, a / share) for _, (share, c, a) in sorted(totals.items())]


# ---------------------------------------------------------------- cohorts of several sizes


def cohort_size_figures(groups: Sequence[Sequence[Run]]) -> list[ReportFigure]:
    """Return accuracy against K for cohorts of K equal networks that differ in nothing else."""
    figures = []
    text = "Mutual learning; K = 1 is independent training. 95% interval over seeds."
    for by_size in _runs_by_size([run for group in groups for run in group]):
        sizes = sorted(by_size)
        if len(sizes) < 2:
            continue
        lines: dict[str, Curve] = {
            name: Curve([(float(k), summarise(list(map(value, by_size[k])))) for k in sizes])
            for name, value in (("mean of the peers", _peers_top1), ("ensemble", _ensemble_top1))
        }
        style = plots.styles(list(lines))
        draw = partial(plots.curves, lines, style, "K", "top-1, %", 100.0, "o")
        net = by_size[sizes[0]][0].nets[0]
        figures.append(ReportFigure(f"{net}: accuracy against the size of the cohort", text, draw))
    return figures


def _runs_by_size(runs: Sequence[Run]) -> list[dict[int, list[Run]]]:
    """Return runs by the size of their cohort, one of each seed, for each network and recipe."""
    grouped: dict[str, dict[int, dict[int, Run]]] = {}
    for run in runs:
        nets, size = set(networks_of(run)), len(run.nets)
        if len(nets) == 1 and run.method == ("mutual" if size > 1 else BASELINE):
            key = json.dumps([*nets, recipe_of(run)])
            grouped.setdefault(key, {}).setdefault(size, {})[run.config.seed] = run
    return [
        {size: list(by_seed.values()) for size, by_seed in by_size.items()}
        for by_size in grouped.values()
    ]


def _peers_top1(run: Run) -> float | None:
    return _mean(peer["test"]["top1"] for peer in run.results["peers"])


def _ensemble_top1(run: Run) -> float | None:
    return float(run.results["ensemble"]["top1"])
