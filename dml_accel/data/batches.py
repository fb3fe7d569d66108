"""Batches cut from images in memory: order, crop, flip and normalisation by index arithmetic.

Order and augmentation of image i in epoch e are keyed by (seed, e, i). They depend on no rank,
batch size, step or earlier draw, so none of it is ever saved.

Shape letters: N images, B rows of a batch, S pixels a side.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dml_accel.core.config import DataConfig
from dml_accel.core.errors import UsageError
from dml_accel.core.rng import generator
from dml_accel.data.selection import labelled_rows, training_rows, training_sizes
from dml_accel.data.sources import Source
from dml_accel.data.splits import Split

_CHANNELS = 3
_BYTES_PER_PIXEL = 4  # RGB and one unused byte: a pixel is one int32, gathered in one read


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and standard deviation of the training images, on the [0, 1] scale."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def identity(cls) -> "Normalisation":
        """Return the normalisation that leaves images as they are."""
        return cls((0.0,) * _CHANNELS, (1.0,) * _CHANNELS)

    @classmethod
    def of(cls, images: Tensor) -> "Normalisation":
        """Compute both exactly, from counts of the 256 levels of images [N, S, S, 3] uint8."""
        counts = torch.zeros(_CHANNELS, 256, dtype=torch.float64)
        for chunk in images.reshape(-1, _CHANNELS).split(1 << 20):
            for channel in range(_CHANNELS):
                counts[channel] += torch.bincount(chunk[:, channel], minlength=256)
        levels = torch.arange(256, dtype=torch.float64) / 255
        share = counts / counts.sum(1, keepdim=True)
        mean = share @ levels
        std = (share * (levels - mean[:, None]) ** 2).sum(1).sqrt()
        # A constant channel carries nothing; dividing by 1 keeps it finite.
        return cls(tuple(mean.tolist()), tuple(s if s > 0 else 1.0 for s in std.tolist()))


@dataclass(frozen=True)
class ImageFormat:
    """The images that networks are given.

    Attributes:
        size: S, pixels per side.
        dtype: of images and parameters.
        layout: memory layout of images and weights.
        device: of both.
    """

    size: int
    dtype: torch.dtype
    layout: torch.memory_format
    device: torch.device

    def zeros(self, rows: int) -> Tensor:
        """Return black images [rows, 3, S, S]."""
        images = torch.zeros(rows, 3, self.size, self.size, dtype=self.dtype, device=self.device)
        return images.contiguous(memory_format=self.layout)

    def noise(self, rows: int) -> Tensor:
        """Return random images [rows, 3, S, S]."""
        return self.zeros(rows).normal_()


def slices(rows: int, parts: int) -> list[tuple[int, int]]:
    """Cut ``rows`` rows into consecutive slices (lo, hi) whose sizes differ by at most one."""
    cuts = [rows * i // parts for i in range(parts + 1)]
    return list(itertools.pairwise(cuts))


class ImageSet:
    """One split on one device: images in an order keyed by the seed, and their labels.

    Subclasses say how images are read; all that is random in them is keyed by seed and epoch.

    Args:
        labels: class of each image, [N] int64.
        seed: keys the order.
        device: where batches are made.
        dtype: of the images in a batch.
        labelled: rows whose labels are used, int64; None for all.
    """

    def __init__(
        self,
        labels: Tensor,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        labelled: Tensor | None = None,
    ) -> None:
        self._seed, self._device, self._dtype = seed, device, dtype
        self._labels = labels.to(device).clone()
        self._is_labelled: Tensor | None = None
        if labelled is not None:
            is_labelled = torch.zeros(len(labels), dtype=torch.bool)
            is_labelled[labelled] = True
            self._is_labelled = is_labelled.to(device)
            self._labels[~self._is_labelled] = -1
        self._epoch = -1  # the epoch whose order is at hand

    def __len__(self) -> int:
        return len(self._labels)

    def batch(self, step: int, batch_size: int, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Return rows ``lo`` to ``hi`` of the augmented batch of an optimizer step.

        Args:
            step: index of the batch, from 0; an epoch has N // batch_size of them.
            batch_size: rows of the whole batch.
            lo: first row wanted.
            hi: one past the last row wanted, at most ``batch_size``.

        Returns:
            images [hi - lo, 3, S, S] and labels [hi - lo]; -1 marks a label that must not be used.
        """
        rows = self._batch_rows(step, batch_size)[lo:hi]
        return self._augmented(rows), self._labels[rows]

    def label_weight(self, step: int, batch_size: int) -> Tensor | None:
        """Return rows of a batch divided by its labelled rows, on the device; 0 if it has none.

        None if all images are labelled.
        """
        if self._is_labelled is None:
            return None
        labelled = self._is_labelled[self._batch_rows(step, batch_size)].sum()
        return torch.where(labelled > 0, batch_size / labelled.clamp(min=1).to(self._dtype), 0.0)

    def rows(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Return images ``lo`` to ``hi`` in stored order, not augmented, and their labels."""
        return self.at(torch.arange(lo, min(hi, len(self)), device=self._device))

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images at ``rows`` (int64) of the stored order, not augmented, and labels."""
        rows = rows.to(self._device)
        return self._plain(rows), self._labels[rows]

    def _batch_rows(self, step: int, batch_size: int) -> Tensor:
        """Return the stored rows of a whole batch, on the device."""
        per_epoch = len(self) // batch_size
        epoch = step // per_epoch
        if self._epoch != epoch:
            # Keyed by seed and epoch, never by what was drawn before: a resumed run draws the same.
            generate = generator("order and augmentation", self._seed, epoch)
            # Copied once an epoch, so that no step waits for a copy to the device.
            self._order = torch.randperm(len(self), generator=generate).to(self._device)
            self._draw_augmentation(generate)
            self._epoch = epoch
        start = (step % per_epoch) * batch_size
        return self._order[start : start + batch_size]

    def _draw_augmentation(self, generate: torch.Generator) -> None:
        """Draw what an epoch's augmentation needs, for every image; none here."""

    def _augmented(self, rows: Tensor) -> Tensor:
        """Return the images of ``rows`` as this epoch's augmentation makes them."""
        return self._plain(rows)

    def _plain(self, rows: Tensor) -> Tensor:
        """Return the images of ``rows`` without augmentation."""
        raise NotImplementedError


class PixelSet(ImageSet):
    """Decoded images in memory, cropped, flipped and normalised a batch at a time.

    Args:
        split: the decoded images.
        normalisation: what is subtracted and divided by.
        augment: words of ``--augment``; the crop is taken from the image padded by
            reflection with an eighth of its side (4 pixels at 32, as in the paper).
        memory_format: of the images in a batch.
        options: of ``ImageSet``: seed, device, dtype, labelled.
    """

    def __init__(
        self,
        split: Split,
        normalisation: Normalisation,
        *,
        augment: tuple[str, ...],
        memory_format: torch.memory_format = torch.contiguous_format,
        **options: Any,
    ) -> None:
        super().__init__(split.labels, **options)
        n, size = split.images.shape[:2]
        pixels = torch.zeros(n, size, size, _BYTES_PER_PIXEL, dtype=torch.uint8)
        pixels[..., :_CHANNELS] = split.images
        self._pixels = pixels.view(torch.int32).view(-1).to(self._device)
        self._size, self._pad, self._augment = size, size // 8, augment
        self._windows = _reflected_windows(size, self._pad).to(self._device)
        shape = (_CHANNELS, 1, 1)
        mean = (torch.tensor(normalisation.mean, dtype=torch.float64) * 255).view(shape)
        scale = 1 / (torch.tensor(normalisation.std, dtype=torch.float64) * 255).view(shape)
        self._mean, self._scale = (t.to(self._dtype).to(self._device) for t in (mean, scale))
        self._memory_format = memory_format

    def _draw_augmentation(self, generate: torch.Generator) -> None:
        """Draw one crop and one flip for each image, whether they are used or not."""
        n = len(self)
        top, left = torch.randint(0, 2 * self._pad + 1, (2, n), generator=generate)
        flip = torch.rand(n, generator=generate) < 0.5
        if not {"crop", "crop-flip"} & set(self._augment):
            top, left = torch.full_like(top, self._pad), torch.full_like(left, self._pad)
        if not {"flip", "crop-flip"} & set(self._augment):
            flip = torch.zeros_like(flip)
        self._draws = [drawn.to(self._device) for drawn in (top, left, flip)]

    def _augmented(self, rows: Tensor) -> Tensor:
        top, left, flip = (drawn[rows] for drawn in self._draws)
        columns = self._windows[left]
        columns = torch.where(flip[:, None], columns.flip(1), columns)
        return self._gather(rows, self._windows[top], columns)

    def _plain(self, rows: Tensor) -> Tensor:
        centre = self._windows[self._pad].expand(len(rows), -1)
        return self._gather(rows, centre, centre)

    def _gather(self, rows: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
        """Read pixels [B, S, S] at heights ``ys`` [B, S] and columns ``xs`` [B, S], normalised."""
        start = rows[:, None] * self._size**2 + ys * self._size
        flat = (start[:, :, None] + xs[:, None, :]).view(-1)
        pixels = self._pixels.index_select(0, flat).view(torch.uint8)
        pixels = pixels.view(len(rows), self._size, self._size, _BYTES_PER_PIXEL)
        images = pixels[..., :_CHANNELS].permute(0, 3, 1, 2)
        # Dense before the conversion: normalising a view with holes takes three times as long.
        images = images.contiguous(memory_format=self._memory_format).to(self._dtype)
        return images.sub_(self._mean).mul_(self._scale)


class TensorSet(ImageSet):
    """Floating images of any shape as they are: shuffled, neither augmented nor normalised.

    Args:
        split: ``images`` [N, ...] floating.
        options: of ``ImageSet``: seed, device, dtype, labelled.
    """

    def __init__(self, split: Split, **options: Any) -> None:
        super().__init__(split.labels, **options)
        self._images = split.images.to(self._device, self._dtype)

    def _plain(self, rows: Tensor) -> Tensor:
        return self._images[rows]


def _reflected_windows(size: int, pad: int) -> Tensor:
    """Return the source coordinates of every crop offset, [2 pad + 1, S], edge not repeated."""
    place = torch.arange(-pad, size + pad).abs()
    place = torch.where(place >= size, 2 * (size - 1) - place, place)
    return place.unfold(0, size, 1).contiguous()


@dataclass(frozen=True)
class Data:
    """The images of a run; ``val`` is None without ``--val-fraction``."""

    train: ImageSet
    val: ImageSet | None
    test: ImageSet
    classes: tuple[str, ...]
    normalisation: Normalisation


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
    """Cut the training split into images to train on and images held out for validation.

    Raises:
        UsageError: see ``training_sizes``.
    """
    rows, val = training_rows(source.train.labels, data)
    held = None if val is None else source.train.select(val)
    if len(rows) == len(source.train):
        return source.train, held
    return source.train.select(rows), held


def prepare(source: Source, data: DataConfig, seed: int, images: ImageFormat) -> Data:
    """Split the images of ``source``, measure their mean and deviation, and put them on a device.

    Args:
        source: uint8 images; or floating ones, which are neither augmented nor normalised.
        data: splits and augmentation.
        seed: of the run.
        images: what the networks are given.

    Raises:
        UsageError: see ``training_sizes``.
    """
    train, val = split_training(source, data)
    floating = train.images.is_floating_point()
    normalisation = Normalisation.identity() if floating else Normalisation.of(train.images)

    def image_set(split: Split, labelled: Tensor | None = None) -> ImageSet:
        options: dict[str, Any] = {"device": images.device, "dtype": images.dtype}
        options |= {"seed": seed, "labelled": labelled}
        if floating:
            return TensorSet(split, **options)
        options |= {"augment": data.augmentation, "memory_format": images.layout}
        return PixelSet(split, normalisation, **options)

    return Data(
        image_set(train, labelled_rows(train.labels, data.labelled_fraction, seed)),
        image_set(val) if val else None,
        image_set(source.test),
        source.classes,
        normalisation,
    )
