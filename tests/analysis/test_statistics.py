"""Statistics over seeds: by hand, against scipy, and by simulation."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dml_accel.analysis.passes import million_passes, passes_per_image
from dml_accel.analysis.runs import Run
from dml_accel.analysis.statistics import (
    METRICS,
    comparison_record,
    holm,
    loss_over_epochs,
    metric_over_epochs,
    paired_difference,
    summarise,
)
from dml_accel.analysis.tables import comparison_table, metric_table
from dml_accel.core.config import Config


def test_a_summary_by_hand() -> None:
    # mean 2.5; squared deviations 2.25 + .25 + .25 + 2.25 = 5; sd = sqrt(5 / 3); the 97.5%
    # quantile of Student's t with 3 degrees of freedom is 3.182446 in every table.
    found = summarise([1.0, 2.0, 3.0, 4.0])
    reach = 3.182446305 * math.sqrt(5 / 3) / 2
    assert (found.n, found.mean) == (4, 2.5)
    assert found.sd == pytest.approx(math.sqrt(5 / 3), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((2.5 - reach, 2.5 + reach), rel=1e-8)


def test_a_paired_difference_by_hand() -> None:
    # Differences 2, 3, 0: mean 5/3, sd sqrt(7/3), t = (5/3) / sqrt(7/9) = 5 / sqrt(7). With two
    # degrees of freedom P(|T| > t) = 1 - t / sqrt(2 + t^2), and the 97.5% quantile is 4.302653.
    found = paired_difference({0: 3.0, 1: 5.0, 2: 4.0}, {0: 1.0, 1: 2.0, 2: 4.0})
    t, reach = 5 / math.sqrt(7), 4.302652730 * math.sqrt(7) / 3
    assert found.n == 3
    assert (found.mean, found.sd) == pytest.approx((5 / 3, math.sqrt(7 / 3)), rel=1e-12)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
    assert (found.low, found.high) == pytest.approx((5 / 3 - reach, 5 / 3 + reach), rel=1e-8)


@pytest.mark.parametrize("n", [2, 5, 30])
def test_everything_equals_scipys(n: int) -> None:
    draw = np.random.default_rng(n)
    a = draw.normal(0.7, 0.01, n)
    b = a + draw.normal(0.002, 0.004, n)
    found = paired_difference(dict(enumerate(b.tolist())), dict(enumerate(a.tolist())))
    theirs = stats.ttest_rel(b, a)
    interval = theirs.confidence_interval(0.95)
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    one = stats.ttest_1samp(a, 0).confidence_interval(0.95)
    summary = summarise(a.tolist())
    assert (summary.low, summary.high) == pytest.approx((one.low, one.high), rel=1e-9)
    assert summary.sd == pytest.approx(a.std(ddof=1), rel=1e-9)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw, trials, covered = np.random.default_rng(0), 2000, 0
    for _ in range(trials):
        shared = draw.normal(0, 5, 5)  # what a seed has in common cancels in pairs
        a, b = shared + draw.normal(0, 0.5, 5), shared + draw.normal(1.0, 0.5, 5)
        found = paired_difference(dict(enumerate(b.tolist())), dict(enumerate(a.tolist())))
        covered += found.low <= 1.0 <= found.high
    # Four standard deviations of a binomial with 95%.
    assert abs(covered / trials - 0.95) < 4 * math.sqrt(0.95 * 0.05 / trials)


def test_one_seed_has_no_interval() -> None:
    found = summarise([0.5])
    assert (found.n, found.mean, found.sd, found.low, found.high) == (1, 0.5, None, None, None)
    difference = paired_difference({3: 0.5}, {3: 0.25})
    assert (difference.mean, difference.low, difference.p) == (0.25, None, None)


def test_only_seeds_that_both_have_are_paired() -> None:
    found = paired_difference({0: 1.0, 1: 2.0, 7: 99.0}, {1: 1.0, 0: 0.5, 8: -99.0})
    assert (found.n, found.mean) == (2, 0.75)


def test_what_does_not_vary_has_no_p() -> None:
    # 0.3 - 0.2 and 0.2 - 0.1 differ in the last bit only.
    found = paired_difference({0: 0.3, 1: 0.2, 2: 0.4}, {0: 0.2, 1: 0.1, 2: 0.3})
    assert (found.sd, found.p) == (0.0, None)
    assert (found.low, found.high) == (found.mean, found.mean)
    nothing = paired_difference({0: 0.3, 1: 0.2}, {0: 0.3, 1: 0.2})
    assert (nothing.mean, nothing.low, nothing.high, nothing.p) == (0.0, 0.0, 0.0, None)


def test_a_seed_that_is_not_finite_is_not_left_out_silently() -> None:
    found = summarise([1.0, None, 3.0])
    assert (found.n, found.mean, found.low) == (3, None, None)
    difference = paired_difference({0: 1.0, 1: None}, {0: 0.5, 1: 0.5})
    assert (difference.mean, difference.p) == (None, None)
    assert summarise([]).mean is None


def test_curves_are_means_over_seeds_by_hand(tmp_path: Path) -> None:
    def run(seed: int, top1: float, losses: list[float]) -> Run:
        events = [
            {"event": "step", "step": step, "steps": steps, "peers": {"a": {"kl": loss}}}
            for step, steps, loss in zip((1, 5), (1, 4), losses, strict=True)
        ]
        events.append({"event": "eval", "step": 10, "test": {"ensemble": {"top1": top1}}})
        description = {"images": {"train": 80}, "peers": [{"name": "a-0"}]}
        config = Config(seed=seed, batch_size=16)
        return Run(tmp_path, "", "mutual", config, description, {}, events)

    both = [run(0, 0.2, [1.0, 4.0]), run(1, 0.4, [2.0, 2.0])]
    found = metric_over_epochs(both, lambda test: test["ensemble"]["top1"])
    ((epoch, top1),) = found.points
    assert (epoch, top1.n, top1.mean) == (2.0, 2, pytest.approx(0.3))  # 5 steps per epoch
    assert found.seeds == [[(2.0, 0.2)], [(2.0, 0.4)]]
    ((epoch, kl),) = loss_over_epochs(both, "kl").points
    assert (epoch, kl.mean) == (1, pytest.approx((3.4 + 2.0) / 2))  # (1 x 1 + 4 x 4) / 5


def test_an_interruption_is_not_part_of_the_time(tmp_path: Path) -> None:
    times = [("start", 10.0), ("step", 12.0), ("resume", 500.0), ("step", 501.5), ("end", 502.0)]
    events = [{"event": event, "time": time} for event, time in times]
    run = Run(tmp_path, "", "mutual", Config(), {}, {}, events)
    assert run.seconds == pytest.approx(2.0 + 1.5 + 0.5)


@pytest.mark.parametrize(
    ("p", "corrected"),
    [
        # The smallest of three times 3, the next times 2, the last as it is.
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 0.03 x 2 = 0.06, and 0.04 is not below that
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.2, None, 0.01], [0.2, None, 0.02]),  # what has no p-value was not tested
        ([0.02, 0.02], [0.04, 0.04]),
        ([], []),
    ],
    ids=str,
)
def test_holms_correction_by_hand(p: list, corrected: list) -> None:
    assert holm(p) == pytest.approx(corrected)


def test_holm_calls_nothing_different_by_chance_more_often_than_it_says() -> None:
    draw, trials = np.random.default_rng(0), 1000
    wrong = sum(min(holm(draw.uniform(size=12).tolist())) < 0.05 for _ in range(trials))
    # Exactly 1 - (1 - 0.05 / 12)^12 of independent tests; four standard deviations.
    expected = 1 - (1 - 0.05 / 12) ** 12
    assert abs(wrong / trials - expected) < 4 * math.sqrt(expected * (1 - expected) / trials)


def cohort_runs(tmp_path: Path, top1: dict[str, list[list[float]]], names: list[str]) -> list[Run]:
    """Return runs of methods by seed: ``top1`` of each of their peers, and the best as ensemble."""
    runs = []
    for method, by_seed in top1.items():
        for seed, values in enumerate(by_seed):
            trained = names[: len(values)]
            metrics = [dict.fromkeys(METRICS, value) for value in values]
            peers = [
                {"name": name, "arch": f"{name[:-2]}_cifar", "test": one}
                for name, one in zip(trained, metrics, strict=True)
            ]
            results = {"peers": peers, "ensemble": metrics[0], "agreement": None, "device": "cpu"}
            results |= {"mixed_precision": "no", "world_size": 1, "versions": {}, "steps": 10}
            results |= {"throughput": {"images_per_second": 1.0}}
            description = {"peers": peers, "images": {"train": 80}, "commit": None}
            weight = 0.0 if method == "independent" else 1.0
            cohort = tuple(name[:-2] for name in names)
            config = Config(cohort=cohort, seed=seed, batch_size=16, kl_weight=weight)
            event = {"event": "start", "time": 0.0}
            folder = f"{method}/{seed}"
            run = Run(tmp_path, folder, method, config, description, results, [event])
            runs.append(run)
    return runs


def test_the_methods_of_one_row_are_one_family(tmp_path: Path) -> None:
    names = ["resnet8-0", "resnet20-0"]
    top1 = {
        "independent": [[0.1, 0.2], [0.2, 0.2], [0.3, 0.4]],
        "mutual": [[0.3, 0.25], [0.5, 0.3], [0.45, 0.4]],
        "dkd": [[0.2, 0.1], [0.25, 0.3], [0.33, 0.41]],
        "ensemble-distill": [[0.2], [0.3], [0.5]],  # trains the first network only
    }
    runs = cohort_runs(tmp_path, top1, names)
    record = comparison_record(
        runs[0].config, runs, methods=list(top1), seeds=[0, 1, 2], cifar100=False
    )
    (cohort,) = record["cohorts"]
    found = {(s["of"], s["name"], s["method"]): s for s in cohort["summaries"]}

    def p_values(of: str, name: str, key: str) -> list[float | None]:
        compared = [found[of, name, method]["difference"]["top1"] for method in [*top1][1:]]
        return [difference[key] for difference in compared]

    for of, name, tests in (("architecture", "resnet8_cifar", 3), ("cohort", "cohort mean", 2)):
        raw = p_values(of, name, "p")
        assert sum(p is not None for p in raw) == tests
        assert p_values(of, name, "p_holm") == pytest.approx(holm(raw))
    # One network has neither a mean over different networks nor an ensemble.
    assert found["cohort", "cohort mean", "ensemble-distill"]["top1"]["n"] == 0
    assert found["ensemble", "ensemble", "ensemble-distill"]["top1"]["n"] == 0
    assert record["flags"]["independent"] == "--kl-weight 0" and record["flags"]["dkd"] == ""

    lines = [re.sub(" +", " ", line) for line in comparison_table(record, "github").splitlines()]
    assert lines[0].startswith("| method | n | resnet8 | resnet20 | ensemble |")
    assert lines[2].startswith("| independent | 3 | 20.00 | 26.67 | 20.00 | - | - | - |")
    assert lines[5] == "| ensemble-distill | 3 | 33.33 | - | - | - | - | - |"
    assert max(map(len, comparison_table(record, "github").splitlines())) <= 100


def test_equal_networks_have_no_row_twice(tmp_path: Path) -> None:
    top1 = {"independent": [[0.1, 0.2], [0.2, 0.2]], "mutual": [[0.3, 0.2], [0.5, 0.3]]}
    for names, rows in ((["resnet8-0", "resnet8-1"], 4), (["resnet8-0", "resnet20-0"], 4)):
        runs = cohort_runs(tmp_path, top1, names)
        given = {"methods": list(top1), "seeds": [0, 1], "cifar100": False}
        record = comparison_record(runs[0].config, runs, **given)
        lines = metric_table(record, "top1", 100).splitlines()[2:]
        assert len(lines) == len(top1) * rows  # the mean or both, the peers or their mean, all
        numbers = [line.split("|", 2)[2] for line in lines]
        assert ("mean of 2 resnet8" in lines[0]) == (names[0][:-2] == names[1][:-2]), numbers


@pytest.mark.parametrize(
    ("ranks", "target", "per_step"),
    [
        ([[0, 1], [0, 1], [0, 1]], "peers", 12),  # all three predict for all
        ([[0], [1], [2, 3]], "peers", 9 + 6),  # two in each process: of the others
        ([[0], [1], [2, 3]], "mean-logit-all", 9 + 9),
        ([[0], [1], [1]], "peers", 9 + 2 + 3),
    ],
    ids=str,
)
def test_passes_of_the_last_exchange_by_hand(
    tmp_path: Path, ranks: list[list[int]], target: str, per_step: int
) -> None:
    names = [f"resnet8-{place}" for place in range(3)]
    description = {
        "peers": [{"name": name} for name in names],
        "placement": {"ranks": dict(zip(names, ranks, strict=True))},
    }
    config = Config(batch_size=16, cohort=("resnet8*3",), exchange_every=50, target=target)
    run = Run(tmp_path, "", "x", config, description, {"steps": 50}, [])
    assert passes_per_image(run) == per_step


@pytest.mark.parametrize(
    ("changes", "peers", "frozen", "per_image", "per_step"),
    [
        ({}, 1, 0, 3, 3),
        ({}, 4, 0, 12, 12),  # a forward pass, and a backward pass that counts as two
        ({"kl_weight": 0.0, "update": "sequential"}, 3, 0, 9, 9),
        ({"update": "sequential"}, 3, 0, 11, 11),  # all but the last predict again
        ({"update": "official"}, 3, 0, 5, 15),  # three batches: 3 predict each, one learns
        ({"ema": 0.9, "teach_with": "ema"}, 2, 0, 8, 8),
        ({"frozen_peers": ("x",), "links": "frozen"}, 2, 3, 9, 9),
        ({"frozen_peers": ("x",), "kl_weight": 0.0}, 2, 3, 6, 6),
        ({"low_memory": True}, 2, 0, 8, 8),
        ({"burn_in": 20, "update": "sequential"}, 3, 0, 10.2, 10.2),  # 9 in 20 of 50 steps, then 11
        ({"exchange_every": 50, "burn_in": 25}, 4, 0, 14, 14),  # 12, then 4 weights teach
    ],
    ids=str,
)
def test_passes_by_hand(
    tmp_path: Path, changes: dict, peers: int, frozen: int, per_image: float, per_step: float
) -> None:
    names = [{"name": f"resnet8-{place}"} for place in range(peers)]
    teachers = {"frozen": {f"frozen-{place}": {"arch": "a"} for place in range(frozen)}}
    description = {"peers": names, "teachers": teachers}
    config = Config(batch_size=16, cohort=(f"resnet8*{peers}",), **changes)
    run = Run(tmp_path, "", "x", config, description, {"steps": 50}, [])
    assert passes_per_image(run) == per_image
    assert million_passes(run) == pytest.approx(per_step * 16 * 50 / 1e6)
    # Stages add up: a single network for 100 steps before.
    config = Config(batch_size=16, cohort=("resnet8",))
    first = Run(tmp_path, "", "x", config, {"peers": names[:1]}, {"steps": 100}, [])
    both = dataclasses.replace(run, earlier=(first,))
    assert million_passes(both) == pytest.approx((per_step * 50 + 3 * 100) * 16 / 1e6)
