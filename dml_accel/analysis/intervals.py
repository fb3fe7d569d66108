"""Means, deviations and Student intervals over seeds: the seed is the unit of everything here."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import scipy  # scipy.stats itself is imported where it is first used, which takes a second

CONFIDENCE = 0.95
_ROUNDING = 1e-12  # equal numbers may differ by so much after a subtraction


@dataclass(frozen=True)
class Summary:
    """A sample of one number per seed.

    Attributes:
        n: seeds.
        mean: None where a seed has no finite value, or there is no seed.
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
    """A paired difference; ``p`` is the two-sided paired t-test's, None where nothing varies."""

    p: float | None = None


def summarise(values: Sequence[float | None]) -> Summary:
    """Summarise one value per seed."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return Summary(len(values), None)
    mean = statistics.fmean(known)
    if len(known) < 2:
        return Summary(len(known), mean)
    sd = statistics.stdev(known)
    if sd <= _ROUNDING * max(map(abs, known)):
        return Summary(len(known), mean, 0.0, mean, mean)
    low, high = scipy.stats.t.interval(
        CONFIDENCE, len(known) - 1, loc=mean, scale=scipy.stats.sem(known)
    )
    return Summary(len(known), mean, sd, float(low), float(high))


def paired_difference(
    values: Mapping[int, float | None], baseline: Mapping[int, float | None]
) -> Difference:
    """Summarise ``values`` less ``baseline`` over the seeds that both have."""
    seeds = sorted(values.keys() & baseline.keys())
    pairs = [(values[seed], baseline[seed]) for seed in seeds]
    differences = [None if a is None or b is None else a - b for a, b in pairs]
    found = summarise(differences)
    p = None
    if found.sd:
        p = float(scipy.stats.ttest_rel(*zip(*pairs, strict=True)).pvalue)
    return Difference(found.n, found.mean, found.sd, found.low, found.high, p)
