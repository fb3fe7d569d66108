"""A ``Dataset`` of the caller's: order and draws are ours, and workers read its items ahead.

``dataset[i]`` is called with the random states of torch, numpy and Python seeded by the run's seed,
the epoch and i. Its random transforms therefore draw the same in one process or in several, with
any number of workers, and in a run that resumes. For evaluation they are seeded by i alone.

Shape letters: N images, B rows of a batch.
"""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dml_accel.core.errors import UsageError
from dml_accel.core.rng import keeping_random_states, seed_random_states
from dml_accel.data.batches import Epoch, ImageSet, Request
from dml_accel.data.workers import Results, in_pieces, plan_flight

_FLOATING = "v2.ToDtype(torch.float32, scale=True)"


def image_problem(image: Any) -> str:
    """Return why an image of the caller's cannot be used, with the fix; empty if it can."""
    if isinstance(image, np.ndarray):
        return "is a numpy array; give a tensor: torch.from_numpy"
    if not isinstance(image, Tensor):
        fix = f"; v2.ToImage() and {_FLOATING} make one" if hasattr(image, "convert") else ""
        return f"is a {type(image).__name__}; it must be a floating tensor{fix}"
    if not image.is_floating_point():
        fix = f": {_FLOATING} of torchvision" if image.dtype == torch.uint8 else ""
        return f"is of {image.dtype}; it must be floating{fix}"
    if image.requires_grad:
        return "requires gradients: give image.detach()"
    return ""


def range_problem(label: int, classes: int) -> str:
    """Return why a label cannot be used; empty if it can."""
    if 0 <= label < classes:
        return ""
    return f"has label {label}; the networks have {classes} classes, 0 to {classes - 1}"


@dataclass(frozen=True)
class Piece:
    """Items that a worker reads: their rows, and the epoch, which is None for evaluation."""

    rows: tuple[int, ...]
    epoch: int | None


@dataclass(frozen=True)
class Loaded:
    """Items that were read.

    Attributes:
        images: [B, ...].
        labels: [B] int64.
        problem: why they cannot be used; empty if they can. In words, because an exception from a
            worker is many lines.
    """

    images: Tensor
    labels: Tensor
    problem: str = ""


@dataclass(frozen=True)
class Items:
    """A map-style data set, as ``Split.images``.

    Attributes:
        name: of the split, for messages.
        dataset: its items are pairs of an image and a label.
        shape: of an image.
        classes: how many there are.
    """

    name: str
    dataset: Any
    shape: tuple[int, ...]
    classes: int

    def image_set(self, labels: Tensor, workers: int, **options: Any) -> "ItemSet":
        """Return the set of images; see ``OwnImages``."""
        return ItemSet(self, labels, workers, **options)

    def read(self, row: int) -> tuple[Tensor, int]:
        """Return an item.

        Raises:
            UsageError: it is not a floating tensor of the right shape and a class.
        """
        image, label = read_item(self.name, self.dataset, row)
        problem = range_problem(label, self.classes)
        if image.shape != self.shape:
            problem = f"has the shape {list(image.shape)}, others {list(self.shape)}"
        if problem:
            raise UsageError(f"{self.name}[{row}] {problem}")
        return image, label


def read_item(name: str, dataset: Any, row: int) -> tuple[Tensor, int]:
    """Return an item of a data set, its label as a plain int.

    Raises:
        UsageError: it is not a pair of a floating tensor and an integer.
    """
    found = dataset[row]
    if not (isinstance(found, tuple | list) and len(found) == 2):
        raise UsageError(
            f"{name}[{row}] is a {type(found).__name__}; it must be a pair (image, label)"
        )
    image, label = found
    if problem := image_problem(image):
        raise UsageError(f"the image of {name}[{row}] {problem}")
    if isinstance(label, Tensor):
        label = label.numpy(force=True)
    if isinstance(label, np.ndarray | np.generic) and label.size == 1:
        label = label.item()
    if not isinstance(label, int):
        raise UsageError(f"the label of {name}[{row}] is {label!r}; it must be an integer, a class")
    return image, int(label)


class _Reader:
    """Reads the items of a piece; a function of the piece alone."""

    def __init__(self, items: Items, seed: int, dtype: torch.dtype) -> None:
        self._items, self._seed, self._dtype = items, seed, dtype

    def __call__(self, piece: Piece) -> Loaded:
        shape = (len(piece.rows), *self._items.shape)
        images = torch.empty(shape, dtype=self._dtype)
        labels = torch.empty(len(piece.rows), dtype=torch.int64)
        when = "evaluated" if piece.epoch is None else piece.epoch
        with keeping_random_states():
            for place, row in enumerate(piece.rows):
                seed_random_states("item", self._seed, when, row)
                try:
                    images[place], labels[place] = self._items.read(row)
                except UsageError as error:
                    return Loaded(images, labels, str(error))
        return Loaded(images, labels)


@dataclass
class _Reads:
    """Reads that workers work on, one after the other.

    Attributes:
        reader: what workers do.
        asked: rows and epoch of each read, read ahead.
        most: items of the largest read.
        item_bytes: of an image.
        workers: processes.
    """

    reader: _Reader
    asked: Iterable[tuple[Tensor, int | None]]
    most: int
    item_bytes: int
    workers: int
    _results: Results[Piece, Loaded] = field(init=False)

    def __post_init__(self) -> None:
        flight = plan_flight(self.most, self.item_bytes, self.workers)
        asked, announced = itertools.tee(self.asked)
        self._asked, self._size = asked, flight.piece
        self._results = Results(
            self.reader,
            (
                Piece(part, epoch)
                for rows, epoch in announced
                for part in in_pieces(rows.tolist(), flight.piece)
            ),
            workers=self.workers,
            ahead=flight.ahead,
        )

    def read(self, rows: Tensor, epoch: int | None) -> Loaded:
        """Return the next read, which is the given one."""
        announced, number = next(self._asked)
        assert number == epoch and torch.equal(announced, rows), "not as it was announced"
        parts = [next(self._results) for _ in range(-(-len(rows) // self._size))]
        for part in parts:
            if part.problem:
                raise UsageError(part.problem)
        if not parts:  # a slice of the last chunk may be empty
            return self.reader(Piece((), epoch))
        if len(parts) == 1:
            return parts[0]
        images, labels = ([getattr(part, name) for part in parts] for name in ("images", "labels"))
        return Loaded(torch.cat(images), torch.cat(labels))

    def close(self) -> None:
        """End the workers."""
        self._results.close()


class ItemSet(ImageSet):
    """The items of a data set, in an order that is keyed by seed and epoch.

    ``batch`` must be called as ``begin`` was told; without ``begin`` items are read in this
    process, when they are asked for.

    Args:
        items: the data set.
        labels: -1 for each item.
        workers: processes that read.
        options: of ``ImageSet``: seed, device, dtype.
    """

    def __init__(self, items: Items, labels: Tensor, workers: int, **options: Any) -> None:
        options["home"] = torch.device("cpu")
        super().__init__(labels, **options)
        self.shape, self.waited = items.shape, 0.0
        self._reader = _Reader(items, self._seed, self._dtype)
        number_bytes = torch.finfo(self._dtype).bits // 8
        self._item_bytes = number_bytes * int(np.prod(items.shape, dtype=np.int64))
        self._workers = workers
        self._reads_ahead: _Reads | None = None

    def begin(self, batch_size: int, requests: Iterable[Request], per_step: int = 1) -> None:
        """Begin to read the items of the batches that will be asked for."""
        self.close()
        asked = (
            (rows, epoch.number)
            for step, lo, hi in requests
            for rows, epoch in self._reads(step, batch_size, lo, hi)
        )
        self._reads_ahead = self._open(asked, batch_size, self._workers)

    def close(self) -> None:
        """End the workers."""
        if self._reads_ahead is not None:
            self._reads_ahead.close()
        self._reads_ahead = None

    def batch(self, step: int, batch_size: int, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Return rows ``lo`` to ``hi`` of the batch of a step: images [B, ...], labels [B]."""
        epoch, everything = self._batch_rows(step, batch_size)
        rows, begun = everything[lo:hi], time.perf_counter()
        if self._reads_ahead is None:
            found = self._read_here(rows, epoch)
        else:
            found = self._reads_ahead.read(rows, epoch.number)
        self.waited = (self.waited or 0.0) + time.perf_counter() - begun
        return self._send(found.images), self._send(found.labels)

    def in_order(self, bounds: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the items from ``lo`` to ``hi`` of each of the bounds, read ahead."""
        asked = [torch.arange(lo, min(hi, len(self))) for lo, hi in bounds]
        most = max((len(rows) for rows in asked), default=1)
        reads = self._open(((rows, None) for rows in asked), most, self._workers)
        try:
            for rows in asked:
                found = reads.read(rows, None)
                yield self._send(found.images), self._send(found.labels)
        finally:
            reads.close()

    def _read_here(self, rows: Tensor, epoch: Epoch) -> Loaded:
        return self._open([(rows, epoch.number)], len(rows), 0).read(rows, epoch.number)

    def _open(self, asked: Iterable[tuple[Tensor, int | None]], most: int, workers: int) -> _Reads:
        return _Reads(self._reader, asked, max(1, most), self._item_bytes, workers)
