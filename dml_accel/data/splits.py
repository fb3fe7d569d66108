"""Images with their labels, and what tells them from others.

Shape letters: N images of a split, M decoded ones, S pixels per side.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dml_accel.core.tables import printable
from dml_accel.data.pictures import Pictures

_NAMED = 5  # differences in one message


class OwnImages(Protocol):
    """Images of the caller's that no array holds: a data set or batches, read when needed."""

    def image_set(self, labels: Tensor, workers: int, **options: Any) -> Any:
        """Return an ``ImageSet``.

        Args:
            labels: -1 for each image: they are read with the images.
            workers: processes that may read them.
            options: of ``ImageSet``.
        """


@dataclass(frozen=True)
class Split:
    """Images and labels.

    Attributes:
        images: [M, S, S, 3] uint8, in the order of ``decoded``; or what reads N images when they
            are needed.
        labels: [N] int64; -1 throughout where they are read with the images.
        decoded: the rows that ``images`` holds, ascending, [M] int64; None for all.
        unread: whether an image cannot be read, [N] bool; None if that is not known, or none is.
    """

    images: Tensor | Pictures | OwnImages
    labels: Tensor
    decoded: Tensor | None = None
    unread: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def held(self) -> Tensor:
        """The images, which are in memory."""
        assert isinstance(self.images, Tensor)
        return self.images

    def select(self, rows: Tensor) -> "Split":
        """Return the given rows, shape [n] int64, in that order; they must be decoded."""
        unread = None if self.unread is None else self.unread[rows]
        places = rows if self.decoded is None else torch.searchsorted(self.decoded, rows)
        assert isinstance(self.images, Tensor | Pictures), "others are used whole"
        if isinstance(self.images, Pictures):
            return Split(self.images.select(places), self.labels[rows], unread=unread)
        return Split(self.images[places], self.labels[rows], unread=unread)

    def counted(self) -> Tensor:
        """Return the labels with which images are evaluated: -1 for those that cannot be read."""
        return self.labels if self.unread is None else self.labels.masked_fill(self.unread, -1)


def sha256(values: Tensor) -> str:
    """Return the sha256 of a tensor's values on the host."""
    return hashlib.sha256(values.contiguous().numpy().data).hexdigest()


@dataclass(frozen=True)
class SplitPrint:
    """What identifies the images and labels of a split.

    Attributes:
        images: how many.
        by_class: images of each class, in label order.
        pixels: sha256 of the decoded images; None if they are read when they are needed.
        labels: sha256 of the labels.
        files: sha256 of the images' names and sizes; None if they have none, or in old records.
    """

    images: int
    by_class: list[int]
    pixels: str | None
    labels: str
    files: str | None = None

    @classmethod
    def of(
        cls, labels: Tensor, classes: int, pixels: str | None, files: str | None = None
    ) -> "SplitPrint":
        """Compute it from labels [N], the number of classes, and what identifies the images."""
        counts = torch.bincount(labels, minlength=classes).tolist()
        return cls(len(labels), counts, pixels, sha256(labels), files)

    def is_same(self, other: "SplitPrint") -> bool:
        """Whether another print is of the same images and labels."""
        counts = (self.images, self.by_class) == (other.images, other.by_class)
        return counts and self.labels == other.labels and self._same_images(other) is True

    def _same_images(self, other: "SplitPrint") -> bool | None:
        """Whether the images are the same; None if the two have nothing to compare."""
        if self.pixels is not None and other.pixels is not None:
            return self.pixels == other.pixels
        if self.files is not None and other.files is not None:
            return self.files == other.files
        return None


@dataclass(frozen=True)
class Fingerprint:
    """What identifies the images that a run stands on: class names, labels and pixels.

    Attributes:
        classes: names, in label order.
        splits: by their role: ``train``, ``test`` and ``val``.
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
            if then is None or now.is_same(then):
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
            elif now._same_images(then) is None:
                found.append(
                    f"the record of the {role} split has nothing that can be compared with --feed "
                    "loader: use --feed memory"
                )
            elif not now._same_images(then):
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
