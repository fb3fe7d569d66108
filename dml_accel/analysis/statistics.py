"""Statistics over seeds, from single numbers to the record of a comparison.

The seed is the unit of every mean, interval and test. Equal networks of one run are averaged first:
they share their data and, with mutual learning, each other's predictions, so they are not
independent replicates. Differences to independent training are paired by seed.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import scipy  # scipy.stats is imported when it is first used, because that takes a second

from dml_accel.analysis.methods import BASELINE
from dml_accel.analysis.passes import million_passes, passes_per_image
from dml_accel.analysis.published import CIFAR100_TRAINING_IMAGES, published_results
from dml_accel.analysis.runs import Run
from dml_accel.core.config import Config
from dml_accel.core.method import MethodConfig
from dml_accel.core.recipes import in_words
from dml_accel.data.selection import split_names

METRICS = ("top1", "top5", "nll", "ece", "macro_f1")
_NOT_IN_OLDER_RUNS = frozenset({"macro_f1"})
COLUMNS = ("method", "seed", "peer", "arch", *METRICS)
_CONFIDENCE = 0.95
_ROUNDING = 1e-12  # relative: by this much, differences that should be equal may differ
_NOT_IN_RECIPE = frozenset({"cohort", "dataset", "seed", "image_column", "label_column"})

Values = Mapping[int, float | None]  # by seed


# ---------------------------------------------------------------- one number per seed


@dataclass(frozen=True)
class Summary:
    """A sample of one number per seed.

    Attributes:
        n: seeds.
        mean: None without seeds, or if a seed's number is not finite.
        sd: sample standard deviation (n - 1); None below two seeds.
        low: lower end of the 95% t-interval of the mean; None below two seeds.
        high: its upper end.
    """

    n: int
    mean: float | None
    sd: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference(Summary):
    """A paired difference.

    Attributes:
        p: of the two-sided paired t-test; None if the differences do not vary.
    """

    p: float | None = None


def summarise(values: Sequence[float | None]) -> Summary:
    """Summarise one value per seed; None stands for one that is not finite."""
    finite = [value for value in values if value is not None]
    if not finite or len(finite) < len(values):
        return Summary(len(values), None)
    mean = statistics.fmean(finite)
    if len(finite) < 2:
        return Summary(len(finite), mean)
    sd = statistics.stdev(finite)
    # Equal up to rounding: a t-test on the last bits would call them significant.
    if sd <= _ROUNDING * max(map(abs, finite)):
        return Summary(len(finite), mean, 0.0, mean, mean)
    error = scipy.stats.sem(finite)
    low, high = scipy.stats.t.interval(_CONFIDENCE, len(finite) - 1, loc=mean, scale=error)
    return Summary(len(finite), mean, sd, float(low), float(high))


def paired_difference(values: Values, baseline: Values) -> Difference:
    """Summarise ``values`` minus ``baseline`` over the seeds that both have."""
    seeds = sorted(values.keys() & baseline.keys())
    pairs = [(values[seed], baseline[seed]) for seed in seeds]
    summary = summarise([None if a is None or b is None else a - b for a, b in pairs])
    p = float(scipy.stats.ttest_rel(*zip(*pairs, strict=True)).pvalue) if summary.sd else None
    return Difference(**vars(summary), p=p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values after Holm's correction for how many there are; None stays None.

    A method is called different at 5% if its corrected value is below 0.05; over all methods, the
    chance of calling any wrongly so is then at most 5% (Holm 1979).
    """
    tested = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        corrected[place] = largest
    return corrected


# ---------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curve:
    """A number along an axis.

    Attributes:
        points: where, and its summary over seeds.
        seeds: the same for each seed: where, and its value.
    """

    points: list[tuple[float, Summary]]
    seeds: list[list[tuple[float, float]]] = field(default_factory=list)


def curve(by_seed: Sequence[Mapping[float, float | None]]) -> Curve:
    """Summarise the values of all seeds, {where: value}, at each place that all of them have."""
    shared = sorted(set.intersection(*map(set, by_seed))) if by_seed else []
    return Curve(
        [(at, summarise([values[at] for values in by_seed])) for at in shared],
        [
            [(at, value) for at, value in sorted(values.items()) if value is not None]
            for values in by_seed
        ],
    )


def metric_over_epochs(
    runs: Sequence[Run], value: Callable[[dict[str, Any]], float | None], split: str = "test"
) -> Curve:
    """Summarise a value of the metrics of a split over seeds, by epoch."""
    return curve([_metric_by_epoch(run, value, split) for run in runs])


def loss_over_epochs(runs: Sequence[Run], part: str, net: str = "") -> Curve:
    """Summarise a part of the training loss, mean over peers, over seeds and by epoch.

    Args:
        runs: one of each seed.
        part: of the loss.
        net: only of peers with this network; empty for all.
    """
    return curve([_loss_by_epoch(run, part, net) for run in runs])


def _metric_by_epoch(
    run: Run, value: Callable[[dict[str, Any]], float | None], split: str
) -> dict[float, float | None]:
    return {
        event["step"] / run.steps_per_epoch: value(event[split])
        for event in run.events
        if event["event"] == "eval" and event.get(split)
    }


def _loss_by_epoch(run: Run, part: str, net: str) -> dict[float, float | None]:
    totals: dict[int, tuple[float, float]] = {}  # optimizer steps, and the sum of their losses
    for event in run.events:
        if event["event"] != "step":
            continue
        losses = [
            peer[part]
            for name, peer in event["peers"].items()
            if peer[part] is not None and net in ("", name.rpartition("-")[0])
        ]
        if losses:
            epoch = -(-event["step"] // run.steps_per_epoch)
            # A record holds the mean of several steps, so it is weighted by them.
            steps, total = totals.get(epoch, (0.0, 0.0))
            loss = event["steps"] * statistics.fmean(losses)
            totals[epoch] = steps + event["steps"], total + loss
    return {float(epoch): total / steps for epoch, (steps, total) in totals.items()}


# ---------------------------------------------------------------- the record of a comparison


def csv_rows(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Return one row per cohort, method, seed and peer; accuracy as a fraction, NLL in nats."""
    return [
        {
            "cohort": run.cohort,
            "method": run.method,
            "seed": run.config.seed,
            "peer": peer["name"],
            "arch": peer["arch"],
            **{metric: _value(peer["test"], metric) for metric in METRICS},
        }
        for run in runs
        for peer in run.results["peers"]
    ]


def refuse_incomplete(run: Run) -> None:
    """Raise what the record and the tables of a comparison would raise for a damaged run.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, IndexError: an entry is missing, or of
            another kind.
    """
    seeds = [run.config.seed]
    comparison_record(run.config, [run], methods=[run.method], seeds=seeds, cifar100=False)
    csv_rows([run])


def comparison_record(
    config: Config,
    runs: Sequence[Run],
    *,
    methods: Sequence[str],
    seeds: Sequence[int],
    cifar100: bool,
    missing: Sequence[str] = (),
    failed: Mapping[str, str] | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Return the content of a comparison's results.json.

    Args:
        config: what the runs share; cohort, seed, folder and method differ.
        runs: those that are finished.
        methods: all that are compared, in the order of the tables.
        seeds: all that were asked for.
        cifar100: whether the images are CIFAR-100's, for which there are published results.
        missing: names of runs that are not finished.
        failed: runs that ended without results, and why.
        command: the command line.
    """
    changed = config.differences(Config())
    return {
        "format": 1,
        "dataset": config.data.dataset,
        "split": split_names(config.data).test,
        "methods": list(methods),
        "seeds": sorted(seeds),
        "flags": {
            method: _flags([run for run in runs if run.method == method])
            for method in methods
            if any(run.method == method for run in runs)
        },
        "scaled_down": _scaled_down(config, runs) if cifar100 else [],
        "recipe": {n: value for n, (value, _) in changed.items() if n not in _NOT_IN_RECIPE},
        "missing": list(missing),
        "failed": dict(failed or {}),
        "cohorts": [
            _cohort_record([run for run in runs if run.cohort == cohort], methods, cifar100)
            for cohort in dict.fromkeys(run.cohort for run in runs)
        ],
        "runs": [_run_record(run) for run in runs],
        "config": config.as_dict(),
        "command": command,
    }


def _flags(runs: Sequence[Run]) -> str:
    """Return the flags that make a method, as the runs have them; stages one after the other."""
    stages = dict.fromkeys(_flags_of(one) for run in runs for one in (*run.earlier, run))
    return "; then ".join(stages)


def _flags_of(run: Run) -> str:
    changed = run.config.differences(Config())
    mine = {name: value for name, (value, _) in changed.items() if name in MethodConfig.names()}
    # Their folders may be others in every run.
    teachers = [
        one["arch"] for one in run.description.get("teachers", {}).get("frozen", {}).values()
    ]
    mine.pop("frozen_peers", None)
    flags = [in_words(mine)] if mine else []
    return " ".join([*flags, *(["--frozen-peers of", *teachers] if teachers else [])])


def _scaled_down(config: Config, runs: Sequence[Run]) -> list[str]:
    """Return in words what is smaller than in the paper."""
    data, optim, paper = config.data, config.optim, Config().optim
    parts = []
    # The images of the runs, because the configuration does not say how many the data set has.
    images = max((run.description["images"]["train"] for run in runs), default=0)
    if 0 < images < CIFAR100_TRAINING_IMAGES:
        parts.append(f"{images:,} of {CIFAR100_TRAINING_IMAGES:,} training images")
    if optim.max_steps is not None:
        parts.append(f"{optim.max_steps:,} optimizer steps")
    if data.labelled_fraction < 1:
        parts.append(f"labels of {100 * data.labelled_fraction:g}% of them")
    if optim.epochs < paper.epochs:
        parts.append(f"{optim.epochs} of {paper.epochs} epochs")
    return parts


def _run_record(run: Run) -> dict[str, Any]:
    keys = ("ensemble", "agreement", "device", "mixed_precision", "world_size", "versions")
    return {
        "cohort": run.cohort,
        "method": run.method,
        "seed": run.config.seed,
        "folder": run.name,
        **{key: run.results[key] for key in keys},
        "imbalance": run.results.get("imbalance"),
        "seconds": run.seconds,
        "images_per_second": run.results["throughput"]["images_per_second"],
        "commit": run.description["commit"],
        "compiled": run.description.get("compiled", []),
        "earlier": [_run_record(one) for one in run.earlier],
    }


def _cohort_record(runs: Sequence[Run], methods: Sequence[str], cifar100: bool) -> dict[str, Any]:
    """Summarise the runs of one cohort: each network, architecture, the cohort, the ensemble."""
    by_method: dict[str, dict[int, Run]] = {method: {} for method in methods}
    for run in runs:
        by_method[run.method][run.config.seed] = run
    # A method of stages may have trained only some of the networks.
    most = max(runs, key=lambda run: len(run.results["peers"]))
    peers = [(peer["name"], peer["arch"]) for peer in most.results["peers"]]
    nets = [name.rpartition("-")[0] for name, _ in peers]
    groups = [
        [
            _summary_record(method, of, name, members, by_method)
            for method in methods
            if by_method[method]
        ]
        for of, name, members in _groups(peers)
    ]
    for summaries in groups:
        _correct(summaries)
    return {
        "cohort": runs[0].cohort,
        "peers": [{"name": name, "arch": arch} for name, arch in peers],
        "summaries": [summary for summaries in groups for summary in summaries],
        "cost": {
            method: _cost_record([*by_seed.values()])
            for method, by_seed in by_method.items()
            if by_seed
        },
        "published": [
            vars(row) | {"unchecked": sorted(row.unchecked)}
            for row in (published_results(nets, methods) if cifar100 else [])
        ],
    }


def _groups(peers: Sequence[tuple[str, str]]) -> list[tuple[str, str, list[str]]]:
    """Return what is summarised: its kind, its name and its peers; the ensemble has none."""
    architectures = dict.fromkeys(arch for _, arch in peers)
    return [
        *(
            ("architecture", arch, [n for n, other in peers if other == arch])
            for arch in architectures
        ),
        *(("peer", name, [name]) for name, _ in peers),
        ("cohort", "cohort mean", [name for name, _ in peers]),
        ("ensemble", "ensemble", []),
    ]


def _summary_record(
    method: str,
    of: str,
    name: str,
    members: Sequence[str],
    by_method: Mapping[str, Mapping[int, Run]],
) -> dict[str, Any]:
    """Summarise one method for one of the groups."""

    def values(method: str, metric: str, members: Sequence[str]) -> dict[int, float | None]:
        return {
            seed: _mean_of_members(run, members, metric)
            for seed, run in by_method.get(method, {}).items()
            if _has(run, members)
        }

    # A method that trained one of equal networks is paired with that one.
    trained = [
        {peer["name"] for peer in run.results["peers"]} for run in by_method[method].values()
    ]
    shared = [one for one in members if all(one in names for names in trained)] or members
    difference = None
    if method != BASELINE and by_method.get(BASELINE):
        difference = {
            metric: vars(
                paired_difference(values(method, metric, members), values(BASELINE, metric, shared))
            )
            for metric in METRICS
        }
    return {
        "method": method,
        "of": of,
        "name": name,
        "only": list(shared) if len(shared) < len(members) else [],
        **{
            metric: vars(summarise([*values(method, metric, members).values()]))
            for metric in METRICS
        },
        "difference": difference,
    }


def _correct(summaries: Sequence[dict[str, Any]]) -> None:
    """Add ``p_holm`` to the differences of all methods in one group, which are one family."""
    compared = [summary["difference"] for summary in summaries if summary["difference"]]
    for metric in METRICS:
        corrected = holm([difference[metric]["p"] for difference in compared])
        for difference, p in zip(compared, corrected, strict=True):
            difference[metric]["p_holm"] = p


def _value(metrics: Mapping[str, float | None], metric: str) -> float | None:
    return metrics.get(metric) if metric in _NOT_IN_OLDER_RUNS else metrics[metric]


def _has(run: Run, members: Sequence[str]) -> bool:
    """Whether a run trained a network of each kind among some peers; all of them if none is named.

    A method that trains one network has no ensemble, and no mean over different networks.
    """
    trained = {peer["name"] for peer in run.results["peers"]}
    if not members:
        return set(run.whole_cohort) <= trained
    if len(members) == 1:
        return members[0] in trained
    kinds = {name.rpartition("-")[0] for name in members}
    return kinds <= {name.rpartition("-")[0] for name in trained & set(members)}


def _mean_of_members(run: Run, members: Sequence[str], metric: str) -> float | None:
    """Return the mean over some peers of one run; the ensemble's value if there are none."""
    if not members:
        return _value(run.results["ensemble"], metric)
    values = [
        _value(peer["test"], metric) for peer in run.results["peers"] if peer["name"] in members
    ]
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if len(found) == len(values) else None


def _cost_record(runs: Sequence[Run]) -> dict[str, Any]:
    costs = [_costs(run) for run in runs]
    return {name: vars(summarise([cost[name] for cost in costs])) for name in costs[0]}


def _costs(run: Run) -> dict[str, float | None]:
    """Return the seconds, in all and of optimizer steps, images and top-1 per second, and passes.

    Times are None if the run began elsewhere, because its first part was not recorded here; passes,
    too, if a stage before it is gone.
    """
    peers = run.results["peers"]
    top1 = sum(peer["test"]["top1"] for peer in peers) / len(peers)
    lacks = run.began_elsewhere or run.stage_is_gone
    training = None if lacks else run.training_seconds
    return {
        "seconds": None if lacks else run.seconds,
        "training_seconds": training,
        "images_per_second": run.results["throughput"]["images_per_second"],
        "top1_per_training_second": top1 / training if training else None,
        "passes_per_image": None if run.stage_is_gone else passes_per_image(run),
        "million_passes": None if run.stage_is_gone else million_passes(run),
    }
