"""What others report for CIFAR-100, to stand beside our own numbers. Top-1 in percent."""

from collections.abc import Sequence
from dataclasses import dataclass

CIFAR100_TRAINING_IMAGES = 50_000
_CIFAR100_CLASSES = 100
_FIRST_CLASSES = ("apple", "aquarium_fish", "baby", "bear", "beaver")


@dataclass(frozen=True)
class Published:
    """One pair of networks in one source.

    Attributes:
        source: who reports it.
        nets: the two networks.
        independent: each alone.
        mutual: the same two, learning together.
        unchecked: values of these that could not be compared with the source's own text.
    """

    source: str
    nets: tuple[str, str]
    independent: tuple[float, float]
    mutual: tuple[float, float]
    unchecked: frozenset[float] = frozenset()

    def in_order(self, nets: Sequence[str]) -> "Published":
        """Return the same with the networks in the order of ``nets``."""
        if tuple(nets) == self.nets:
            return self
        return Published(
            self.source,
            self.nets[::-1],
            self.independent[::-1],
            self.mutual[::-1],
            self.unchecked,
        )


PAPER = "paper"
REFERENCE = "pilsHan/DML_for-personal-study"
_ALONE = {"resnet32": 68.99, "mobilenet": 73.65, "wrn_28_10": 78.69}
_CHECKED = frozenset({68.99, 78.69})


def _paper(first: str, second: str, *mutual: float) -> Published:
    """One row of Table 2 of Zhang et al., CVPR 2018."""
    alone = (_ALONE[first], _ALONE[second])
    unchecked = frozenset({*alone, *mutual}) - _CHECKED
    return Published(PAPER, (first, second), alone, (mutual[0], mutual[1]), unchecked)


TABLE_2 = (
    _paper("resnet32", "resnet32", 71.19, 70.75),
    _paper("wrn_28_10", "resnet32", 78.96, 70.73),
    _paper("mobilenet", "resnet32", 76.13, 71.10),
    _paper("mobilenet", "mobilenet", 76.21, 76.10),
    _paper("wrn_28_10", "mobilenet", 80.28, 77.39),
    _paper("wrn_28_10", "wrn_28_10", 80.28, 80.08),
)
_OTHERS = (
    Published(REFERENCE, ("resnet32", "resnet32"), (70.97, 70.97), (72.97, 72.85)),
    Published(REFERENCE, ("resnet32", "wrn_28_10"), (70.97, 79.93), (72.55, 80.09)),
)


def is_cifar100(classes: Sequence[str]) -> bool:
    """Whether these are the names of CIFAR-100's 100 fine classes."""
    return len(classes) == _CIFAR100_CLASSES and tuple(classes[:5]) == _FIRST_CLASSES


def published(nets: Sequence[str]) -> list[Published]:
    """Return what is reported for these networks, in their order."""
    rows = (*TABLE_2, *_OTHERS)
    return [row.in_order(nets) for row in rows if sorted(row.nets) == sorted(nets)]
