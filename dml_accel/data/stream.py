"""Batches of the caller's: a ``DataLoader``, or anything that yields (images, labels) again and
again. It is iterated as it is: its sampler, its workers and its ``collate_fn`` are its own.

What it draws is keyed: for each batch the random states of torch, numpy and Python, and the
generators that a ``DataLoader`` holds, are seeded by the run's seed, the epoch and the batch, and
put back afterwards. A run that resumes in the middle of an epoch reads the epoch again up to its
step. What keeps other state from one epoch to the next is not exact then; ``Batches.inexact`` says
what that is.

Shape letters: B rows of a batch.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from dml_accel.core.errors import UsageError
from dml_accel.core.rng import keeping_random_states, key, seed_random_states
from dml_accel.data.batches import ImageSet, Request
from dml_accel.data.items import image_problem, range_problem

# Samplers that keep nothing from one epoch to the next.
_SAMPLERS = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)


def read_batch(where: str, found: Any) -> tuple[Tensor, Tensor]:
    """Return images [B, ...] and labels [B] int64 of what the caller's iterable has yielded.

    Args:
        where: says which batch it is, for messages.
        found: the batch.

    Raises:
        UsageError: it is not a pair of floating images and integer labels.
    """
    if not (isinstance(found, tuple | list) and len(found) == 2):
        parts = f" of {len(found)}" if isinstance(found, tuple | list) else ""
        raise UsageError(
            f"{where} is a {type(found).__name__}{parts}; it must be a pair (images, labels): "
            "let its collate_fn return one"
        )
    images, labels = found
    if problem := image_problem(images):
        raise UsageError(f"in {where} the batch of images {problem}")
    if isinstance(labels, np.ndarray | list):
        labels = torch.as_tensor(labels)
    if not isinstance(labels, Tensor):
        raise UsageError(f"the labels of {where} are a {type(labels).__name__}, not a tensor")
    rows = len(images) if images.dim() else 0
    if labels.is_floating_point() or labels.is_complex() or labels.shape != (rows,) or not rows:
        fix = ""
        if labels.shape == (rows, 1):
            fix = ": labels[:, 0]"
        elif labels.dim() == 2 and len(labels) == rows:
            fix = ": labels.argmax(1)"
        elif labels.shape == (rows,):
            fix = ": labels.long()"
        raise UsageError(
            f"{where} has images {list(images.shape)} and labels {list(labels.shape)} of "
            f"{labels.dtype}; each image needs an integer label{fix}"
        )
    return images, labels.cpu().long()


@dataclass(frozen=True)
class Batches:
    """Batches of the caller's, as ``Split.images``.

    Attributes:
        name: of the split, for messages.
        source: yields the batches, each time it is iterated.
        per_epoch: batches of an epoch; None to read it to its end, as for evaluation.
        batch_size: rows of a training batch; of the others it may be anything.
        shape: of an image.
        classes: how many there are.
    """

    name: str
    source: Any
    per_epoch: int | None
    batch_size: int
    shape: tuple[int, ...]
    classes: int

    def image_set(self, labels: Tensor, workers: int, **options: Any) -> "BatchSet":
        """Return the set of images; see ``OwnImages``. The workers are those of the source."""
        return BatchSet(self, labels, **options)


class BatchSet(ImageSet):
    """Batches in the order in which they come.

    Args:
        batches: where they come from.
        labels: -1 for each image of an epoch.
        options: of ``ImageSet``: seed, device, dtype.
    """

    def __init__(self, batches: Batches, labels: Tensor, **options: Any) -> None:
        options["home"] = torch.device("cpu")
        super().__init__(labels, **options)
        self._batches, self.shape, self.waited = batches, batches.shape, 0.0
        self._generators = generators_of(batches.source)
        self.close()

    def begin(self, batch_size: int, requests: Iterable[Request], per_step: int = 1) -> None:
        """Begin anew: the epoch of the first batch is read again up to it."""
        self.close()

    def close(self) -> None:
        """End the iteration, and with it the workers of a ``DataLoader``."""
        self._epoch = self._read = -1
        self._iterator: _Keyed | None = None
        self._held: tuple[Tensor, Tensor] | None = None

    def batch(self, step: int, batch_size: int, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Return rows ``lo`` to ``hi`` of the batch of a step: images [B, ...], labels [B]."""
        per_epoch = self._batches.per_epoch
        assert per_epoch is not None, "batches that are trained on are counted"
        begun = time.perf_counter()
        epoch, index = divmod(step, per_epoch)
        if self._epoch != epoch or index < self._read:
            self.close()
            self._epoch, self._iterator = epoch, self._iterate(epoch)
        while self._read < index:
            self._read += 1
            self._held = self._next(epoch, self._read, checks=self._read == index)
        assert self._held is not None
        images, labels = (part[lo:hi] for part in self._held)
        self.waited = (self.waited or 0.0) + time.perf_counter() - begun
        return self._sent(images, labels)

    def _next(self, epoch: int, index: int, checks: bool) -> tuple[Tensor, Tensor] | None:
        """Return a batch of an epoch; None if it was taken already and is only passed over."""
        assert self._iterator is not None
        name, size = self._batches.name, self._batches.batch_size
        found = next(self._iterator, None)
        if found is None:
            raise UsageError(
                f"{name} ended after {index} batches of epoch {epoch + 1}, not "
                f"{self._batches.per_epoch}: each iteration must begin at the start and yield as "
                "many; steps_per_epoch= says how many are an epoch"
            )
        if not checks:
            return None
        images, labels = self._checked(found, f"batch {index + 1} of epoch {epoch + 1} of {name}")
        if len(images) != size:
            raise UsageError(
                f"batch {index + 1} of epoch {epoch + 1} of {name} has {len(images)} images, "
                f"others {size}: use drop_last=True, or give steps_per_epoch={index or 1}"
            )
        return images, labels

    def in_chunks(
        self, most: int, ours: Callable[[int], tuple[int, int]]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield all batches to evaluate, each as it comes; see ``ImageSet``."""
        name, count = self._batches.name, 0
        for found in itertools.islice(self._iterate("evaluated"), self._batches.per_epoch):
            count += 1
            images, labels = self._checked(found, f"batch {count} of {name}")
            lo, hi = ours(len(images))
            yield len(images), *self._sent(images[lo:hi], labels[lo:hi])
        if not count:
            raise UsageError(f"{name} has yielded no batch: it must begin anew when it is iterated")

    def _checked(self, found: Any, where: str) -> tuple[Tensor, Tensor]:
        images, labels = read_batch(where, found)
        shape, classes = self._batches.shape, self._batches.classes
        if images.shape[1:] != shape:
            raise UsageError(
                f"{where} has images {list(images.shape[1:])}, others are {list(shape)}"
            )
        for label in (int(labels.min()), int(labels.max())):
            if problem := range_problem(label, classes):
                raise UsageError(f"{where} {problem}")
        return images, labels

    def _sent(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if images.device.type == "cpu":
            return self._send(images.to(self._dtype)), self._send(labels)
        return images.to(self._device, self._dtype), self._send(labels)

    def _iterate(self, epoch: int | str) -> "_Keyed":
        return _Keyed(self._batches.source, self._generators, (self._seed, epoch))


class _Keyed:
    """An iteration over a source whose draws are keyed, and leave no trace.

    Args:
        source: what is iterated.
        generators: that it draws from, besides the states of torch, numpy and Python.
        parts: of the key.
    """

    def __init__(
        self, source: Any, generators: list[torch.Generator], parts: tuple[object, ...]
    ) -> None:
        self._generators, self._parts, self._count = generators, parts, 0
        # The seed that the caller has given a generator counts as well.
        self._states = [
            torch.Generator().manual_seed(key("batch", *parts, one.initial_seed())).get_state()
            for one in generators
        ]
        if hasattr(source, "sampler") and hasattr(source.sampler, "set_epoch"):
            source.sampler.set_epoch(parts[-1] if isinstance(parts[-1], int) else 0)
        with self.drawing():
            self._iterator = iter(source)

    def __iter__(self) -> "_Keyed":
        return self

    def __next__(self) -> Any:
        self._count += 1
        with self.drawing():
            return next(self._iterator)

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Within the context, all states are those of the next batch."""
        before = [one.get_state() for one in self._generators]
        with keeping_random_states():
            seed_random_states("batch", *self._parts, self._count)
            for one, state in zip(self._generators, self._states, strict=True):
                one.set_state(state)
            try:
                yield
            finally:
                self._states = [one.get_state() for one in self._generators]
                for one, state in zip(self._generators, before, strict=True):
                    one.set_state(state)


# ---------------------------------------------------------------- what a DataLoader is


def generators_of(source: Any) -> list[torch.Generator]:
    """Return the generators that a ``DataLoader`` and its samplers hold."""
    sampler, batch_sampler = (
        getattr(source, "sampler", None),
        getattr(source, "batch_sampler", None),
    )
    holders = (source, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(one, "generator", None) for one in holders)
    generators = {id(one): one for one in found if isinstance(one, torch.Generator)}
    return list(generators.values())


def first_batch(name: str, source: Any) -> tuple[Tensor, int]:
    """Return images of the first batch of a source, and its rows, without a trace in what it draws.

    Of a ``DataLoader`` with a sampler two images are read, and its workers are not started.

    Raises:
        UsageError: there is none, or it cannot be used.
    """
    keyed = _Keyed((), generators_of(source), ("first", name))
    with keyed.drawing():
        found, rows = _rows_of(source)
    if found is None:
        raise UsageError(f"{name} yields no batch")
    images, _ = read_batch(f"the first batch of {name}", found)
    return images[:2], rows or len(images)


def _rows_of(source: Any) -> tuple[Any, int]:
    """Return a batch or a part of it, and its rows, which are 0 if it is whole."""
    if not isinstance(source, DataLoader) or isinstance(source.dataset, IterableDataset):
        return next(iter(source), None), 0
    indices: Any = next(iter(source.batch_sampler or source.sampler), None)
    if indices is None:
        return None, 0
    if source.batch_sampler is None:
        return source.collate_fn(source.dataset[indices]), 0
    items = getattr(source.dataset, "__getitems__", None)
    indices = list(indices)
    some = indices[:2]
    rows = items(some) if items else [source.dataset[one] for one in some]
    return source.collate_fn(rows), len(indices)


def whole_batches(loader: "DataLoader[Any]") -> tuple[int, int, int] | None:
    """Return batch size, whole batches, and rows of the last partial one, of a ``DataLoader``.

    None if they cannot be told before it is read.
    """
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler:
        return None
    try:
        rows = len(batches.sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    if isinstance(loader.dataset, IterableDataset):
        return None
    whole, left = divmod(rows, batches.batch_size)
    return batches.batch_size, whole, 0 if batches.drop_last else left


def inexact(source: Any) -> list[str]:
    """Return what keeps a source from giving a resumed run the same batches, in words."""
    if not isinstance(source, DataLoader):
        return ["its order and whatever it draws are its own"]
    found = []
    if isinstance(source.dataset, IterableDataset):
        found.append("its IterableDataset decides what comes")
    elif type(source.sampler) not in _SAMPLERS or (
        source.batch_sampler is not None and type(source.batch_sampler) is not BatchSampler
    ):
        found.append("its sampler may keep a state")
    if source.persistent_workers:
        found.append("its persistent_workers are seeded once, not in every epoch")
    if not getattr(source, "in_order", True):
        found.append("with in_order=False batches come as they are ready")
    return found
