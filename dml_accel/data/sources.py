"""Data sets: of the hub, a local folder, or scikit-learn's digits; listed, sized and read.

list_images  the images of a run before they are read
sized        the configuration with the size that suits them
read         the splits that a run trains and reports on
read_test    the split to report on
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dml_accel.core.config import (
    PHOTOGRAPH_SIZE,
    SMALL_IMAGES,
    SMALL_SIZE,
    ComputeConfig,
    Config,
    DataConfig,
)
from dml_accel.core.errors import UsageError
from dml_accel.core.tables import printable
from dml_accel.core.versions import require_packages
from dml_accel.data.augment import parse_augment
from dml_accel.data.catalogue import DIGITS, Listed, list_splits
from dml_accel.data.decode import decoded
from dml_accel.data.feeds import choose_feed, fits, into_memory, marked, when_needed
from dml_accel.data.listing import Listing
from dml_accel.data.memory import require_memory
from dml_accel.data.pictures import Damage, Pictures
from dml_accel.data.pixels import Geometry, to_rgb
from dml_accel.data.splits import Fingerprint, Split, SplitPrint, sha256
from dml_accel.data.survey import typical_size

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
        val: images of a validation split of its own; None if there is none.
        val_name: what that split is called.
        level_counts: see ``feeds.Fed``.
        feed: where images come from, and why; see ``feeds.choose_feed``.
        measured: mean and deviation that were measured before images broke; None to measure them.
        damage: see ``feeds.Fed``.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    fingerprint: Fingerprint | None = None
    grey_bits: int | None = None
    val: Split | None = None
    val_name: str | None = None
    level_counts: Tensor | None = None
    feed: tuple[str, str] = ("memory", "")
    damage: Sequence[Damage] = ()
    measured: tuple[tuple[float, ...], tuple[float, ...]] | None = None


def list_images(data: DataConfig, quiet: bool = False) -> Listed | None:
    """List the images that a run trains and reports on; None for those that have no files.

    Raises:
        UsageError: see ``read``.
    """
    parse_augment(data.augmentation)  # what cannot be done is refused before images are read
    if data.dataset == DIGITS:
        return None
    if data.train_split == data.test_split and not data.test_fraction:
        raise UsageError(
            f"--train-split and --test-split are both {data.train_split!r}: test images must not "
            "be training images; name two different splits"
        )
    return list_splits(data, ("train", "val", "test"), quiet)


def sized(
    config: Config, listed: Listed | None, wanted: int | None = None, quiet: bool = False
) -> Config:
    """Return the configuration with an image size, which follows from the images if it has none.

    Args:
        config: of the run.
        listed: its images.
        wanted: pixels per side for which its pretrained networks were made; None without any.
        quiet: do not say what was chosen.
    """
    if config.data.image_size is not None:
        return config
    found = typical_size(listed.splits["train"]) if listed else None
    if found is None or found[0] <= SMALL_IMAGES:
        return config.changed(image_size=SMALL_SIZE)
    size = wanted or PHOTOGRAPH_SIZE
    if not quiet:
        short, long = found
        why = "as its pretrained networks were trained with" if wanted else "as for photographs"
        print(
            f"images are about {long} x {short} pixels: --image-size {size}, {why}",
            file=sys.stderr,
        )
    if (resize := config.data.eval_resize) is not None and resize < size:
        raise UsageError(
            f"--eval-resize {resize} is below the {size} pixels that suit these images: give "
            f"--image-size, at most {resize}"
        )
    return config.changed(image_size=size)


def read(
    data: DataConfig,
    quiet: bool = False,
    listed: Listed | None = None,
    compute: ComputeConfig | None = None,
    before: Mapping[str, int] | None = None,
) -> Source:
    """Read a data set into memory, or get ready to read images when they are needed.

    Args:
        data: names the data set, its splits and columns, and the image size.
        quiet: show no progress, because another process does.
        listed: its images, if they were listed before.
        compute: the feed, and how many workers read (default: as by default).
        before: bytes that images had, by what they are called, before a run found them broken.

    Raises:
        UsageError: the data set cannot be reached, or a split, column, label, image or augmentation
            cannot be used.
    """
    compute = compute or ComputeConfig()
    listed = listed or list_images(data, quiet)
    if listed is None:
        if compute.feed == "loader":
            raise UsageError("--feed loader has no effect with --dataset digits: drop it")
        return _digits(data)
    feed = choose_feed(data, compute.feed, listed)
    feeds = {"memory": into_memory, "loader": when_needed}
    fed = feeds[feed[0]](data, listed, compute, quiet)
    splits, classes = fed.splits, listed.classes
    prints = {
        role: SplitPrint.of(
            one.labels,
            len(classes),
            fed.pixels[role],
            listing.identity(sizes=_sizes_before(listing, before or {})),
        )
        for (role, one), listing in zip(splits.items(), listed.splits.values(), strict=True)
    }
    if not quiet:
        _warn_of_classes(splits, classes)
        _warn_of_copies(fed.contents)
    return Source(
        splits["train"],
        splits["test"],
        classes,
        Fingerprint(classes, prints),
        fed.grey_bits,
        splits.get("val"),
        listed.splits["val"].split if "val" in splits else None,
        fed.level_counts,
        feed,
        fed.damage,
    )


def _sizes_before(listing: Listing, before: Mapping[str, int]) -> dict[int, int]:
    """Return the bytes that images had before they broke, by row; of those that are broken still.

    One that another image has replaced has its own size: a run does not resume on it.
    """
    if not before:
        return {}
    places = {printable(listing.place(row)): row for row in range(len(listing.labels))}
    rows = [places[place] for place in before if place in places]
    found = Pictures(listing, torch.tensor(rows, dtype=torch.int64), Geometry(8, 8))
    broken = [one for one in map(found.read, range(len(rows))) if isinstance(one, Damage)]
    return {one.row: before[one.place] for one in broken}


def read_test(
    data: DataConfig,
    geometry: Geometry,
    grey_bits: int | None = None,
    quiet: bool = False,
    compute: ComputeConfig | None = None,
) -> tuple[Split, tuple[str, ...], SplitPrint]:
    """Read only the split to report on: images, class names and what identifies them; see ``read``.

    Args:
        data: names the data set, its split and columns.
        geometry: how images become squares.
        grey_bits: of the images that the networks were trained on; see ``Source``.
        quiet: show no progress.
        compute: see ``read``.
    """
    compute = compute or ComputeConfig()
    if data.dataset == DIGITS:
        source = _digits(data, geometry)
        assert source.fingerprint
        return source.test, source.classes, source.fingerprint.splits["test"]
    listed = list_splits(data, ("test",), quiet)
    listing, classes = listed.splits["test"], listed.classes
    skips, labels = data.bad_images == "skip", listing.labels
    if fits(len(labels), geometry.size, compute.feed):
        require_memory(len(labels), geometry.size)
        found = decoded(
            listing,
            None,
            geometry,
            quiet,
            grey_bits,
            dataset=data.dataset,
            skips=skips,
            classes=classes,
            as_one=False,
        )
        split = Split(found.images, labels, unread=marked(found.unread, len(labels)))
        pixels: str | None = found.pixels
    else:
        split = Split(Pictures(listing, torch.arange(len(labels)), geometry, grey_bits), labels)
        pixels = None
    return split, classes, SplitPrint.of(labels, len(classes), pixels, listing.identity())


# ---------------------------------------------------------------- what a user should know


def _warn_of_classes(splits: Mapping[str, Split], classes: Sequence[str]) -> None:
    for role, split in (("train", "training"), ("test", "test")):
        counts = torch.bincount(splits[role].labels, minlength=len(classes))
        unseen = (counts == 0).nonzero()[:, 0].tolist()
        if unseen:
            some = ", ".join(repr(printable(classes[label])) for label in unseen[:5])
            some += ", ..." * (len(unseen) > 5)
            print(
                f"warning: {len(unseen)} of {len(classes)} classes have no {split} images: {some}",
                file=sys.stderr,
            )


def _warn_of_copies(contents: Mapping[str, Tensor]) -> None:
    """Say how many images of other splits are copies of training images, if they were read."""
    for role, others in contents.items():
        if role == "train" or "train" not in contents:
            continue
        copies = int(torch.isin(others, contents["train"]).sum())
        if copies:
            print(
                f"warning: {copies:,} of {len(others):,} {role} images are copies of training "
                "images, byte for byte",
                file=sys.stderr,
            )


def describe(data: DataConfig, source: Source) -> str:
    """Return in one line what was read: classes, images of each split, and their size."""
    shown = ", ".join(map(printable, source.classes[:_NAMED]))
    shown += ", ..." * (len(source.classes) > _NAMED)
    held = round(data.val_fraction * len(source.train))
    trained = data.train_limit or len(source.train) - held
    held = held or len(source.val or ())
    parts = [
        f"train {trained:,}",
        *([f"val {held:,}"] if held else []),
        f"test {len(source.test):,}",
    ]
    size = data.size
    return (
        f"{printable(data.dataset)}: {len(source.classes)} classes ({shown}); images: "
        f"{', '.join(parts)}, of {size} x {size} pixels{_fed(source)}"
    )


def _fed(source: Source) -> str:
    feed, why = source.feed
    if not why:
        return ""
    if feed == "memory":
        return f"; in memory: {why}"
    return f"; read when they are needed, {why} (dml-accel check-data finds bad ones at once)"


# ---------------------------------------------------------------- digits


def _digits(data: DataConfig, geometry: Geometry | None = None) -> Source:
    require_packages("--dataset digits", "scikit-learn:sklearn")
    names = ("image_column", "label_column", "dataset_config", "train_split", "test_split")
    for name in (*names, "val_split", "test_fraction"):
        if getattr(data, name) != getattr(DataConfig, name):
            raise UsageError(
                f"--{name.replace('_', '-')} has no effect with --dataset digits: drop it"
            )
    # One row an image: 8 x 8 pixels, stored as 0 ... 16, and the class.
    rows, geometry = np.loadtxt(_digits_file(), delimiter=","), geometry or Geometry.of(data)
    grey = np.rint(rows[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = torch.from_numpy(np.stack([to_rgb(Image.fromarray(g), geometry) for g in grey]))
    labels = torch.from_numpy(rows[:, -1]).long()
    cut = len(labels) - _DIGITS_TEST_ROWS
    train, test = Split(images[:cut], labels[:cut]), Split(images[cut:], labels[cut:])
    classes = tuple(map(str, range(10)))
    prints = {
        role: SplitPrint.of(one.labels, len(classes), sha256(one.held))
        for role, one in (("train", train), ("test", test))
    }
    return Source(train, test, classes, Fingerprint(classes, prints))


def _digits_file() -> Path:
    """Find the file without importing scikit-learn, which takes as long as importing torch."""
    found = find_spec("sklearn")
    assert found is not None and found.origin is not None
    path = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not path.is_file():
        raise UsageError(
            f"--dataset digits: {path} does not exist; reinstall scikit-learn, or name other images"
        )
    return path
