"""The images of a run, as training and evaluation are given them.

check_batch_size  refuses a batch that is larger than the training split
prepare           the splits of a run on a device, normalised
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from dml_accel.core.config import DataConfig
from dml_accel.core.errors import UsageError
from dml_accel.data.batches import (
    BYTES_PER_PIXEL,
    ImageFormat,
    ImageSet,
    Normalisation,
    PixelSet,
    TensorSet,
)
from dml_accel.data.loader import LoaderSet
from dml_accel.data.mixing import Mixing
from dml_accel.data.pictures import Damage, Pictures
from dml_accel.data.selection import labelled_rows, training_rows, training_sizes
from dml_accel.data.sources import Source
from dml_accel.data.splits import Split
from dml_accel.data.survey import measured_rows

_LARGEST_SHARE = 4  # images take at most this part of a device's memory without being asked for


@dataclass(frozen=True)
class Data:
    """The images of a run; ``val`` is None without a validation split."""

    train: ImageSet
    val: ImageSet | None
    test: ImageSet
    classes: tuple[str, ...]
    normalisation: Normalisation

    @property
    def evaluated(self) -> list[ImageSet]:
        """The splits that are evaluated."""
        return [self.test] if self.val is None else [self.test, self.val]

    @property
    def damage(self) -> list[Damage]:
        """Images that were met up to now and cannot be read."""
        found = (one for images in (self.train, *self.evaluated) for one in images.damage.values())
        return list({one.place: one for one in found}.values())


@dataclass(frozen=True)
class Reading:
    """How one process reads images; the pixels do not depend on it.

    Attributes:
        workers: processes that decode images which are not in memory.
        images_on: ``--images-on``, of those that are.
        lookahead: steps before which images that cannot be read are known.
    """

    workers: int = 0
    images_on: str = "auto"
    lookahead: int = 1


def check_batch_size(source: Source, data: DataConfig, batch_size: int) -> None:
    """Refuse a batch of more images than there are to train on.

    Raises:
        UsageError: see above, and ``training_sizes``.
    """
    trained, _ = training_sizes(len(source.train), data)
    if batch_size > trained:
        raise UsageError(
            f"--batch-size {batch_size} is more than the {trained} training images; it must be at "
            f"most {trained}"
        )


def split_training(source: Source, data: DataConfig) -> tuple[Split, Split | None]:
    """Return the images to train on, and those for validation: cut off, or of their own split.

    Raises:
        UsageError: see ``training_sizes``.
    """
    rows, val = training_rows(source.train.labels, data)
    held = source.val if val is None else source.train.select(val)
    if len(rows) == len(source.train):
        return source.train, held
    return source.train.select(rows), held


def prepare(
    source: Source,
    data: DataConfig,
    seed: int,
    images: ImageFormat,
    reading: Reading | None = None,
) -> Data:
    """Split the images of ``source``, measure their mean and deviation, and put them on a device.

    Args:
        source: uint8 images; or floating ones and those of the caller's, which are neither
            augmented nor normalised.
        data: splits, augmentation and mixing; images that are evaluated have neither.
        seed: of the run.
        images: what the networks are given.
        reading: how they are read (default: in this process).

    Raises:
        UsageError: see ``training_sizes``.
    """
    reading = reading or Reading()
    train, val = split_training(source, data)
    normalisation = _normalisation(source, train, data)
    home = _home(source, images, reading.images_on)

    def image_set(split: Split, augment: tuple[str, ...] = (), **options: Any) -> ImageSet:
        options |= {"device": images.device, "dtype": images.dtype, "seed": seed}
        if isinstance(split.images, torch.Tensor) and split.images.is_floating_point():
            return TensorSet(split, **options)
        if not isinstance(split.images, torch.Tensor | Pictures):
            return split.images.image_set(split.labels, reading.workers, **options)
        options |= {"augment": augment, "memory_format": images.layout, "home": home}
        if isinstance(split.images, Pictures):
            return LoaderSet(
                split,
                normalisation,
                workers=reading.workers,
                lookahead=reading.lookahead,
                skips=data.bad_images == "skip",
                **options,
            )
        return PixelSet(split, normalisation, **options)

    def evaluated(split: Split) -> ImageSet:
        return image_set(dataclasses.replace(split, labels=split.counted()))

    labelled = labelled_rows(train.labels, data.labelled_fraction, seed)
    return Data(
        image_set(train, data.augmentation, labelled=labelled, mixing=Mixing.of(data)),
        evaluated(val) if val else None,
        evaluated(source.test),
        source.classes,
        normalisation,
    )


def _normalisation(source: Source, train: Split, data: DataConfig) -> Normalisation:
    """Return what is subtracted and divided by: as given, else as measured."""
    if source.measured is not None:
        measured = Normalisation(*source.measured)
    elif source.level_counts is not None:
        measured = Normalisation.from_counts(source.level_counts)
    elif not isinstance(train.images, torch.Tensor) or train.held.is_floating_point():
        return Normalisation.identity()
    else:
        rows = measured_rows(len(train), train.held.shape[1])
        measured = Normalisation.of(train.held if rows is None else train.held[rows])
    return Normalisation(data.mean or measured.mean, data.std or measured.std)


def _home(source: Source, images: ImageFormat, images_on: str) -> torch.device | None:
    """Return where images that are in memory are kept; None for the device itself."""
    host = torch.device("cpu")
    if images_on == "host":
        return host
    if images_on == "device" or images.device.type != "cuda":
        return None
    splits = (source.train, source.val, source.test)
    held = [one.images for one in splits if one and isinstance(one.images, torch.Tensor)]
    needed = sum(len(one) for one in held) * images.size**2 * BYTES_PER_PIXEL
    has = torch.cuda.get_device_properties(images.device).total_memory
    return host if needed > has / _LARGEST_SHARE else None
