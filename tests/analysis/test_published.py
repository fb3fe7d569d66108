"""Published results stand where they belong, with what differs."""

import pytest

from dml_accel.analysis.published import (
    all_published,
    is_cifar100,
    published_results,
)
from dml_accel.analysis.tables import all_published_table
from tests.helpers import ROOT

BOTH = ("independent", "mutual")


def found(nets: list[str], methods: tuple[str, ...] = BOTH) -> dict[str, list[tuple[float, ...]]]:
    rows: dict[str, list[tuple[float, ...]]] = {}
    for row in published_results(nets, methods):
        rows.setdefault(f"{row.source}, {row.method}", []).append(row.top1)
    return rows


def test_values_stand_in_our_order() -> None:
    rows = found(["resnet32", "wrn_28_10"])
    assert rows["paper, independent"] == [(68.99,), (78.69,)]
    assert rows["paper, mutual"] == [(70.73, 78.96)]  # the paper has them the other way round
    assert rows["pilsHan, sister repository, mutual"] == [(72.55, 80.09)]
    (paper,) = (row for row in published_results(["resnet32", "wrn_28_10"], ()) if row.unchecked)
    assert paper.numbers() == "70.73? / 78.96?"


@pytest.mark.parametrize(
    ("nets", "methods", "has", "lacks"),
    [
        # A cohort of the same networks, by whatever method.
        (["resnet32"] * 4, BOTH, "MCL, MCL", "paper, mutual"),
        # Whoever learns alone stands beside any cohort that has the network, if we train so, too.
        (["resnet32", "resnet20"], BOTH, "paper, independent", "PCL, mutual"),
        (
            ["resnet32"] * 2,
            ("distill",),
            "CRD, DKD, logit standardisation, distill",
            "paper, independ",
        ),
        # Of an unknown size: beside equal networks only.
        (["resnet32"] * 3, BOTH, "PCL, mutual", "CRD, DKD, logit standardisation, distill"),
    ],
    ids=str,
)
def test_results_stand_beside_those_of_the_same_networks(
    nets: list[str], methods: tuple[str, ...], has: str, lacks: str
) -> None:
    rows = found(nets, methods)
    assert has in rows and lacks not in rows


def test_networks_that_nobody_published_have_none() -> None:
    assert found(["resnet8", "resnet20"]) == {}


def test_every_row_says_what_differs_and_marks_only_its_own_values() -> None:
    for row in all_published():
        assert row.differs and row.unchecked <= set(row.top1) and len(row.nets) >= 1
        assert len(row.top1) in (1, len(row.nets))


def test_the_docs_have_the_whole_table() -> None:
    assert all_published_table() in (ROOT / "docs/results.md").read_text()


def test_cifar100_is_recognised_by_its_class_names() -> None:
    fine = ["apple", "aquarium_fish", "baby", "bear", "beaver", *map(str, range(95))]
    assert is_cifar100(fine)
    assert not is_cifar100(fine[:20]) and not is_cifar100(fine[::-1])
