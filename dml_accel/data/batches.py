"""Images in memory; crop, flip and normalisation of a whole batch by index arithmetic.

Order and augmentation of image i in epoch e are keyed by (seed, e, i): they depend on no rank,
batch size, step or earlier draw, so nothing of them is ever saved.

Shape letters: N images, B rows of a batch, S pixels a side.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dml_accel.core.config import Config, UsageError
from dml_accel.core.rng import generator, stratified
from dml_accel.data.decode import Split
from dml_accel.data.sources import Source
from dml_accel.distributed.launch import launched_precision

_CHANNELS = 3
_BYTES_PER_PIXEL = 4  # RGB and one unused byte: a pixel is one int32, gathered in one read


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and standard deviation of the training images, on the [0, 1] scale."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

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


class ImageSet:
    """One split on one device, ready to be cut into batches.

    Args:
        split: the decoded images.
        normalisation: what is subtracted and divided by.
        augment: ``crop-flip``, ``crop`` or ``none``; the crop is taken from the image padded by
            reflection with an eighth of its side (4 pixels at 32, as in the paper).
        seed: the run's seed.
        device: where batches are made.
        dtype: of the images in a batch.
        labelled: rows whose labels are used, int64; None for all.
        memory_format: of the images in a batch.
    """

    def __init__(
        self,
        split: Split,
        normalisation: Normalisation,
        *,
        augment: str,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        labelled: Tensor | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        n, size = split.images.shape[:2]
        pixels = torch.zeros(n, size, size, _BYTES_PER_PIXEL, dtype=torch.uint8)
        pixels[..., :_CHANNELS] = split.images
        self._pixels = pixels.view(torch.int32).view(-1).to(device)
        self._set_labels(split.labels, labelled, device)
        self._size, self._pad = size, size // 8
        self._augment, self._seed, self._dtype = augment, seed, dtype
        self._windows = _reflected_windows(size, self._pad).to(device)
        shape = (_CHANNELS, 1, 1)
        self._mean = (torch.tensor(normalisation.mean, dtype=torch.float64) * 255).view(shape)
        self._scale = 1 / (torch.tensor(normalisation.std, dtype=torch.float64) * 255).view(shape)
        self._mean = self._mean.to(dtype).to(device)
        self._scale = self._scale.to(dtype).to(device)
        self._memory_format = memory_format

    def _set_labels(self, labels: Tensor, labelled: Tensor | None, device: torch.device) -> None:
        self._labels = labels.to(device).clone()
        self._is_labelled: Tensor | None = None
        if labelled is not None:
            is_labelled = torch.zeros(len(labels), dtype=torch.bool)
            is_labelled[labelled] = True
            self._is_labelled = is_labelled.to(device)
            self._labels[~self._is_labelled] = -1
        self._device, self._epoch = device, -1

    def __len__(self) -> int:
        return len(self._labels)

    def batch(self, step: int, batch_size: int, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Return rows ``lo`` to ``hi`` of the augmented batch that optimizer step ``step`` uses.

        Args:
            step: optimizer steps taken before this one; with N // batch_size steps an epoch.
            batch_size: rows of the whole batch.
            lo: first row wanted.
            hi: one past the last row wanted, at most ``batch_size``.

        Returns:
            images [hi - lo, 3, S, S] and labels [hi - lo], -1 where a label is not to be used.
        """
        rows = self._rows_of(step, batch_size)[lo:hi]
        top, left, flip = (drawn[rows] for drawn in self._draws)
        columns = self._windows[left]
        columns = torch.where(flip[:, None], columns.flip(1), columns)
        return self._gather(rows, self._windows[top], columns)

    def label_weight(self, step: int, batch_size: int) -> Tensor | None:
        """Return rows of a batch over labelled rows of it, on the device (0 for no labelled ones).

        None where all images are labelled.
        """
        if self._is_labelled is None:
            return None
        labelled = self._is_labelled[self._rows_of(step, batch_size)].sum()
        return torch.where(labelled > 0, batch_size / labelled.clamp(min=1).to(self._dtype), 0.0)

    def _rows_of(self, step: int, batch_size: int) -> Tensor:
        """Return the images of a whole batch, on the device, drawing its epoch's order."""
        per_epoch = len(self) // batch_size
        self._draw(step // per_epoch)
        start = (step % per_epoch) * batch_size
        return self._order[start : start + batch_size]

    def rows(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Return images ``lo`` to ``hi`` in stored order, normalised and not augmented."""
        return self.at(torch.arange(lo, min(hi, len(self)), device=self._device))

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images at some places in stored order, int64, normalised and not augmented."""
        rows = rows.to(self._device)
        centre = self._windows[self._pad].expand(len(rows), -1)
        return self._gather(rows, centre, centre)

    def _draw(self, epoch: int) -> None:
        """Draw the order of ``epoch`` and one crop and flip per image, unless at hand."""
        if self._epoch == epoch:
            return
        n, generate = len(self), generator("order and augmentation", self._seed, epoch)
        order = torch.randperm(n, generator=generate)
        top, left = torch.randint(0, 2 * self._pad + 1, (2, n), generator=generate)
        flip = torch.rand(n, generator=generate) < 0.5
        if self._augment == "none":
            top, left = torch.full_like(top, self._pad), torch.full_like(left, self._pad)
        if self._augment != "crop-flip":
            flip = torch.zeros_like(flip)
        # Once an epoch, so that no step waits for a copy.
        self._order, *draws = (drawn.to(self._device) for drawn in (order, top, left, flip))
        self._draws, self._epoch = draws, epoch

    def _gather(self, rows: Tensor, ys: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
        """Read pixels [B, S, S] at heights ``ys`` [B, S] and columns ``xs`` [B, S], normalised."""
        start = rows[:, None] * self._size**2 + ys * self._size
        flat = (start[:, :, None] + xs[:, None, :]).view(-1)
        pixels = self._pixels.index_select(0, flat).view(torch.uint8)
        pixels = pixels.view(len(rows), self._size, self._size, _BYTES_PER_PIXEL)
        images = pixels[..., :_CHANNELS].permute(0, 3, 1, 2)
        # Dense before the conversion: normalising a view with holes takes three times as long.
        images = images.contiguous(memory_format=self._memory_format).to(self._dtype)
        return images.sub_(self._mean).mul_(self._scale), self._labels[rows]


def _reflected_windows(size: int, pad: int) -> Tensor:
    """Return the source coordinates of every crop offset, [2 pad + 1, S], edge not repeated."""
    place = torch.arange(-pad, size + pad).abs()
    place = torch.where(place >= size, 2 * (size - 1) - place, place)
    return place.unfold(0, size, 1).contiguous()


@dataclass(frozen=True)
class Data:
    """What a run reads: ``val`` is None where no validation split was asked for."""

    train: ImageSet
    val: ImageSet | None
    test: ImageSet
    classes: tuple[str, ...]
    normalisation: Normalisation


def memory_format(config: Config, device: torch.device) -> torch.memory_format:
    """Return how images and weights lie in memory.

    On a CPU channels last is 15 to 30% faster in single and half precision for all networks of
    ours. But torch's batch norm then adds up one number after the other, and in single precision
    the sums of a whole batch come out 60 times less exact; in half precision that is below the
    rounding. In double precision depthwise convolutions are half as fast. GPUs were not measured.
    """
    default = device.type == "cpu" and launched_precision(config) == "bf16"
    asked = config.memory_format or ("channels_last" if default else "contiguous")
    return torch.channels_last if asked == "channels_last" else torch.contiguous_format


def lay_weights(module: nn.Module, layout: torch.memory_format) -> None:
    """Let a network's weights lie in memory as its images do, in place."""
    for weight in module.parameters():
        if weight.dim() == 4:  # what the formats are for
            weight.data = weight.data.contiguous(memory_format=layout)


def check_sizes(source: Source, config: Config) -> tuple[int, int]:
    """Return how many images are trained on, and how many are held out to choose by.

    Raises:
        UsageError: a fraction, the limit or a batch does not fit the training images.
    """
    total, held = len(source.train), round(config.val_fraction * len(source.train))
    if config.val_fraction and not 0 < held < total:
        raise UsageError(
            f"--val-fraction {config.val_fraction} of {total} images is {held}; "
            "both parts need images"
        )
    left = total - held
    if config.train_limit is not None and config.train_limit > left:
        raise UsageError(
            f"--train-limit {config.train_limit} is more than the {left} training images"
        )
    trained = config.train_limit or left
    if round(config.labelled_fraction * trained) < 1:
        raise UsageError(
            f"--labelled-fraction {config.labelled_fraction} of {trained} images is none; at least "
            "one needs a label"
        )
    if config.batch_size > trained:
        raise UsageError(
            f"--batch-size {config.batch_size} is more than the {trained} training images; it must "
            f"be at most {trained}"
        )
    return trained, held


def held_out(source: Source, config: Config) -> tuple[Split, Split | None]:
    """Cut the training split into images to learn from and images to choose by.

    Both choices are stratified by class and do not depend on the run's seed, so that runs of
    several seeds can be compared; a smaller ``train_limit`` chooses a part of what a larger does.

    Raises:
        UsageError: see ``check_sizes``.
    """
    train, val = source.train, None
    trained, held = check_sizes(source, config)
    if held:
        chosen = torch.zeros(len(train), dtype=torch.bool)
        chosen[stratified(train.labels, held, "validation split")] = True
        val = train.select(chosen.nonzero()[:, 0])
        train = train.select((~chosen).nonzero()[:, 0])
    if trained < len(train):
        train = train.select(stratified(train.labels, trained, "training limit"))
    return train, val


def labelled_rows(train: Split, config: Config) -> Tensor | None:
    """Return the training images whose labels are used, int64; None for all."""
    if config.labelled_fraction == 1:
        return None
    count = round(config.labelled_fraction * len(train))
    return stratified(train.labels, count, "labelled images", config.seed)


def prepare(source: Source, config: Config, device: torch.device) -> Data:
    """Cut, measure and place the images of ``source`` on ``device``.

    Raises:
        UsageError: see ``check_sizes``.
    """
    train, val = held_out(source, config)
    normalisation = Normalisation.of(train.images)
    labelled = labelled_rows(train, config)

    def image_set(split: Split, labelled: Tensor | None = None) -> ImageSet:
        return ImageSet(
            split,
            normalisation,
            augment=config.augmentation,
            seed=config.seed,
            device=device,
            dtype=torch.float64 if config.float64 else torch.float32,
            labelled=labelled,
            memory_format=memory_format(config, device),
        )

    return Data(
        image_set(train, labelled),
        image_set(val) if val else None,
        image_set(source.test),
        source.classes,
        normalisation,
    )
