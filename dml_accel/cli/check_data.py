"""The command check-data: every image of a data set is read, and what was found is printed."""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.core.files import as_utf8
from dml_accel.core.flags import require
from dml_accel.core.tables import printable, table
from dml_accel.data.catalogue import DIGITS, Listed, list_splits
from dml_accel.data.checking import Checked, check
from dml_accel.data.pictures import Damage

_BAD_IMAGES = "bad-images.txt"
_SHOWN, _SHOWN_CLASSES, _SHOWN_KINDS = 5, 20, 8
_ROLES = ("train", "val", "test")


def run(values: dict[str, Any]) -> int:
    """Check a data set; return the exit code: 2 if an image cannot be read."""
    workers, to = values.pop("workers"), Path(values.pop("to") or _BAD_IMAGES)
    require(workers is None or workers >= 0, "workers", workers, "at least 0")
    data = Config(**values).data
    if data.dataset == DIGITS:
        raise UsageError("--dataset digits is part of scikit-learn: there are no files to check")
    if to.is_dir() or not to.parent.is_dir():
        raise UsageError(f"--to {to}: this is no file that can be written")
    listed = list_splits(data, _ROLES, quiet=False)
    with _list_of(to) as bad:
        found = {role: check(one, workers, bad.add) for role, one in listed.splits.items()}
    print(f"{printable(data.dataset)}: {len(listed.classes)} classes\n")
    print(_splits(listed, found))
    print(f"\n{_classes(listed)}")
    if bad.count:
        print("(images that cannot be read are counted as well)")
    _print_copies(listed, found)
    if not bad.count:
        print("\nevery image can be read")
        if to.exists():
            print(f"{to} is of an earlier check")
        return 0
    print(f"\n{bad.count:,} image{'s' * (bad.count > 1)} cannot be read:")
    for one in bad.first:
        print(f"  {one.place}: {one.reason}")
    if bad.count > len(bad.first):
        print("  ...")
    print(
        f"all are listed in {to}; repair or remove them, or train with --bad-images skip, which "
        "trains on the next image of the class in the place of each"
    )
    return 2


class _BadImages:
    """Images that cannot be read: all in a file, one a line, and the first few here."""

    def __init__(self, path: Path) -> None:
        self._path, self.count = path, 0
        self.first: list[Damage] = []
        self._file: IO[str] | None = None

    def add(self, one: Damage) -> None:
        """List another one; the first opens the file."""
        if self._file is None:
            self._file = open(self._path, "w", encoding="utf-8")  # noqa: SIM115
        self._file.write(as_utf8(f"{one.place}\t{one.reason}\n"))
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(one)

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            self._file.close()


@contextmanager
def _list_of(path: Path) -> Iterator[_BadImages]:
    bad = _BadImages(path)
    try:
        yield bad
    finally:
        bad.close()


def _splits(listed: Listed, found: Mapping[str, Checked]) -> str:
    rows = []
    for role, one in found.items():
        kinds = [f"{count:,} {printable(kind)}" for kind, count in one.kinds.most_common()]
        more = ["..."] * (len(kinds) > _SHOWN_KINDS)
        sides = ["-".join(map(str, side)) for side in one.sides()] or ["", ""]
        rows.append(
            [
                role,
                printable(listed.splits[role].split),
                ", ".join([*kinds[:_SHOWN_KINDS], *more]),
                f"{len(one.seen):,}",
                f"{one.unreadable:,}",
                *sides,
            ]
        )
    headers = ("split", "called", "formats", "images", "unreadable", "width", "height")
    shown = table(rows, headers, "simple", left=3)
    return f"{shown}\n(width and height in pixels: smallest-median-largest)"


def _classes(listed: Listed) -> str:
    """Return the images of each class, smallest classes of the training split first."""
    counts = {
        role: torch.bincount(one.labels[one.labels >= 0], minlength=len(listed.classes)).tolist()
        for role, one in listed.splits.items()
    }
    by_size = sorted(range(len(listed.classes)), key=lambda label: counts["train"][label])
    rows = [
        [printable(listed.classes[label]), *(f"{each[label]:,}" for each in counts.values())]
        for label in by_size[:_SHOWN_CLASSES]
    ]
    text = table(rows, ("class", *counts), "simple", left=1)
    left = [counts["train"][label] for label in by_size[_SHOWN_CLASSES:]]
    if left:
        text += f"\n... and {len(left):,} classes of {left[0]:,} to {left[-1]:,} training images"
    return text


def _print_copies(listed: Listed, found: Mapping[str, Checked]) -> None:
    lines = [
        f"{copies:,} images of {role} are copies of others of {role}, byte for byte"
        for role, one in found.items()
        if (copies := one.copies_within())
    ]
    for first, second in itertools.combinations(found, 2):
        copies = found[second].copies_of(found[first])
        if copies:
            total = len(found[second].seen)
            lines.append(
                f"{copies:,} of {total:,} images of {second} are copies of images of {first}, byte "
                "for byte"
            )
    print("\n" + ("\n".join(lines) or "no image is a copy of another"))
