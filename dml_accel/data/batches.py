"""Batches cut from images in memory: order, crop, flip and normalisation by index arithmetic.

What is done to an image, in this order: crop and flip, the words of ``--augment`` that torchvision
applies image by image, normalisation, erasing; then ``--mixup`` or ``--cutmix`` of the batch.

Order and augmentation of image i in epoch e are keyed by (seed, e, i). They depend on no rank,
batch size, step or earlier draw, so none of it is ever saved. How a batch is mixed is keyed by
(seed, epoch, batch size).

Shape letters: N images, B rows of a batch, S pixels a side.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dml_accel.core.config import DataConfig
from dml_accel.core.errors import UsageError
from dml_accel.core.rng import generator, key
from dml_accel.data.augment import ImageTransform, erase, erasing_boxes
from dml_accel.data.mixing import Mix, Mixed, Mixing
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
        mixing: how batches are mixed; None if they are not.
        home: where images and labels are kept, if not on ``device``.
    """

    def __init__(
        self,
        labels: Tensor,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        labelled: Tensor | None = None,
        mixing: Mixing | None = None,
        home: torch.device | None = None,
    ) -> None:
        self._seed, self._device, self._dtype = seed, device, dtype
        self._home, self._mixing = home or device, mixing
        self._labels = labels.to(self._home).clone()
        self._is_labelled: Tensor | None = None
        if labelled is not None:
            is_labelled = torch.zeros(len(labels), dtype=torch.bool)
            is_labelled[labelled] = True
            self._is_labelled = is_labelled.to(self._home)
            self._labels[~self._is_labelled] = -1
        self._epoch = -1  # the epoch whose order is at hand
        self._mixed_epoch = (-1, 0)  # the epoch and batch size whose mixing is at hand

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
            Where the batch is mixed, the images are, and ``mixed`` tells with what.
        """
        everything = self._batch_rows(step, batch_size)
        rows = everything[lo:hi]
        images = self._augmented(rows)
        mix = self._mix(step, batch_size)
        if mix is not None:
            if len(rows) == batch_size:  # the partners are there already
                partners = images[self._send(mix.partners)]
            else:
                partners = self._augmented(everything[mix.partners[lo:hi]])
            mix.apply(images, partners)
        return images, self._send(self._labels[rows])

    def mixed(self, step: int, batch_size: int, lo: int, hi: int) -> Mixed | None:
        """Return the labels that the images of ``batch`` were mixed in with; None if with none."""
        mix = self._mix(step, batch_size)
        if mix is None:
            return None
        partners = self._batch_rows(step, batch_size)[mix.partners[lo:hi]]
        return Mixed(self._send(self._labels[partners]), mix.share)

    def label_weight(self, step: int, batch_size: int) -> Tensor | None:
        """Return rows of a batch divided by its labelled rows, on the device; 0 if it has none.

        None if all images are labelled.
        """
        if self._is_labelled is None:
            return None
        labelled = self._is_labelled[self._batch_rows(step, batch_size)].sum()
        share = batch_size / labelled.clamp(min=1).to(self._dtype)
        return self._send(torch.where(labelled > 0, share, 0.0))

    def rows(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Return images ``lo`` to ``hi`` in stored order, not augmented, and their labels."""
        return self.at(torch.arange(lo, min(hi, len(self)), device=self._home))

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images at ``rows`` (int64) of the stored order, not augmented, and labels."""
        rows = rows.to(self._home)
        return self._plain(rows), self._send(self._labels[rows])

    def _batch_rows(self, step: int, batch_size: int) -> Tensor:
        """Return the stored rows of a whole batch, where the images are kept."""
        per_epoch = len(self) // batch_size
        epoch = step // per_epoch
        if self._epoch != epoch:
            # Keyed by seed and epoch, never by what was drawn before: a resumed run draws the same.
            generate = generator("order and augmentation", self._seed, epoch)
            # Copied once an epoch, so that no step waits for a copy to the device.
            self._order = torch.randperm(len(self), generator=generate).to(self._home)
            self._draw_augmentation(generate, epoch)
            self._epoch = epoch
        start = (step % per_epoch) * batch_size
        return self._order[start : start + batch_size]

    def _mix(self, step: int, batch_size: int) -> Mix | None:
        """Return how a whole batch is mixed; None if it stays as it is."""
        if self._mixing is None:
            return None
        batches = len(self) // batch_size
        epoch, index = divmod(step, batches)
        if self._mixed_epoch != (epoch, batch_size):
            drawn = self._mixing.draw(self._seed, epoch, batches, batch_size, self._sides)
            self._partners, self._shares = drawn[0].to(self._home), drawn[1]
            self._mixed_epoch = (epoch, batch_size)
        share, box = self._shares[index]
        return Mix(self._partners[index], share, box) if share < 1 else None

    @property
    def _sides(self) -> tuple[int, int]:
        """H and W of an image."""
        raise NotImplementedError

    def _send(self, values: Tensor) -> Tensor:
        """Return what was put together where images are kept, on the device."""
        if self._home == self._device:
            return values
        # From pinned memory the host goes on while the copy is under way.
        values = values.pin_memory() if self._device.type == "cuda" else values
        return values.to(self._device, non_blocking=True)

    def _draw_augmentation(self, generate: torch.Generator, epoch: int) -> None:
        """Draw what an epoch's augmentation needs, for every image; none here."""

    def _augmented(self, rows: Tensor) -> Tensor:
        """Return the images of ``rows`` as this epoch's augmentation makes them."""
        return self._plain(rows)

    def _plain(self, rows: Tensor) -> Tensor:
        """Return the images of ``rows`` without augmentation."""
        raise NotImplementedError


class PixelSet(ImageSet):
    """Decoded images in memory, cropped, flipped and normalised a batch at a time.

    With a word that works image by image, they stay in the memory of the host.

    Args:
        split: the decoded images.
        normalisation: what is subtracted and divided by.
        augment: words of ``--augment``; the crop is taken from the image padded by
            reflection with an eighth of its side (4 pixels at 32, as in the paper).
        memory_format: of the images in a batch.
        options: of ``ImageSet``: seed, device, dtype, labelled, mixing.

    Raises:
        UsageError: see ``augment.parse_augment``.
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
        n, size = split.images.shape[:2]
        self._transform = ImageTransform(augment, size)
        self._words = self._transform.arguments
        if self._transform:
            options["home"] = torch.device("cpu")
        super().__init__(split.labels, **options)
        pixels = torch.zeros(n, size, size, _BYTES_PER_PIXEL, dtype=torch.uint8)
        pixels[..., :_CHANNELS] = split.images
        self._pixels = pixels.view(torch.int32).view(-1).to(self._home)
        self._size, self._pad = size, size // 8
        self._windows = _reflected_windows(size, self._pad).to(self._home)
        shape = (_CHANNELS, 1, 1)
        mean = (torch.tensor(normalisation.mean, dtype=torch.float64) * 255).view(shape)
        scale = 1 / (torch.tensor(normalisation.std, dtype=torch.float64) * 255).view(shape)
        self._mean, self._scale = (t.to(self._dtype).to(self._device) for t in (mean, scale))
        self._memory_format = memory_format
        self._place = torch.arange(size, device=self._device)

    @property
    def _sides(self) -> tuple[int, int]:
        return self._size, self._size

    def _draw_augmentation(self, generate: torch.Generator, epoch: int) -> None:
        """Draw one crop and one flip for each image, whether they are used or not."""
        n = len(self)
        top, left = torch.randint(0, 2 * self._pad + 1, (2, n), generator=generate)
        flip = torch.rand(n, generator=generate) < 0.5
        if "crop" not in self._words:
            top, left = torch.full_like(top, self._pad), torch.full_like(left, self._pad)
        if "flip" not in self._words:
            flip = torch.zeros_like(flip)
        self._draws = [drawn.to(self._home) for drawn in (top, left, flip)]
        if "erasing" in self._words:
            drawing = generator("erasing", self._seed, epoch)
            boxes = erasing_boxes(n, self._size, self._words["erasing"], drawing)
            self._boxes = boxes.to(self._home)

    def _augmented(self, rows: Tensor) -> Tensor:
        top, left, flip = (drawn[rows] for drawn in self._draws)
        columns = self._windows[left]
        columns = torch.where(flip[:, None], columns.flip(1), columns)
        pixels = self._gather(rows, self._windows[top], columns)
        if self._transform and len(rows):
            keys = [key("augment", self._seed, self._epoch, row) for row in rows.tolist()]
            pixels = self._transform.batch(pixels, keys)
        images = self._normalised(pixels)
        if "erasing" in self._words:
            erase(images, self._send(self._boxes[:, rows]), self._place)
        return images

    def _plain(self, rows: Tensor) -> Tensor:
        centre = self._windows[self._pad].expand(len(rows), -1)
        return self._normalised(self._gather(rows, centre, centre))

    def _gather(self, rows: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
        """Read levels [B, 3, S, S] at heights ``ys`` [B, S] and columns ``xs`` [B, S]."""
        start = rows[:, None] * self._size**2 + ys * self._size
        flat = (start[:, :, None] + xs[:, None, :]).view(-1)
        pixels = self._pixels.index_select(0, flat).view(torch.uint8)
        pixels = pixels.view(len(rows), self._size, self._size, _BYTES_PER_PIXEL)
        return pixels[..., :_CHANNELS].permute(0, 3, 1, 2)

    def _normalised(self, pixels: Tensor) -> Tensor:
        """Return levels [B, 3, S, S] as networks are given them, on the device."""
        # Dense before the conversion: normalising a view with holes takes three times as long.
        images = self._send(pixels.contiguous(memory_format=self._memory_format)).to(self._dtype)
        return images.sub_(self._mean).mul_(self._scale)


class TensorSet(ImageSet):
    """Floating images of any shape as they are: shuffled, neither augmented nor normalised.

    Args:
        split: ``images`` [N, ...] floating; CutMix needs [N, C, H, W].
        options: of ``ImageSet``: seed, device, dtype, labelled, mixing.
    """

    def __init__(self, split: Split, **options: Any) -> None:
        super().__init__(split.labels, **options)
        self._images = split.images.to(self._device, self._dtype)

    @property
    def _sides(self) -> tuple[int, int]:
        height, width = self._images.shape[2:] if self._images.ndim == 4 else (1, 1)
        return height, width

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
        data: splits, augmentation and mixing; images that are evaluated have neither.
        seed: of the run.
        images: what the networks are given.

    Raises:
        UsageError: see ``training_sizes``.
    """
    train, val = split_training(source, data)
    floating = train.images.is_floating_point()
    normalisation = Normalisation.identity() if floating else Normalisation.of(train.images)

    def image_set(split: Split, augment: tuple[str, ...] = (), **options: Any) -> ImageSet:
        options |= {"device": images.device, "dtype": images.dtype, "seed": seed}
        if floating:
            return TensorSet(split, **options)
        options |= {"augment": augment, "memory_format": images.layout}
        return PixelSet(split, normalisation, **options)

    labelled = labelled_rows(train.labels, data.labelled_fraction, seed)
    return Data(
        image_set(train, data.augmentation, labelled=labelled, mixing=Mixing.of(data)),
        image_set(val) if val else None,
        image_set(source.test),
        source.classes,
        normalisation,
    )
