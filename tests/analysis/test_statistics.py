"""Statistics over seeds: by hand, against scipy, and by simulation."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dml_accel.analysis.runs import Run
from dml_accel.analysis.statistics import (
    loss_over_epochs,
    metric_over_epochs,
    paired_difference,
    summarise,
)
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
