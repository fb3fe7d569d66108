"""Decoded images with their labels, and what tells them from others.

Shape letters: N images of a split, M decoded ones, S pixels per side.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dml_accel.core.tables import printable

_NAMED = 5  # differences in one message


@dataclass(frozen=True)
class Split:
    """Images and labels.

    Attributes:
        images: [M, S, S, 3] uint8, in the order of ``decoded``.
        labels: [N] int64.
        decoded: the rows that ``images`` holds, ascending, [M] int64; None for all.
    """

    images: Tensor
    labels: Tensor
    decoded: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Tensor) -> "Split":
        """Return the given rows, shape [n] int64, in that order; they must be decoded."""
        places = rows if self.decoded is None else torch.searchsorted(self.decoded, rows)
        return Split(self.images[places], self.labels[rows])


def sha256(values: Tensor) -> str:
    """Return the sha256 of a tensor's values on the host."""
    return hashlib.sha256(values.contiguous().numpy().data).hexdigest()


@dataclass(frozen=True)
class SplitPrint:
    """What identifies the images and labels of a split.

    Attributes:
        images: how many.
        by_class: images of each class, in label order.
        pixels: sha256 of the decoded images.
        labels: sha256 of the labels.
    """

    images: int
    by_class: list[int]
    pixels: str
    labels: str

    @classmethod
    def of(cls, labels: Tensor, classes: int, pixels: str) -> "SplitPrint":
        """Compute it from labels [N], the number of classes, and the sha256 of the images."""
        counts = torch.bincount(labels, minlength=classes).tolist()
        return cls(len(labels), counts, pixels, sha256(labels))


@dataclass(frozen=True)
class Fingerprint:
    """What identifies the images that a run stands on: class names, labels and pixels.

    Attributes:
        classes: names, in label order.
        splits: by their role: ``train`` and ``test``.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, SplitPrint]

    def record(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        splits = {role: dict(vars(one)) for role, one in self.splits.items()}
        return {"classes": list(self.classes), "splits": splits}

    def difference(self, saved: Mapping[str, Any]) -> str:
        """Return in words how these images differ from recorded ones; empty if they do not.

        Args:
            saved: what ``record`` returned, from a file.
        """
        try:
            theirs = tuple(map(str, saved["classes"]))
            before = {role: SplitPrint(**one) for role, one in saved["splits"].items()}
            return "; ".join(self._differences(theirs, before))
        except (KeyError, TypeError, AttributeError, IndexError, ValueError):
            return "the record of its images cannot be read"

    def _differences(self, theirs: Sequence[str], before: Mapping[str, SplitPrint]) -> list[str]:
        found = []
        if theirs != self.classes:
            found.append(_other_classes(theirs, self.classes))
        for role, now in self.splits.items():
            then = before.get(role)
            if then is None or then == now:
                continue
            if then.images != now.images:
                found.append(f"the {role} split had {then.images:,} images, now {now.images:,}")
            moved = _other_counts(
                dict(zip(theirs, then.by_class, strict=True)),
                dict(zip(self.classes, now.by_class, strict=True)),
            )
            if moved:
                found.append(f"{role} images by class: {moved}")
            elif theirs != self.classes:
                continue  # their order is another one, and with it that of the images
            elif then.pixels != now.pixels:
                found.append(f"other images, or another order, in the {role} split")
            elif then.labels != now.labels:
                found.append(f"other labels in the {role} split")
        return found


def _other_classes(then: Sequence[str], now: Sequence[str]) -> str:
    gone = [name for name in then if name not in set(now)]
    new = [name for name in now if name not in set(then)]
    if not gone and not new:
        return "its classes had another order"
    return f"the classes were {_quoted(gone or then)}, now {_quoted(new or now)}"


def _other_counts(then: Mapping[str, int], now: Mapping[str, int]) -> str:
    """Return the classes of both whose number of images differs."""
    other = [name for name in then if name in now and then[name] != now[name]]
    words = [f"{printable(name)} {then[name]:,}, now {now[name]:,}" for name in other[:_NAMED]]
    return "; ".join(words) + "; ..." * (len(other) > _NAMED)


def _quoted(names: Sequence[str]) -> str:
    some = ", ".join(repr(printable(name)) for name in names[:_NAMED])
    return some + ", ..." * (len(names) > _NAMED)
