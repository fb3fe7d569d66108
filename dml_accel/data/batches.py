"""Batches of images: order, crop, flip and normalisation by index arithmetic.

What is done to an image, in this order: crop and flip, the words of ``--augment`` that torchvision
applies image by image, normalisation, erasing; then ``--mixup`` or ``--cutmix`` of the batch.

Order and augmentation of image i in epoch e are keyed by (seed, e, i). They depend on no rank,
batch size, step or earlier draw, so none of it is ever saved. How a batch is mixed is keyed by
(seed, epoch, batch size).

Shape letters: N images, B rows of a batch, S pixels a side.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dml_accel.core.rng import generator, key
from dml_accel.data.augment import ImageTransform, erase, erasing_boxes
from dml_accel.data.mixing import Mix, Mixed, Mixing
from dml_accel.data.pictures import Damage
from dml_accel.data.splits import Split
from dml_accel.data.survey import level_counts

Request = tuple[int, int, int]  # step, lo and hi of ``ImageSet.batch``
_CHANNELS = 3
BYTES_PER_PIXEL = 4  # RGB and one unused byte: a pixel is one int32, gathered in one read


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
        return cls.from_counts(level_counts(images))

    @classmethod
    def from_counts(cls, counts: Tensor) -> "Normalisation":
        """Compute both exactly, from how often each level occurs, [3, 256]."""
        counts = counts.double()
        levels = torch.arange(counts.shape[1], dtype=torch.float64) / 255
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
        shape: of an image that is not [3, S, S].
    """

    size: int
    dtype: torch.dtype
    layout: torch.memory_format
    device: torch.device
    shape: tuple[int, ...] | None = None

    def zeros(self, rows: int) -> Tensor:
        """Return black images [rows, 3, S, S], or of ``shape``."""
        shape = (3, self.size, self.size) if self.shape is None else self.shape
        images = torch.zeros(rows, *shape, dtype=self.dtype, device=self.device)
        return images if len(shape) != 3 else images.contiguous(memory_format=self.layout)

    def noise(self, rows: int) -> Tensor:
        """Return random images of the same shape."""
        return self.zeros(rows).normal_()


def slices(rows: int, parts: int) -> list[tuple[int, int]]:
    """Cut ``rows`` rows into consecutive slices (lo, hi) whose sizes differ by at most one."""
    cuts = [rows * i // parts for i in range(parts + 1)]
    return list(itertools.pairwise(cuts))


@dataclass(frozen=True)
class Epoch:
    """What the key of an epoch decides.

    Attributes:
        number: from 0.
        order: of the images, [N] int64.
        draws: what augmentation needs for every image; see ``LevelSet``.
    """

    number: int
    order: Tensor
    draws: Any


class ImageSet:
    """One split on one device: images in an order keyed by the seed, and their labels.

    Subclasses say how images are read; all that is random in them is keyed by seed and epoch.

    Args:
        labels: class of each image, [N] int64; -1 marks one that must not be used.
        seed: keys the order.
        device: where batches are made.
        dtype: of the images in a batch.
        labelled: rows whose labels are used, int64; None for all.
        mixing: how batches are mixed; None if they are not.
        home: where images and labels are kept, if not on ``device``.

    Attributes:
        shape: of an image that is not [3, S, S]; None for those.
        waited: seconds for which ``batch`` has waited for images; None if they are in memory.
        damage: of images that were met and cannot be read, by row of their listing.
        meets_damage: whether a batch to come needs such an image, or an evaluation that is not to
            skip it.
    """

    shape: tuple[int, ...] | None = None
    waited: float | None = None
    meets_damage: bool = False

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
        self.damage: dict[int, Damage] = {}
        self._epochs = _Recent(self._draw_epoch)
        self._mixes = _Recent(self._draw_mixes)

    def __len__(self) -> int:
        return len(self._labels)

    def begin(self, batch_size: int, requests: Iterable[Request], per_step: int = 1) -> None:
        """Begin to read the images of the batches that will be asked for.

        Args:
            batch_size: rows of a whole batch.
            requests: step, ``lo`` and ``hi`` of each call of ``batch`` to come, in their order.
            per_step: how many of them an optimizer step makes.
        """

    def close(self) -> None:
        """End what ``begin`` has begun."""

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
        images, *partners = (
            self._augmented(*read) for read in self._reads(step, batch_size, lo, hi)
        )
        mix = self._mix(step, batch_size)
        if mix is not None:
            # Of a whole batch, the partners are there already.
            mix.apply(images, partners[0] if partners else images[self._send(mix.partners)])
        _, everything = self._batch_rows(step, batch_size)
        return images, self._send(self._labels[everything[lo:hi]])

    def _reads(
        self, step: int, batch_size: int, lo: int, hi: int
    ) -> Iterator[tuple[Tensor, Epoch]]:
        """Yield the rows that ``batch`` reads, and of a part of a mixed batch their partners."""
        epoch, everything = self._batch_rows(step, batch_size)
        yield everything[lo:hi], epoch
        mix = self._mix(step, batch_size)
        if mix is not None and hi - lo < batch_size:
            yield everything[mix.partners[lo:hi]], epoch

    def mixed(self, step: int, batch_size: int, lo: int, hi: int) -> Mixed | None:
        """Return the labels that the images of ``batch`` were mixed in with; None if with none."""
        mix = self._mix(step, batch_size)
        if mix is None:
            return None
        _, everything = self._batch_rows(step, batch_size)
        return Mixed(self._send(self._labels[everything[mix.partners[lo:hi]]]), mix.share)

    def label_weight(self, step: int, batch_size: int) -> Tensor | None:
        """Return rows of a batch divided by its labelled rows, on the device; 0 if it has none.

        None if all images are labelled.
        """
        if self._is_labelled is None:
            return None
        labelled = self._is_labelled[self._batch_rows(step, batch_size)[1]].sum()
        share = batch_size / labelled.clamp(min=1).to(self._dtype)
        return self._send(torch.where(labelled > 0, share, 0.0))

    def label_counts(self, classes: int) -> Tensor:
        """Return how many labels of each class may be used, [classes] int64."""
        counts = torch.zeros(classes, dtype=torch.int64, device=self._home)
        return counts.index_add_(0, self._labels.clamp(min=0), (self._labels >= 0).long())

    def in_order(self, bounds: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images from ``lo`` to ``hi`` of each of the bounds, as ``rows`` does."""
        for lo, hi in bounds:
            yield self.rows(lo, hi)

    def in_chunks(
        self, most: int, ours: Callable[[int], tuple[int, int]]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield all images to evaluate: how many there are in a chunk, our rows of it, and labels.

        Args:
            most: images of a chunk.
            ours: returns which rows of so many are ours.
        """
        counts = [min(most, len(self) - first) for first in range(0, len(self), most)]
        bounds = [
            (most * chunk + lo, most * chunk + hi)
            for chunk, (lo, hi) in enumerate(map(ours, counts))
        ]
        for count, (x, y) in zip(counts, self.in_order(bounds), strict=True):
            yield count, x, y

    def rows(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Return images ``lo`` to ``hi`` in stored order, not augmented, and their labels."""
        return self.at(torch.arange(lo, min(hi, len(self)), device=self._home))

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images at ``rows`` (int64) of the stored order, not augmented, and labels."""
        rows = rows.to(self._home)
        return self._plain(rows), self._send(self._labels[rows])

    def _batch_rows(self, step: int, batch_size: int) -> tuple[Epoch, Tensor]:
        """Return the epoch and the stored rows of a whole batch, where the images are kept."""
        epoch, index = divmod(step, len(self) // batch_size)
        found = self._epochs(epoch)
        return found, found.order[index * batch_size : (index + 1) * batch_size]

    def _draw_epoch(self, epoch: int) -> Epoch:
        # Keyed by seed and epoch, never by what was drawn before: a resumed run draws the same.
        generate = generator("order and augmentation", self._seed, epoch)
        # Copied once an epoch, so that no step waits for a copy to the device.
        order = torch.randperm(len(self), generator=generate).to(self._home)
        return Epoch(epoch, order, self._draw_augmentation(generate, epoch))

    def _mix(self, step: int, batch_size: int) -> Mix | None:
        """Return how a whole batch is mixed; None if it stays as it is."""
        if self._mixing is None:
            return None
        epoch, index = divmod(step, len(self) // batch_size)
        partners, shares = self._mixes(epoch, batch_size)
        share, box = shares[index]
        return Mix(partners[index], share, box) if share < 1 else None

    def _draw_mixes(self, epoch: int, batch_size: int) -> tuple[Tensor, list[Any]]:
        assert self._mixing is not None
        batches = len(self) // batch_size
        drawn = self._mixing.draw(self._seed, epoch, batches, batch_size, self._sides)
        return drawn[0].to(self._home), drawn[1]

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

    def _draw_augmentation(self, generate: torch.Generator, epoch: int) -> Any:
        """Draw what an epoch's augmentation needs, for every image; nothing here."""
        return None

    def _augmented(self, rows: Tensor, epoch: Epoch) -> Tensor:
        """Return the images of ``rows`` as an epoch's augmentation makes them."""
        return self._plain(rows)

    def _plain(self, rows: Tensor) -> Tensor:
        """Return the images of ``rows`` without augmentation."""
        raise NotImplementedError


class _Recent:
    """A function that keeps its last two results: who reads ahead is in the next epoch already."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._kept = function, dict[tuple[int, ...], Any]()

    def __call__(self, *arguments: int) -> Any:
        if arguments not in self._kept:
            if len(self._kept) > 1:
                del self._kept[min(self._kept)]
            self._kept[arguments] = self._function(*arguments)
        return self._kept[arguments]


@dataclass(frozen=True)
class Draws:
    """What is drawn for the images of a split in an epoch.

    Attributes:
        top: first row of the crop out of the padded image, [N] int64.
        left: its first column, [N] int64.
        flip: whether left and right change sides, [N] bool.
        boxes: what is erased, [4, N] int64; see ``augment.erasing_boxes``. None: nothing.
    """

    top: Tensor
    left: Tensor
    flip: Tensor
    boxes: Tensor | None


class LevelSet(ImageSet):
    """Images of 8-bit levels, augmented and normalised.

    Args:
        labels: class of each image, [N] int64.
        normalisation: what is subtracted and divided by.
        size: S, pixels per side.
        augment: words of ``--augment``; the crop is taken from the image padded by
            reflection with an eighth of its side (4 pixels at 32, as in the paper).
        memory_format: of the images in a batch.
        options: of ``ImageSet``: seed, device, dtype, labelled, mixing, home.

    Raises:
        UsageError: see ``augment.parse_augment``.
    """

    def __init__(
        self,
        labels: Tensor,
        normalisation: Normalisation,
        size: int,
        *,
        augment: tuple[str, ...],
        memory_format: torch.memory_format = torch.contiguous_format,
        **options: Any,
    ) -> None:
        self._transform = ImageTransform(augment, size)
        self._words = self._transform.arguments
        super().__init__(labels, **options)
        self._size, self._pad = size, size // 8
        shape = (_CHANNELS, 1, 1)
        mean = (torch.tensor(normalisation.mean, dtype=torch.float64) * 255).view(shape)
        scale = 1 / (torch.tensor(normalisation.std, dtype=torch.float64) * 255).view(shape)
        self._mean, self._scale = (t.to(self._dtype).to(self._device) for t in (mean, scale))
        self._memory_format = memory_format
        self._place = torch.arange(size, device=self._device)

    @property
    def _sides(self) -> tuple[int, int]:
        return self._size, self._size

    def _draw_augmentation(self, generate: torch.Generator, epoch: int) -> Draws:
        """Draw one crop and one flip for each image, whether they are used or not."""
        n = len(self)
        top, left = torch.randint(0, 2 * self._pad + 1, (2, n), generator=generate)
        flip = torch.rand(n, generator=generate) < 0.5
        if "crop" not in self._words:
            top, left = torch.full_like(top, self._pad), torch.full_like(left, self._pad)
        if "flip" not in self._words:
            flip = torch.zeros_like(flip)
        boxes = None
        if "erasing" in self._words:
            drawing = generator("erasing", self._seed, epoch)
            boxes = erasing_boxes(n, self._size, self._words["erasing"], drawing).to(self._home)
        top, left, flip = (drawn.to(self._home) for drawn in (top, left, flip))
        return Draws(top, left, flip, boxes)

    def _keys(self, rows: Sequence[int], epoch: int) -> list[int]:
        """Return what keys the words that are applied image by image."""
        return [key("augment", self._seed, epoch, row) for row in rows]

    def _augmented(self, rows: Tensor, epoch: Epoch) -> Tensor:
        images = self._normalised(self._levels(rows, epoch))
        if epoch.draws.boxes is not None:
            erase(images, self._send(epoch.draws.boxes[:, rows]), self._place)
        return images

    def _plain(self, rows: Tensor) -> Tensor:
        return self._normalised(self._levels(rows, None))

    def _levels(self, rows: Tensor, epoch: Epoch | None) -> Tensor:
        """Return levels [B, 3, S, S] uint8 where images are kept; None: without augmentation."""
        raise NotImplementedError

    def _normalised(self, levels: Tensor) -> Tensor:
        """Return levels [B, 3, S, S] as networks are given them, on the device."""
        if self._home != self._device:  # as they lie, because the device rearranges them faster
            if not levels.is_contiguous():
                levels = levels.contiguous(memory_format=torch.channels_last)
            levels = self._send(levels)
        # Dense before the conversion: normalising a view with holes takes three times as long.
        images = levels.contiguous(memory_format=self._memory_format).to(self._dtype)
        return images.sub_(self._mean).mul_(self._scale)


class PixelSet(LevelSet):
    """Decoded images in memory, cropped, flipped and normalised a batch at a time.

    With a word that works image by image, they stay in the memory of the host.

    Args:
        split: the decoded images.
        normalisation: what is subtracted and divided by.
        augment: words of ``--augment``.
        options: of ``LevelSet``.

    Raises:
        UsageError: see ``augment.parse_augment``.
    """

    def __init__(
        self,
        split: Split,
        normalisation: Normalisation,
        *,
        augment: tuple[str, ...],
        **options: Any,
    ) -> None:
        n, size = split.held.shape[:2]
        if ImageTransform(augment, size):
            options["home"] = torch.device("cpu")
        super().__init__(split.labels, normalisation, size, augment=augment, **options)
        pixels = torch.zeros(n, size, size, BYTES_PER_PIXEL, dtype=torch.uint8)
        pixels[..., :_CHANNELS] = split.held
        self._pixels = pixels.view(torch.int32).view(-1).to(self._home)
        self._windows = reflected_windows(size, self._pad).to(self._home)

    def _levels(self, rows: Tensor, epoch: Epoch | None) -> Tensor:
        if epoch is None:
            centre = self._windows[self._pad].expand(len(rows), -1)
            return self._gather(rows, centre, centre)
        draws: Draws = epoch.draws
        columns = self._windows[draws.left[rows]]
        columns = torch.where(draws.flip[rows][:, None], columns.flip(1), columns)
        levels = self._gather(rows, self._windows[draws.top[rows]], columns)
        if self._transform and len(rows):
            levels = self._transform.batch(levels, self._keys(rows.tolist(), epoch.number))
        return levels

    def _gather(self, rows: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
        """Read levels [B, 3, S, S] at heights ``ys`` [B, S] and columns ``xs`` [B, S]."""
        start = rows[:, None] * self._size**2 + ys * self._size
        flat = (start[:, :, None] + xs[:, None, :]).view(-1)
        pixels = self._pixels.index_select(0, flat).view(torch.uint8)
        pixels = pixels.view(len(rows), self._size, self._size, BYTES_PER_PIXEL)
        return pixels[..., :_CHANNELS].permute(0, 3, 1, 2)


class TensorSet(ImageSet):
    """Floating images of any shape as they are: shuffled, neither augmented nor normalised.

    Args:
        split: ``images`` [N, ...] floating; CutMix needs [N, C, H, W].
        options: of ``ImageSet``: seed, device, dtype, labelled, mixing.
    """

    def __init__(self, split: Split, **options: Any) -> None:
        super().__init__(split.labels, **options)
        self._images = split.held.to(self._device, self._dtype)
        self.shape = tuple(self._images.shape[1:])

    @property
    def _sides(self) -> tuple[int, int]:
        height, width = self._images.shape[2:] if self._images.ndim == 4 else (1, 1)
        return height, width

    def _plain(self, rows: Tensor) -> Tensor:
        return self._images[rows]


def reflected_windows(size: int, pad: int) -> Tensor:
    """Return the source coordinates of every crop offset, [2 pad + 1, S], edge not repeated."""
    place = torch.arange(-pad, size + pad).abs()
    place = torch.where(place >= size, 2 * (size - 1) - place, place)
    return place.unfold(0, size, 1).contiguous()
