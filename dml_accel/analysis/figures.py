"""The figures of a report: which numbers of which runs go into which plot."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dml_accel.analysis import plots
from dml_accel.analysis.methods import BASELINE
from dml_accel.analysis.probes import NOISE, analyse
from dml_accel.analysis.runs import Run, group_by_method, networks_of, recipe_of
from dml_accel.analysis.statistics import (
    Curve,
    Summary,
    loss_over_epochs,
    metric_over_epochs,
    summarise,
)
from dml_accel.core.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RunsByMethod = Mapping[str, Sequence[Run]]
AnalysesByMethod = Mapping[str, Sequence[dict[str, Any]]]
Colours = Mapping[str, str]


@dataclass(frozen=True)
class ReportFigure:
    """A figure with its title and caption; ``light`` and ``dark`` are data URIs."""

    title: str
    text: str
    light: str
    dark: str


def _figure(title: str, text: str, draw: Callable[[], Figure]) -> ReportFigure:
    return ReportFigure(title, text, plots.as_uri(draw, "light"), plots.as_uri(draw, "dark"))


def comparison_figures(
    runs: Sequence[Run], record: dict[str, Any], images: int
) -> list[ReportFigure]:
    """Draw the figures of runs that differ only in method and seed.

    Args:
        runs: the runs.
        record: of their comparison; see ``statistics.comparison_record``.
        images: how many images of each split to analyse networks on; 0 for no analyses.
    """
    by_method = group_by_method(runs)
    colour = plots.colours(list(by_method))
    figures = []
    if BASELINE in by_method and len(by_method) > 1:
        title = "Difference to independent training"
        text = "Paired by seed; 95% t-interval, or a hollow point for a single seed."
        figures.append(_figure(title, text, partial(plots.differences, record, "")))
    figures += _curves(by_method, colour)
    figures += _divergences(by_method)
    if images:
        figures += _analysis_figures(_analyse_runs(by_method, images), colour)
    return figures


# ---------------------------------------------------------------- curves over epochs


def _curves(by_method: RunsByMethod, colour: Colours) -> list[ReportFigure]:
    def metric(value: Callable[[dict[str, Any]], float | None]) -> dict[str, Curve]:
        return {method: metric_over_epochs(runs, value) for method, runs in by_method.items()}

    def loss(part: str, without: str = "") -> dict[str, Curve]:
        curves = {method: loss_over_epochs(runs, part) for method, runs in by_method.items()}
        return {method: curve for method, curve in curves.items() if method != without}

    band = "Mean over seeds and peers; the band is the 95% interval over seeds."
    rows = [
        ("Test accuracy", band, metric(_mean_top1), "top-1, %"),
        (
            "Test accuracy of the ensemble",
            "Mean posterior of the cohort.",
            metric(lambda test: test["ensemble"]["top1"]),
            "top-1, %",
        ),
        ("Cross-entropy in training", band, loss("cross_entropy"), "nats"),
        ("KL term in training", band, loss("kl", without=BASELINE), "nats"),
        (
            "Entropy of the posteriors on the test images",
            band,
            metric(lambda test: _mean(test["entropy"].values())),
            "nats",
        ),
    ]
    if len(next(iter(by_method.values()))[0].nets) > 1:
        same = "Share of test images on which two peers predict the same class, mean over pairs."
        between = "On the test images, mean over ordered pairs."
        agreement = metric(lambda test: test["agreement"])
        rows.append(("Agreement of the peers", same, agreement, "agreement, %"))
        rows.append(("KL between the peers' posteriors", between, metric(_mean_kl), "nats"))
    return [
        _figure(
            title,
            text,
            partial(plots.curves, lines, colour, "epoch", y, 100.0 if "%" in y else 1.0),
        )
        for title, text, lines, y in rows
        if any(len(points) > 1 for points in lines.values())  # a single point is not a curve
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean; None without values, or if one of them is None (not finite)."""
    numbers = list(values)
    finite = [number for number in numbers if number is not None]
    return statistics.fmean(finite) if finite and len(finite) == len(numbers) else None


def _mean_top1(test: dict[str, Any]) -> float | None:
    return _mean(peer["top1"] for peer in test["peers"].values())


def _mean_kl(test: dict[str, Any]) -> float | None:
    return _mean(value for a, row in test["kl"].items() for b, value in row.items() if a != b)


# ---------------------------------------------------------------- matrices of peers


def _divergences(by_method: RunsByMethod) -> list[ReportFigure]:
    """Draw the KL between all pairs of peers after the last epoch, a figure for each method."""
    text = "Teachers in rows: KL(row || column) on the test images, mean over seeds."
    return [
        _figure(
            f"KL between posteriors after the last epoch: {method}",
            text,
            partial(plots.matrix, *_mean_matrix([run.last_metrics["kl"] for run in runs]), "nats"),
        )
        for method, runs in by_method.items()
        if len(runs[0].nets) > 1
    ]


def _mean_matrix(
    tables: Sequence[dict[str, dict[str, float | None]]],
) -> tuple[list[list[float]], list[str]]:
    """Return the mean of tables {row: {column: value}}, and the names of rows and columns."""
    names = sorted(tables[0])
    means = [[_mean(table[a][b] for table in tables) or 0.0 for b in names] for a in names]
    return means, names


def _disagreements(analyses: AnalysesByMethod) -> list[ReportFigure]:
    text = "Share of test images on which two peers predict different classes, mean over seeds."
    figures = []
    for method, runs in analyses.items():
        means, names = _mean_matrix([run["disagreement"] for run in runs])
        if len(names) > 1:
            draw = partial(plots.matrix, means, names, "share of images")
            figures.append(_figure(f"Disagreement: {method}", text, draw))
    return figures


# ---------------------------------------------------------------- analyses of networks


def _analyse_runs(by_method: RunsByMethod, images: int) -> AnalysesByMethod:
    """Return the analyses of all runs that have their weights, by method; empty after an error."""
    runs = [(method, run) for method, all_runs in by_method.items() for run in all_runs]
    todo = [(method, run) for method, run in runs if len(run.peer_folders) == len(run.peers)]
    analyses: dict[str, list[dict[str, Any]]] = {}
    try:
        for method, run in tqdm(todo, "analysing", unit=" runs", disable=None):
            analyses.setdefault(method, []).append(analyse(run, images))
    except UsageError as error:
        print(
            f"warning: no analyses, because {error}; --analyse 0 skips them without a warning",
            file=sys.stderr,
        )
        return {}
    return analyses


def _analysis_figures(analyses: AnalysesByMethod, colour: Colours) -> list[ReportFigure]:
    if not analyses:
        return []

    def noise(metric: str) -> dict[str, Curve]:
        return _over_peers(analyses, NOISE, lambda peer, at: peer["noise"][NOISE.index(at)][metric])

    marks = (10.0, 25.0, 50.0, 75.0, 90.0)
    entropy = _over_peers(analyses, marks, lambda peer, at: peer["entropy"][f"q{at:g}"])
    bins = {method: _merge_bins(runs) for method, runs in analyses.items()}
    sigma, how = "standard deviation of the noise", "Gaussian noise on every weight, 3 draws."
    loss, accuracy = "cross-entropy, nats", "top-1, %"
    return [
        _figure(
            "Training loss under weight noise",
            f"{how} A minimum is flat if the loss grows slowly.",
            partial(plots.curves, noise("train_loss"), colour, sigma, loss),
        ),
        _figure(
            "Test accuracy under weight noise",
            how,
            partial(plots.curves, noise("test_top1"), colour, sigma, accuracy, 100.0),
        ),
        _figure(
            "Entropy of single posteriors",
            "Quantiles over the test images, mean over peers and seeds.",
            partial(plots.curves, entropy, colour, "quantile, %", "nats", marks="o-"),
        ),
        *_disagreements(analyses),
        _figure(
            "Calibration",
            "Accuracy against confidence in 15 bins, over all peers and seeds.",
            partial(plots.calibration, bins, colour),
        ),
    ]


def _over_peers(
    analyses: AnalysesByMethod,
    places: Sequence[float],
    value: Callable[[dict[str, Any], float], float | None],
) -> dict[str, Curve]:
    """Return a curve for each method: at each place a mean over peers, summarised over runs."""

    def summary(runs: Sequence[dict[str, Any]], at: float) -> Summary:
        # Peers first: the seed is the unit of the interval.
        return summarise([_mean(value(p, at) for p in run["peers"].values()) for run in runs])

    return {m: [(at, summary(runs, at)) for at in places] for m, runs in analyses.items()}


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
    """Draw accuracy against K for cohorts of K equal networks that differ in nothing else."""
    figures = []
    text = "Mutual learning; K = 1 is independent training. 95% interval over seeds."
    for by_size in _runs_by_size([run for group in groups for run in group]):
        sizes = sorted(by_size)
        if len(sizes) < 2:
            continue
        lines: dict[str, Curve] = {
            name: [(float(k), summarise([value(run) for run in by_size[k]])) for k in sizes]
            for name, value in (("mean of the peers", _peers_top1), ("ensemble", _ensemble_top1))
        }
        colour = plots.colours(list(lines))
        draw = partial(plots.curves, lines, colour, "K", "top-1, %", 100.0, "o-")
        net = by_size[sizes[0]][0].nets[0]
        figures.append(_figure(f"{net}: accuracy against the size of the cohort", text, draw))
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
