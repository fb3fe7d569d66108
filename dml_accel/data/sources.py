"""Data sets: of the hub, a local folder, or scikit-learn's digits; read into memory.

read       the splits that a run trains and reports on
read_test  the split to report on
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dml_accel.core.config import DataConfig
from dml_accel.core.errors import UsageError
from dml_accel.core.tables import printable
from dml_accel.core.versions import require_packages
from dml_accel.data.augment import parse_augment
from dml_accel.data.cache import Decoded
from dml_accel.data.catalogue import DIGITS, list_splits
from dml_accel.data.decode import DamagedImagesError, decoded
from dml_accel.data.memory import require_memory
from dml_accel.data.pictures import Damage
from dml_accel.data.pixels import Geometry, to_rgb
from dml_accel.data.selection import decoded_rows
from dml_accel.data.splits import Fingerprint, Split, SplitPrint, sha256

_DIGITS_TEST_ROWS = 360
_NAMED = 6


@dataclass(frozen=True)
class Source:
    """A data set: the split to train on, the split to report on, and the class names.

    Attributes:
        train: its images are only those that the run needs; labels are all.
        test: all images.
        classes: names, in label order.
        fingerprint: what identifies all of this; None for tensors of the caller's.
        grey_bits: how many of 16 bits the grey images of the training split use; None if it has no
            such images.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    fingerprint: Fingerprint | None = None
    grey_bits: int | None = None


def read(data: DataConfig, quiet: bool = False) -> Source:
    """Read a whole data set into memory.

    Args:
        data: names the data set, its splits and columns, and the image size.
        quiet: show no progress, because another process does.

    Raises:
        UsageError: the data set cannot be reached, or a split, column, label, image or augmentation
            cannot be used.
    """
    parse_augment(data.augmentation)  # what cannot be done is refused before images are read
    if data.dataset == DIGITS:
        return _digits(data)
    if data.train_split == data.test_split and not data.test_fraction:
        raise UsageError(
            f"--train-split and --test-split are both {data.train_split!r}: test images must not "
            "be training images; name two different splits"
        )
    listed = list_splits(data, ("train", "test"), quiet)
    listings, classes = listed.splits, listed.classes
    rows = decoded_rows(listings["train"].labels, data)
    trained = len(listings["train"].labels) if rows is None else len(rows)
    require_memory(trained + len(listings["test"].labels), data.size)
    found: dict[str, Decoded] = {}
    damage: list[Damage] = []
    grey_bits = None
    for role in ("train", "test"):
        try:
            chosen = rows if role == "train" else None
            found[role] = decoded(listings[role], chosen, Geometry.of(data), quiet, grey_bits)
            grey_bits = found[role].grey_bits
        except DamagedImagesError as error:  # those of the other split are named as well
            damage += error.damage
    if damage:
        raise DamagedImagesError(damage)
    train = Split(found["train"].images, listings["train"].labels, rows)
    test = Split(found["test"].images, listings["test"].labels)
    prints = {
        role: SplitPrint.of(listings[role].labels, len(classes), one.pixels)
        for role, one in found.items()
    }
    if not quiet:
        _warn_of_classes(train.labels, test.labels, classes)
        _warn_of_copies(found["train"].contents, found["test"].contents)
    bits = found["train"].grey_bits
    return Source(train, test, classes, Fingerprint(classes, prints), bits)


def read_test(
    data: DataConfig, grey_bits: int | None = None, quiet: bool = False
) -> tuple[Split, tuple[str, ...], SplitPrint]:
    """Read only the split to report on: images, class names and what identifies them; see ``read``.

    Args:
        data: names the data set, its split and columns, and the image size.
        grey_bits: of the images that the networks were trained on; see ``Source``.
        quiet: show no progress.
    """
    if data.dataset == DIGITS:
        source = read(data, quiet)
        assert source.fingerprint
        return source.test, source.classes, source.fingerprint.splits["test"]
    listed = list_splits(data, ("test",), quiet)
    listings, classes = listed.splits, listed.classes
    labels = listings["test"].labels
    require_memory(len(labels), data.size)
    found = decoded(listings["test"], None, Geometry.of(data), quiet, grey_bits)
    identity = SplitPrint.of(labels, len(classes), found.pixels)
    return Split(found.images, labels), classes, identity


# ---------------------------------------------------------------- what a user should know


def _warn_of_classes(train: Tensor, test: Tensor, classes: Sequence[str]) -> None:
    for labels, split in ((train, "training"), (test, "test")):
        unseen = (torch.bincount(labels, minlength=len(classes)) == 0).nonzero()[:, 0].tolist()
        if unseen:
            some = ", ".join(repr(printable(classes[label])) for label in unseen[:5])
            some += ", ..." * (len(unseen) > 5)
            print(
                f"warning: {len(unseen)} of {len(classes)} classes have no {split} images: {some}",
                file=sys.stderr,
            )


def _warn_of_copies(train: Tensor, test: Tensor) -> None:
    copies = int(torch.isin(test, train).sum())
    if copies:
        print(
            f"warning: {copies:,} of {len(test):,} test images are copies of training images, byte "
            "for byte",
            file=sys.stderr,
        )


def describe(data: DataConfig, source: Source) -> str:
    """Return in one line what was read: classes, images of each split, and their size."""
    shown = ", ".join(map(printable, source.classes[:_NAMED]))
    shown += ", ..." * (len(source.classes) > _NAMED)
    held = round(data.val_fraction * len(source.train))
    trained = data.train_limit or len(source.train) - held
    parts = [
        f"train {trained:,}",
        *([f"val {held:,}"] if held else []),
        f"test {len(source.test):,}",
    ]
    size = data.size
    return (
        f"{printable(data.dataset)}: {len(source.classes)} classes ({shown}); images: "
        f"{', '.join(parts)}, of {size} x {size} pixels"
    )


# ---------------------------------------------------------------- digits


def _digits(data: DataConfig) -> Source:
    require_packages("--dataset digits", "scikit-learn:sklearn")
    names = ("image_column", "label_column", "dataset_config", "train_split", "test_split")
    for name in (*names, "test_fraction"):
        if getattr(data, name) != getattr(DataConfig, name):
            raise UsageError(
                f"--{name.replace('_', '-')} has no effect with --dataset digits: drop it"
            )
    from sklearn.datasets import load_digits

    bunch, geometry = load_digits(), Geometry.of(data)
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # stored as 0 ... 16
    images = torch.from_numpy(
        np.stack([to_rgb(Image.fromarray(g), geometry) for g in grey])
    )
    labels = torch.from_numpy(bunch.target).long()
    cut = len(labels) - _DIGITS_TEST_ROWS
    train, test = Split(images[:cut], labels[:cut]), Split(images[cut:], labels[cut:])
    classes = tuple(str(name) for name in bunch.target_names)
    prints = {
        role: SplitPrint.of(one.labels, len(classes), sha256(one.images))
        for role, one in (("train", train), ("test", test))
    }
    return Source(train, test, classes, Fingerprint(classes, prints))
