"""The pictures of a report: curves, divergences, analyses, accuracy against the cohort's size."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

from dml_accel.analysis import plots
from dml_accel.analysis.intervals import Summary, summarise
from dml_accel.analysis.methods import BASELINE
from dml_accel.analysis.probes import NOISE, analysis, holds_weights
from dml_accel.analysis.runs import (
    Run,
    by_method,
    loss_over_epochs,
    nets_of,
    over_epochs,
    recipe_of,
)
from dml_accel.core.config import UsageError


@dataclass(frozen=True)
class Picture:
    """A picture for light and dark pages, and the words that go with it."""

    title: str
    text: str
    light: str
    dark: str


def _picture(title: str, text: str, draw: Callable[[], Figure]) -> Picture:
    return Picture(title, text, plots.as_uri(draw, "light"), plots.as_uri(draw, "dark"))


def pictures(runs: Sequence[Run], record: dict[str, Any], images: int) -> list[Picture]:
    """Draw runs that differ in method and seed alone.

    Args:
        runs: the runs.
        record: their comparison, as ``comparison.record`` returns it.
        images: how many images of each split to analyse networks on; 0 for no analyses.
    """
    methods = by_method(runs)
    colour = plots.colours(list(methods))
    found = []
    if any(method != BASELINE for method in methods) and BASELINE in methods:
        found.append(
            _picture(
                "Difference to independent training",
                "Paired by seed; 95% t-interval, or a hollow point for one seed.",
                partial(plots.differences, record, ""),
            )
        )
    found += _curves(methods, colour)
    found += _divergences(methods)
    if images:
        found += _analyses(methods, colour, images)
    return found


def _curves(methods: Mapping[str, Sequence[Run]], colour: Mapping[str, str]) -> list[Picture]:
    top1 = {m: over_epochs(runs, _mean_of_peers("top1")) for m, runs in methods.items()}
    ensemble = {
        m: over_epochs(runs, lambda test: test["ensemble"]["top1"]) for m, runs in methods.items()
    }
    loss = {m: loss_over_epochs(runs, "cross_entropy") for m, runs in methods.items()}
    kl = {m: loss_over_epochs(runs, "kl") for m, runs in methods.items() if m != BASELINE}
    entropy = {
        m: over_epochs(runs, lambda test: _mean(test["entropy"].values()))
        for m, runs in methods.items()
    }
    band = "Mean over seeds and peers; the band is the 95% interval over seeds."
    rows = [
        ("Test accuracy", band, top1, "top-1, %", 100.0),
        (
            "Test accuracy of the ensemble",
            "Mean posterior of the cohort.",
            ensemble,
            "top-1, %",
            100.0,
        ),
        ("Cross-entropy in training", band, loss, "nats", 1.0),
        ("KL term in training", "What peers still teach each other.", kl, "nats", 1.0),
        ("Entropy of the posteriors on the test images", band, entropy, "nats", 1.0),
    ]
    if len(next(iter(methods.values()))[0].nets) > 1:
        agreement = {
            m: over_epochs(runs, lambda test: test["agreement"]) for m, runs in methods.items()
        }
        between = {m: over_epochs(runs, _mean_kl) for m, runs in methods.items()}
        same = "Share of test images on which two peers predict the same class, mean over pairs."
        rows += [
            ("Agreement of the peers", same, agreement, "agreement, %", 100.0),
            (
                "KL between the peers' posteriors",
                "On the test images, mean over ordered pairs.",
                between,
                "nats",
                1.0,
            ),
        ]
    return [
        _picture(title, text, partial(plots.curves, lines, colour, "epoch", y, scale))
        for title, text, lines, y, scale in rows
        if any(len(points) > 1 for points in lines.values())
    ]


def _mean_of_peers(metric: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda test: _mean(peer[metric] for peer in test["peers"].values())


def _mean(values: Any) -> float | None:
    known = list(values)
    return None if None in known or not known else statistics.fmean(known)


def _divergences(methods: Mapping[str, Sequence[Run]]) -> list[Picture]:
    """Draw the K x K divergences at the end, a picture for each method."""
    return [
        _picture(
            f"KL between posteriors at the end: {method}",
            "Row teaches column: KL(row || column) on the test images, mean over seeds.",
            partial(plots.matrix, *_mean_table([run.ends_with["kl"] for run in runs]), "nats"),
        )
        for method, runs in methods.items()
        if len(runs[0].nets) > 1
    ]


def _mean_table(
    tables: Sequence[dict[str, dict[str, float | None]]],
) -> tuple[list[list[float]], list[str]]:
    """Return the means of tables {row: {column: value}} and the names of rows and columns."""
    names = sorted(tables[0])
    means = [[_mean(one[a][b] for one in tables) or 0.0 for b in names] for a in names]
    return means, names


def _mean_kl(test: dict[str, Any]) -> float | None:
    return _mean(value for a, row in test["kl"].items() for b, value in row.items() if a != b)


def _analyses(
    methods: Mapping[str, Sequence[Run]], colour: Mapping[str, str], images: int
) -> list[Picture]:
    known: dict[str, list[dict[str, Any]]] = {}
    try:
        todo = [(m, run) for m, runs in methods.items() for run in runs if holds_weights(run)]
        for m, run in tqdm(todo, "analysing", unit=" runs", disable=None):
            known.setdefault(m, []).append(analysis(run, images))
    except UsageError as error:
        print(f"warning: no analyses, as {error}; --analyse 0 leaves them out", file=sys.stderr)
        return []
    if not known:
        return []

    def noise(metric: str) -> dict[str, plots.Curve]:
        places = [(sigma, partial(_noisy, metric, at)) for at, sigma in enumerate(NOISE)]
        return _over_peers(known, places)

    quantiles = [(float(mark), partial(_quantile, mark)) for mark in (10, 25, 50, 75, 90)]
    sigma, drawn = "standard deviation of the noise", "Gaussian noise on every weight, 3 draws."
    return [
        _picture(
            "Training loss under weight noise",
            f"{drawn} A minimum is flat where the loss grows slowly.",
            partial(plots.curves, noise("train_loss"), colour, sigma, "cross-entropy, nats"),
        ),
        _picture(
            "Test accuracy under weight noise",
            drawn,
            partial(plots.curves, noise("test_top1"), colour, sigma, "top-1, %", 100.0),
        ),
        _picture(
            "Entropy of single posteriors",
            "Quantiles over the test images, mean over peers and seeds.",
            partial(
                plots.curves,
                _over_peers(known, quantiles),
                colour,
                "quantile, %",
                "nats",
                1.0,
                "o-",
            ),
        ),
        *_disagreements(known),
        _picture(
            "Calibration",
            "Accuracy against confidence in 15 bins, all peers and seeds together.",
            partial(plots.calibration, {m: _bins(f) for m, f in known.items()}, colour),
        ),
    ]


def _noisy(metric: str, place: int, peer: dict[str, Any]) -> float | None:
    value: float | None = peer["noise"][place][metric]
    return value


def _quantile(mark: int, peer: dict[str, Any]) -> float | None:
    value: float | None = peer["entropy"][f"q{mark}"]
    return value


def _over_peers(
    known: Mapping[str, Sequence[dict[str, Any]]],
    places: Sequence[tuple[float, Callable[[dict[str, Any]], float | None]]],
) -> dict[str, plots.Curve]:
    """Return at each place the mean over peers of a value, summarised over the runs' analyses."""

    def summary(found: Sequence[dict[str, Any]], value: Callable[..., float | None]) -> Summary:
        return summarise([_mean(map(value, one["peers"].values())) for one in found])

    return {m: [(at, summary(found, value)) for at, value in places] for m, found in known.items()}


def _disagreements(known: Mapping[str, Sequence[dict[str, Any]]]) -> list[Picture]:
    text = "Share of test images on which two peers predict other classes, mean over seeds."
    pictures = []
    for m, found in known.items():
        means, names = _mean_table([one["disagreement"] for one in found])
        if len(names) > 1:
            draw = partial(plots.matrix, means, names, "share of images")
            pictures.append(_picture(f"Disagreement: {m}", text, draw))
    return pictures


def _bins(found: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return mean confidence and accuracy of each bin over peers and runs, weighed by images."""
    sums: dict[int, list[float]] = {}
    for one in found:
        for peer in one["peers"].values():
            for row in peer["calibration"]:
                share, confidence, accuracy = sums.get(row["bin"], [0.0, 0.0, 0.0])
                weight = row["share"]
                sums[row["bin"]] = [
                    share + weight,
                    confidence + weight * row["confidence"],
                    accuracy + weight * row["accuracy"],
                ]
    return [(c / share, a / share) for _, (share, c, a) in sorted(sums.items())]


def growth(groups: Sequence[Sequence[Run]]) -> list[Picture]:
    """Draw accuracy against K for cohorts of one network that differ in nothing else."""
    by_net: dict[str, dict[int, dict[int, Run]]] = {}
    for run in (run for group in groups for run in group):
        nets, size = set(nets_of(run)), len(run.nets)
        if len(nets) == 1 and run.method == ("mutual" if size > 1 else "independent"):
            key = json.dumps([*nets, recipe_of(run)])
            by_net.setdefault(key, {}).setdefault(size, {})[run.config.seed] = run
    found = []
    for sizes in by_net.values():
        if len(sizes) < 2:
            continue
        net = next(iter(sizes[min(sizes)].values())).nets[0]
        lines: dict[str, plots.Curve] = {
            name: [
                (float(k), summarise([value(run) for run in sizes[k].values()]))
                for k in sorted(sizes)
            ]
            for name, value in (("mean of the peers", _peers_top1), ("ensemble", _ensemble_top1))
        }
        draw = partial(
            plots.curves, lines, plots.colours(list(lines)), "K", "top-1, %", 100.0, "o-"
        )
        text = "Mutual learning; K = 1 is independent training. 95% interval over seeds."
        found.append(_picture(f"{net}: accuracy against the size of the cohort", text, draw))
    return found


def _peers_top1(run: Run) -> float | None:
    return _mean(peer["test"]["top1"] for peer in run.results["peers"])


def _ensemble_top1(run: Run) -> float:
    return float(run.results["ensemble"]["top1"])
