"""Published results on CIFAR-100, from ``published.csv``. No torch here."""

import csv
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

CIFAR100_TRAINING_IMAGES = 50_000
_CIFAR100_CLASSES = 100
_FIRST_CLASSES = ("apple", "aquarium_fish", "baby", "bear", "beaver")
_ALONE = ("independent", "distill")  # by these, a network learns nothing from those beside it


def is_cifar100(classes: Sequence[str]) -> bool:
    """Whether these are the names of CIFAR-100's fine classes."""
    return len(classes) == _CIFAR100_CLASSES and tuple(classes[:5]) == _FIRST_CLASSES


@dataclass(frozen=True)
class Published:
    """A published top-1 accuracy on CIFAR-100.

    Attributes:
        source: who published it.
        method: as ``compare --methods`` calls it, or as the source does if there is none.
        nets: the networks of the cohort; a single one where the size of the cohort is unknown, or
            does not matter.
        top1: in percent, of each network, or one number for all.
        n: runs; None if unknown.
        differs: what is known to differ from a run of ours by the paper's recipe.
        unchecked: values that could not be compared with the text of the source.
    """

    source: str
    method: str
    nets: tuple[str, ...]
    top1: tuple[float, ...]
    n: int | None = None
    differs: str = ""
    unchecked: frozenset[float] = frozenset()

    def is_about(self, nets: Sequence[str], methods: Sequence[str]) -> bool:
        """Whether it stands beside the results of these networks by these methods."""
        if len(self.nets) > 1 or sorted(self.nets) == sorted(nets):
            return sorted(self.nets) == sorted(nets)
        others = set(nets) - set(self.nets)
        alone = self.method in _ALONE and len(others) < len(set(nets))
        return self.method in methods and (alone or not others)

    def in_order(self, nets: Sequence[str]) -> "Published":
        """Return the same result with the networks in the order of ``nets``, if it has them all."""
        if len(self.nets) != len(nets) or len(self.top1) != len(nets):
            return self
        # Sorting is stable: the first of two equal networks stays the first.
        places = sorted(range(len(nets)), key=lambda place: self.nets[place])
        ours = sorted(range(len(nets)), key=lambda place: nets[place])
        top1 = dict(zip(ours, (self.top1[place] for place in places), strict=True))
        return replace(self, nets=tuple(nets), top1=tuple(top1[at] for at in range(len(nets))))

    @property
    def cohort(self) -> str:
        """The networks in words."""
        count = {net: self.nets.count(net) for net in self.nets}
        return " + ".join(net if n == 1 else f"{n} x {net}" for net, n in count.items())

    def numbers(self) -> str:
        """Return its values in words; those that could not be checked have a question mark."""
        return " / ".join(f"{one:.2f}" + "?" * (one in self.unchecked) for one in self.top1)


@functools.cache
def all_published() -> tuple[Published, ...]:
    """Return all published results that we know, from ``published.csv``."""
    with open(Path(__file__).with_name("published.csv"), newline="", encoding="utf-8") as file:
        return tuple(
            Published(
                row["source"],
                row["method"],
                tuple(row["nets"].split()),
                tuple(map(float, row["top1"].split())),
                int(row["n"]) if row["n"] else None,
                row["differs"],
                frozenset(map(float, row["unchecked"].split())),
            )
            for row in csv.DictReader(file)
        )


def published_results(nets: Sequence[str], methods: Sequence[str]) -> list[Published]:
    """Return all published results of these networks by these methods, in their order.

    Results of the same cohort are returned whatever their method is.
    """
    return [row.in_order(nets) for row in all_published() if row.is_about(nets, methods)]
