"""Images that workers read, decode and cut while the networks compute; the pixels of ``PixelSet``.

A worker does for an image all that depends on its pixels alone: decoding, its square or its
original, crop, flip, and the words of ``--augment`` that torchvision applies image by image. What a
batch is made of, and all draws, are decided in the training process, which normalises, erases and
mixes as it does with images in memory.

Shape letters: B rows of a batch, S pixels a side.
"""

import itertools
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dml_accel.core.config import DataConfig
from dml_accel.core.rng import generator
from dml_accel.data.augment import ImageTransform
from dml_accel.data.batches import (
    Draws,
    Epoch,
    LevelSet,
    Normalisation,
    Request,
    reflected_windows,
)
from dml_accel.data.catalogue import Listed
from dml_accel.data.decode import DamagedImagesError
from dml_accel.data.pictures import Damage, Picture, Pictures
from dml_accel.data.pixels import Geometry
from dml_accel.data.splits import Split
from dml_accel.data.workers import Flight, Results, in_pieces, plan_flight

_CHANNELS = 3
_TIMED = 64  # images


@dataclass(frozen=True)
class Piece:
    """Images that a worker cuts.

    Attributes:
        places: of the images in their split.
        crops: first row and column of each, in the padded image; None: without augmentation.
        flips: whether left and right change sides.
        keys: of each image, for what torchvision draws.
    """

    places: tuple[int, ...]
    crops: Sequence[tuple[int, int]] | None = None
    flips: Sequence[bool] = ()
    keys: Sequence[int] = ()


@dataclass(frozen=True)
class Cut:
    """What a worker makes of a piece.

    Attributes:
        levels: [b, 3, S, S] uint8, in the layout that they were made in: torchvision's is plane by
            plane, others lie pixel by pixel; 0 for images that cannot be read.
        bad: places in the piece of those.
        damage: all that cannot be read, stood in for or not.
    """

    levels: Tensor
    bad: tuple[int, ...] = ()
    damage: tuple[Damage, ...] = ()


class Cutter:
    """Reads and cuts the images of a piece; a function of the piece alone.

    Args:
        pictures: of the split.
        augment: words of ``--augment``.
    """

    def __init__(self, pictures: Pictures, augment: Sequence[str]) -> None:
        self._pictures, self._size = pictures, pictures.geometry.size
        self._transform = ImageTransform(augment, self._size)
        self._whole = "random-resized-crop" in self._transform.arguments
        self._windows = reflected_windows(self._size, self._size // 8)

    def __call__(self, piece: Piece) -> Cut:
        """Return the images of a piece."""
        size = self._size
        moves = piece.crops is not None and bool(self._transform)
        shape = (len(piece.places), _CHANNELS, size, size)
        levels = torch.zeros(shape, dtype=torch.uint8)
        if not moves:
            levels = levels.contiguous(memory_format=torch.channels_last)
        bad: list[int] = []
        damage: list[Damage] = []
        whole = self._whole and piece.crops is not None
        images: list[tuple[int, Tensor]] = []
        for index, place in enumerate(piece.places):
            found = self._pictures.read(place, whole)
            if isinstance(found, Picture) and found.damage and piece.crops is None:
                found = found.damage[0]  # no other image is evaluated in its place
            if isinstance(found, Picture):
                damage += found.damage
                images.append((index, self._moved(found.levels, piece, index)))
            else:
                damage.append(found)
                bad.append(index)
        made = [image for _, image in images]
        if moves:
            made = self._transform.each(made, [piece.keys[index] for index, _ in images])
        for (index, _), image in zip(images, made, strict=True):
            levels[index] = image
        return Cut(levels, tuple(bad), tuple(damage))

    def _moved(self, levels: np.ndarray, piece: Piece, index: int) -> Tensor:
        """Return an image cropped and flipped, in memory of its own, [3, H, W]."""
        image = torch.from_numpy(np.array(levels))
        if piece.crops is not None:
            if not self._whole:
                top, left = piece.crops[index]
                image = image[self._windows[top]].index_select(1, self._windows[left])
            image = image.flip(1) if piece.flips[index] else image
        return image.permute(2, 0, 1)


@dataclass
class Read:
    """The images of one read of ``ImageSet``, put together.

    Attributes:
        rows: of the stored order, [B] int64.
        epoch: whose augmentation they have; None for none.
        levels: [B, 3, S, S] uint8.
        bad: places in the read of images that cannot be read.
        damage: what was found out about images that cannot be read.
    """

    rows: Tensor
    epoch: int | None
    levels: Tensor
    bad: list[int] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)


class LoaderSet(LevelSet):
    """Images that are read when they are needed.

    ``batch`` must be called as ``begin`` was told; without ``begin`` images are read in this
    process, when they are asked for.

    Args:
        split: whose images are ``Pictures``.
        normalisation: what is subtracted and divided by.
        augment: words of ``--augment``.
        workers: processes that read.
        skips: whether images that cannot be read are left out of evaluations; else they are refused
            when they are met.
        lookahead: reads that are complete before they are needed, so that images that cannot be
            read are known some batches before.
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
        workers: int,
        skips: bool = False,
        lookahead: int = 1,
        **options: Any,
    ) -> None:
        assert isinstance(split.images, Pictures)
        size = split.images.geometry.size
        options["home"] = torch.device("cpu")
        super().__init__(split.labels, normalisation, size, augment=augment, **options)
        self._cutter = Cutter(split.images, augment)
        self._workers, self._skips, self._lookahead = workers, skips, lookahead
        self._stream: _Stream | None = None
        self._ready: deque[Read] = deque()
        self._ahead = 0
        self.waited = 0.0

    def begin(self, batch_size: int, requests: Iterable[Request], per_step: int = 1) -> None:
        """Begin to read the images of the batches that will be asked for."""
        self.close()
        self._stream = self._open(self._to_come(batch_size, requests), batch_size, self._workers)
        # Of a part of a mixed batch, the partners are another read.
        self._ahead = self._lookahead * per_step * (2 if self._mixing else 1)
        self._look_ahead()

    def close(self) -> None:
        """End the workers."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None
        self._ready.clear()

    def in_order(self, bounds: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images from ``lo`` to ``hi`` of each of the bounds, read ahead."""
        asked = [torch.arange(lo, min(hi, len(self))) for lo, hi in bounds]
        most = max((len(rows) for rows in asked), default=1)
        stream = self._open(((rows, None) for rows in asked), most, self._workers)
        try:
            while read := stream.read():
                self.damage |= {one.row: one for one in read.damage}
                # Who evaluates refuses it, in all processes at once.
                self.meets_damage |= bool(read.bad) and not self._skips
                yield self._evaluated(read)
        finally:
            stream.close()

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images at ``rows`` (int64) of the stored order, not augmented, and labels."""
        read = self._read_here(rows, None)
        self._note(read)
        return self._evaluated(read)

    def _evaluated(self, read: Read) -> tuple[Tensor, Tensor]:
        labels = self._labels[read.rows]
        labels[read.bad] = -1
        return self._normalised(read.levels), self._send(labels)

    def _to_come(
        self, batch_size: int, requests: Iterable[Request]
    ) -> Iterator[tuple[Tensor, Epoch | None]]:
        for step, lo, hi in requests:
            yield from self._reads(step, batch_size, lo, hi)

    def _open(
        self, reads: Iterable[tuple[Tensor, Epoch | None]], most: int, workers: int
    ) -> "_Stream":
        """Begin with reads of at most so many images."""
        flight = plan_flight(most, self._size**2 * _CHANNELS, workers)
        asked = ((rows, self._pieces(rows, epoch, flight.piece), epoch) for rows, epoch in reads)
        return _Stream(self._cutter, asked, flight, self._size, workers, self._is_pinned)

    @property
    def _is_pinned(self) -> bool:
        return self._device.type == "cuda"

    def _levels(self, rows: Tensor, epoch: Epoch | None) -> Tensor:
        read = self._read_here(rows, epoch) if self._stream is None else self._next()
        number = None if epoch is None else epoch.number
        assert read.epoch == number and torch.equal(read.rows, rows), "not as it was announced"
        self._note(read)
        return read.levels

    def _next(self) -> Read:
        """Return the next read; some more are put together before."""
        begun = time.perf_counter()
        read = self._ready.popleft()
        self._look_ahead()
        self.waited = (self.waited or 0.0) + time.perf_counter() - begun
        return read

    def _look_ahead(self) -> None:
        """Put the next reads together; a step knows before it whether it can be taken."""
        assert self._stream is not None
        while len(self._ready) < self._ahead and (read := self._stream.read()):
            self._ready.append(read)
            self.damage |= {one.row: one for one in read.damage}
            self.meets_damage |= bool(read.bad)

    def _note(self, read: Read) -> None:
        """Remember what cannot be read, and refuse it unless it is skipped."""
        self.damage |= {one.row: one for one in read.damage}
        if read.bad and not self._skips:
            raise DamagedImagesError(read.damage)

    def _read_here(self, rows: Tensor, epoch: Epoch | None) -> Read:
        read = self._open([(rows, epoch)], len(rows), 0).read()
        assert read is not None
        return read

    def _pieces(self, rows: Tensor, epoch: Epoch | None, size: int) -> list[Piece]:
        """Return what workers are told, in plain numbers, ``size`` images at a time."""
        if epoch is None:
            return [Piece(places) for places in in_pieces(rows.tolist(), size)]
        draws: Draws = epoch.draws
        return [
            Piece(
                tuple(part.tolist()),
                list(zip(draws.top[part].tolist(), draws.left[part].tolist(), strict=True)),
                draws.flip[part].tolist(),
                self._keys(part.tolist(), epoch.number) if self._transform else (),
            )
            for part in rows.split(size)
        ]


class _Stream:
    """Reads that workers work on, one after the other.

    Args:
        cutter: what workers do.
        asked: rows, pieces and epoch of each read, read ahead.
        flight: how pieces are handed to workers.
        size: S.
        workers: processes.
        pinned: whether reads are put together in pinned memory.
    """

    def __init__(
        self,
        cutter: Cutter,
        asked: Iterable[tuple[Tensor, list[Piece], Epoch | None]],
        flight: Flight,
        size: int,
        workers: int,
        pinned: bool,
    ) -> None:
        self._size, self._pinned = size, pinned
        self._asked, announced = itertools.tee(asked)
        self._results = Results(
            cutter,
            (piece for _, pieces, _ in announced for piece in pieces),
            workers=workers,
            ahead=flight.ahead,
        )

    def read(self) -> Read | None:
        """Return the next read; None after the last."""
        found = next(self._asked, None)
        if found is None:
            return None
        rows, pieces, epoch = found
        shape = (len(rows), _CHANNELS, self._size, self._size)
        levels = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)
        read = Read(rows, None if epoch is None else epoch.number, levels)
        lo = 0
        for _ in pieces:
            cut = next(self._results)
            if not lo and not cut.levels.is_contiguous():  # the first piece has the layout of all
                lines = read.levels.view(len(rows), self._size, self._size, _CHANNELS)
                read.levels = lines.permute(0, 3, 1, 2)
            read.levels[lo : lo + len(cut.levels)] = cut.levels
            read.bad += [lo + place for place in cut.bad]
            read.damage += cut.damage
            lo += len(cut.levels)
        return read

    def close(self) -> None:
        """End the workers."""
        self._results.close()


def plain_reads(pictures: Pictures, rows: int, workers: int) -> Iterator[Read]:
    """Yield all images of a split in their order, not augmented, ``rows`` at a time, read ahead."""
    size = pictures.geometry.size
    flight = plan_flight(rows, size**2 * _CHANNELS, workers)
    asked: Iterator[tuple[Tensor, list[Piece], Epoch | None]] = (
        (lot, [Piece(one) for one in in_pieces(lot.tolist(), flight.piece)], None)
        for lot in torch.arange(len(pictures)).split(rows)
    )
    stream = _Stream(Cutter(pictures, ()), asked, flight, size, workers, pinned=False)
    try:
        while read := stream.read():
            yield read
    finally:
        stream.close()


def seconds_to_decode(data: DataConfig, listed: Listed) -> float:
    """Return how long one core takes to read and cut a training image; the median of some.

    Args:
        data: how images are cut.
        listed: the images.
    """
    listing = listed.splits["train"]
    some = torch.randperm(len(listing.labels), generator=generator("timed images"))[:_TIMED]
    cutter = Cutter(Pictures(listing, some, Geometry.of(data)), data.augmentation)
    seconds, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for place in range(len(some)):
            begun = time.perf_counter()
            cutter(Piece((place,), [(0, 0)], [bool(place % 2)], [place]))
            seconds.append(time.perf_counter() - begun)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(seconds)
