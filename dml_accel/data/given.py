"""Images and labels that a caller of ``learn`` gives: tensors, a ``Dataset`` or batches.

Each is refused here, with how to convert it, or looked at: two images tell shape and dtype.

Shape letters: N images, B rows of a batch, C channels, H and W pixels.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from dml_accel.core.errors import UsageError
from dml_accel.core.rng import keeping_random_states, seed_random_states
from dml_accel.data.items import Items, read_item
from dml_accel.data.splits import Split
from dml_accel.data.stream import Batches, first_batch, inexact, whole_batches

_AT_ONCE = 1024  # images looked at for values that are not finite
_TAKES = (
    "learn takes a pair of tensors (images, labels), a Dataset of (image, label), a DataLoader, or "
    "what yields batches (images, labels) each time it is iterated"
)
_NO_BATCHES = (Tensor, np.ndarray, Mapping, str, bytes)


@dataclass(frozen=True)
class Given:
    """Images and labels of a split, as they were given and looked at.

    Attributes:
        name: of the split: the name of the argument.
        kind: ``tensors``, ``Dataset``, ``DataLoader`` or ``batches``.
        source: what was given.
        shown: the first images, one or two, as networks are given them.
        rows: images of the split; 0 if they are not known. Of what is trained on, of the first
            batch.
        held: the images and labels, if they are tensors.
    """

    name: str
    kind: str
    source: Any
    shown: Tensor
    rows: int
    held: Split | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an image, as networks are given it."""
        return tuple(self.shown.shape[1:])

    @property
    def is_augmented(self) -> bool:
        """Whether images are uint8 levels, which are augmented and normalised here."""
        return self.held is not None and not self.held.held.is_floating_point()

    @property
    def is_batches(self) -> bool:
        """Whether it comes in batches that are not ours."""
        return self.kind in ("DataLoader", "batches")

    @property
    def words(self) -> str:
        """What it is, as a run records it: ``DataLoader of Photos, 2 workers``."""
        if self.kind == "tensors":
            return self.kind
        if isinstance(self.source, DataLoader):
            kept = f"DataLoader of {type(self.source.dataset).__name__}"
            return f"{kept}, {self.source.num_workers} workers"
        return f"{self.kind} {type(self.source).__name__}"

    def split(self, classes: int, batch_size: int = 0, per_epoch: int | None = None) -> Split:
        """Return the images as a run uses them.

        Args:
            classes: of the networks.
            batch_size: of what is trained on.
            per_epoch: batches of an epoch, of what comes in batches and is trained on.
        """
        if self.held is not None:
            return self.held
        rows, images = self.rows, Items(self.name, self.source, self.shape, classes)
        if not self.is_batches:
            return Split(images, torch.full((rows,), -1))
        rows = per_epoch * batch_size if per_epoch else rows
        batches = Batches(self.name, self.source, per_epoch, batch_size, self.shape, classes)
        return Split(batches, torch.full((rows,), -1))


def read_given(name: str, given: Any) -> Given:
    """Look at what a caller has given.

    Args:
        name: of the argument.
        given: its value.

    Raises:
        UsageError: it is of no known kind, or its images and labels do not fit each other; the text
            says how to convert it.
    """
    if isinstance(given, DataLoader):
        _refuse_shared_out(name, given)
        shown, _ = first_batch(name, given)
        known = whole_batches(given)
        rows = known[0] * known[1] + known[2] if known else 0
        return Given(name, "DataLoader", given, shown, rows)
    if isinstance(given, IterableDataset):
        raise UsageError(
            f"{name} is a {_kind(given)}, which yields single images: give "
            f"DataLoader({name}, batch_size=...)"
        )
    if isinstance(given, Dataset):
        return _read_data_set(name, given)
    if isinstance(given, Iterator):
        raise UsageError(
            f"{name} is a {_kind(given)}, which can be read once, and every epoch reads it: give "
            "what begins anew, as a list or an object with __iter__ does"
        )
    if isinstance(given, list | tuple):
        if not _holds_batches(given):
            return _read_tensors(name, given)
    elif isinstance(given, _NO_BATCHES) or not isinstance(given, Iterable):
        return _read_tensors(name, given)
    shown, _ = first_batch(name, given)
    return Given(name, "batches", given, shown, 0)


def refuse_different(given: Given, train: Given) -> None:
    """Refuse images of another kind than those that are trained on.

    Raises:
        UsageError: the text has both.
    """
    if given.held is not None and train.held is not None:
        images, like = given.held.held, train.held.held
        if images.shape[1:] != like.shape[1:] or images.dtype != like.dtype:
            raise UsageError(
                f"{given.name} has images {list(images.shape)} of {images.dtype}, but train has "
                f"{list(like.shape)} of {like.dtype}"
            )
    elif given.is_augmented or train.is_augmented:
        raise UsageError(
            f"{given.name} and train must both be uint8 tensors, or neither: give floating images"
        )
    elif given.shape != train.shape:
        raise UsageError(
            f"{given.name} has images {list(given.shape)}, but train has {list(train.shape)}"
        )


# ---------------------------------------------------------------- batches


@dataclass(frozen=True)
class Plan:
    """How batches of the caller's are trained on.

    Attributes:
        batch_size: images of each.
        per_epoch: how many are an epoch.
        notes: what the caller should know, a line each.
    """

    batch_size: int
    per_epoch: int
    notes: list[str]


def plan_batches(train: Given, asked: int | None, steps_per_epoch: int | None) -> Plan:
    """Return how many batches of which size an epoch has.

    Args:
        train: batches of the caller's.
        asked: the batch size, if it was asked for.
        steps_per_epoch: how many are an epoch; None for all.

    Raises:
        UsageError: that cannot be told, or does not fit what was asked for.
    """
    source, partial, notes = train.source, 0, []
    size: int
    length: int | None
    known = whole_batches(source) if isinstance(source, DataLoader) else None
    if known:
        size, length, partial = known
    else:
        size, length = first_batch(train.name, source)[1], _length(source)
        if isinstance(source, list | tuple) and length and len(source[-1][0]) < size:
            length, partial = length - 1, len(source[-1][0])
    if asked not in (None, size):
        raise UsageError(
            f"batch_size={asked}, but the batches of train have {size} images: leave it out"
        )
    if steps_per_epoch is None and length is None:
        raise UsageError(
            "train has no len(): say with steps_per_epoch= how many batches are an epoch"
        )
    per_epoch = length if steps_per_epoch is None else steps_per_epoch
    if length is not None and (per_epoch or 0) > length:
        raise UsageError(f"steps_per_epoch={per_epoch}, but train has {length} whole batches")
    if not per_epoch or per_epoch < 1:
        raise UsageError(
            f"train has no whole batch of {size} images: each step takes one"
            if steps_per_epoch is None
            else f"steps_per_epoch={steps_per_epoch}; it must be at least 1"
        )
    if partial and per_epoch == length:
        notes.append(
            f"train: the last batch of an epoch has {partial} of {size} images and is left out"
        )
    if why := inexact(source):
        notes.append(
            "train is read as it comes, and seeded for every batch; a resumed run may see other "
            f"batches than one that was not interrupted, because {', and '.join(why)}"
        )
    return Plan(size, per_epoch, notes)


def _length(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:
        return None


def _refuse_shared_out(name: str, loader: "DataLoader[Any]") -> None:
    """Refuse a loader of which every process reads a part: learn divides batches itself."""
    if type(loader).__module__.partition(".")[0] == "accelerate":
        raise UsageError(
            f"{name} was prepared by Accelerate: give the DataLoader itself, which learn shares out"
        )
    sampler = loader.sampler
    if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        raise UsageError(
            f"{name} has a DistributedSampler: leave it out, because learn shares out each batch"
        )


def _holds_batches(given: Any) -> bool:
    """Whether a list holds pairs of images and labels [B], not two tensors or single images."""
    first = next(iter(given), None)
    if not (isinstance(first, list | tuple) and len(first) == 2):
        return False
    labels = first[1]
    return isinstance(first[0], Tensor) and isinstance(labels, Tensor) and labels.dim() > 0


def _read_data_set(name: str, given: Any) -> Given:
    rows = _length(given)
    if rows is None:
        raise UsageError(
            f"{name} is a {_kind(given)} without len(): give it __len__, the number of its images"
        )
    if rows == 0:
        raise UsageError(f"{name} is empty; at least one image is needed")
    with keeping_random_states():
        images = []
        for row in range(min(2, rows)):
            seed_random_states("first", name, row)
            images.append(read_item(name, given, row)[0])
    shapes = [list(image.shape) for image in images]
    if shapes[0] != shapes[-1]:
        raise UsageError(
            f"{name}[0] has the shape {shapes[0]} and {name}[1] {shapes[1]}: resize or crop images "
            "to one shape"
        )
    return Given(name, "Dataset", given, torch.stack(images), rows)


# ---------------------------------------------------------------- tensors


def _kind(value: object) -> str:
    """Return the type of a value, for messages: ``list of tensors``."""
    kind = type(value).__name__
    holds_tensors = isinstance(value, list | tuple) and value and isinstance(value[0], Tensor)
    return f"{kind} of tensors" if holds_tensors else kind


def _read_tensors(name: str, given: Any) -> Given:
    """Return images and labels in the memory of the host, where both are measured and drawn."""
    if not (isinstance(given, tuple | list) and len(given) == 2):
        hint, rows = _TAKES, f"for image, label in {name}"
        if isinstance(given, tuple | list) and not isinstance(next(iter(given), None), tuple):
            hint += f", and these are {len(given)}"
        elif isinstance(given, tuple | list):
            hint += f": torch.stack([image {rows}]), torch.tensor([label {rows}])"
        raise UsageError(f"{name} is a {_kind(given)}; {hint}")
    for what, value in zip(("images", "labels"), given, strict=True):
        if not isinstance(value, Tensor):
            fix = f"torch.as_tensor({what})"
            if _kind(value) != type(value).__name__:
                fix = f"torch.stack({what})"
            raise UsageError(f"{name}: its {what} are a {_kind(value)}; {_TAKES}: {fix}")
        if value.is_meta or value.is_nested or value.layout != torch.strided:
            fix = f"{what}.to_dense()" if value.layout != torch.strided else f"torch.stack({what})"
            raise UsageError(
                f"{name}: its {what} are on the device meta, which holds no values"
                if value.is_meta
                else f"{name}: its {what} are not dense; {_TAKES}: {fix}"
            )
    images, labels = given
    if images.requires_grad:
        raise UsageError(f"{name}: its images require gradients; give images.detach()")
    split = Split(images.cpu(), labels.cpu())
    _check_tensors(name, split)
    shown = split.held[:2]
    shown = shown if shown.is_floating_point() else shown.permute(0, 3, 1, 2) / 255
    return Given(name, "tensors", given, shown, len(split), split)


def _check_tensors(name: str, split: Split) -> None:
    images, labels = split.held, split.labels
    shown = f"images {list(images.shape)} and labels {list(labels.shape)} of {labels.dtype}"
    if images.dim() == 0 or len(images) == 0:
        raise UsageError(f"{name} has {shown}: at least one image is needed")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        fix = ""
        if labels.shape == (len(images), 1):
            fix = "; use labels[:, 0].long()"
        elif labels.dim() == 2 and len(labels) == len(images):
            fix = "; use labels.argmax(1)"
        elif labels.shape == images.shape[:1]:
            fix = "; use labels.long()"
        raise UsageError(f"{name} has {shown}; each image needs a label of torch.int64{fix}")
    square = images.ndim == 4 and images.shape[3] == 3 and images.shape[1] == images.shape[2]
    if not images.is_floating_point() and not (images.dtype == torch.uint8 and square):
        fix = ": images / 255"
        if images.dtype != torch.uint8:
            fix = "" if images.is_complex() else ": images.float()"
        elif images.ndim == 4 and images.shape[1] == 3 and images.shape[2] == images.shape[3]:
            fix = ": images.permute(0, 2, 3, 1)"
        raise UsageError(
            f"{name} has images {list(images.shape)} of {images.dtype}; give uint8 images "
            f"[N, H, H, 3], or floating ones of any shape{fix}"
        )
    if images.is_floating_point():
        for start in range(0, len(images), _AT_ONCE):
            rows = images[start : start + _AT_ONCE]
            bad = ~rows.reshape(len(rows), rows[0].numel()).isfinite().all(1)
            if bad.any():
                row = start + int(bad.nonzero()[0])
                raise UsageError(f"{name}: image {row} has values that are not finite")
