"""Which images of a training split are trained on, held out, or used with their labels.

Every choice is made from the labels alone, before an image is decoded.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dml_accel.core.config import DataConfig
from dml_accel.core.errors import UsageError
from dml_accel.core.rng import stratified


class SplitNames(NamedTuple):
    """What the splits of a run are called, by their role; ``val`` is None without one."""

    train: str
    val: str | None
    test: str


def split_names(data: DataConfig, val: str | None = None) -> SplitNames:
    """Return what the splits of a run are called.

    Args:
        data: names the splits, and the shares that are cut off.
        val: the validation split that the data set has itself; None if it has none.
    """
    test = data.test_split
    if data.test_fraction:
        test = f"test ({data.test_fraction:g} of the images)"
    if data.val_fraction:
        val = f"val ({data.val_fraction:g} of {data.train_split})"
    return SplitNames(data.train_split, val, test)


def training_sizes(total: int, data: DataConfig) -> tuple[int, int]:
    """Return how many images are trained on, and how many are held out for validation.

    Args:
        total: images of the training split.
        data: fractions and limit.

    Raises:
        UsageError: a fraction or the limit does not fit the training images.
    """
    held = round(data.val_fraction * total)
    if data.val_fraction and not 0 < held < total:
        raise UsageError(
            f"--val-fraction {data.val_fraction} of {total} images is {held}; training and "
            "validation both need images"
        )
    left = total - held
    if data.train_limit is not None and data.train_limit > left:
        raise UsageError(
            f"--train-limit {data.train_limit} is more than the {left} training images"
        )
    trained = data.train_limit or left
    if round(data.labelled_fraction * trained) < 1:
        raise UsageError(
            f"--labelled-fraction {data.labelled_fraction} of {trained} images is none; at least "
            "one image needs a label"
        )
    return trained, held


def training_rows(labels: Tensor, data: DataConfig) -> tuple[Tensor, Tensor | None]:
    """Return the rows to train on, and those held out for validation if there are any, ascending.

    Both choices are stratified by class and independent of the run's seed, so that runs of several
    seeds can be compared; a smaller ``train_limit`` selects a subset of what a larger one selects.

    Args:
        labels: of the training split, [N] int64.
        data: fractions and limit.

    Raises:
        UsageError: see ``training_sizes``.
    """
    trained, held = training_sizes(len(labels), data)
    rows, val = torch.arange(len(labels)), None
    if held:
        chosen = torch.zeros(len(labels), dtype=torch.bool)
        chosen[stratified(labels, held, "validation split")] = True
        rows, val = (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]
    if trained < len(rows):
        rows = rows[stratified(labels[rows], trained, "training limit")]
    return rows, val


def decoded_rows(labels: Tensor, data: DataConfig) -> Tensor | None:
    """Return the rows whose images a run needs, ascending; None for all."""
    if data.train_limit is None:
        return None
    rows, val = training_rows(labels, data)
    return rows if val is None else torch.cat([rows, val]).sort().values


def labelled_rows(labels: Tensor, fraction: float, seed: int) -> Tensor | None:
    """Return the training rows whose labels are used, int64; None for all."""
    if fraction == 1:
        return None
    return stratified(labels, round(fraction * len(labels)), "labelled images", seed)
