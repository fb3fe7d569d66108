"""Columns of a table: which holds the images, which the classes, and the label of each row."""

import re
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from dml_accel.core.errors import UsageError

_LIKELY = ("label", "class", "cls")  # columns whose values are classes, unless told otherwise


def labels_of(
    dataset: Any, split: str, column: str, names: Sequence[str], by_value: bool
) -> Tensor:
    """Return the label of each row of a split, [N] int64.

    Args:
        dataset: the rows of the split.
        split: its name.
        column: that holds the classes.
        names: of the classes, in label order.
        by_value: whether the column holds names, not labels.

    Raises:
        UsageError: a row has no label, or one that is not among the classes.
    """
    found, classes = dataset[column][:], len(names)
    if by_value:
        places = {name: place for place, name in enumerate(names)}
        for row, value in enumerate(found):
            if value is None or not str(value).strip():
                _refuse_missing_label(row, split, column)
            if str(value) not in places:
                raise UsageError(
                    f"row {row} of split {split!r} has {column} = {value!r}, a class that the "
                    "training split does not have"
                )
        found = [places[str(value)] for value in found]
    labels = np.asarray(found, dtype=np.float64)
    bad = ~((labels >= 0) & (labels < classes))  # a missing label has become NaN
    if bad.any():
        row = int(bad.argmax())
        if np.isnan(labels[row]):
            _refuse_missing_label(row, split, column)
        raise UsageError(
            f"row {row} of split {split!r} has {column} = {labels[row]:g}; with {classes} classes, "
            f"labels must be 0 to {classes - 1}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _refuse_missing_label(row: int, split: str, column: str) -> NoReturn:
    raise UsageError(
        f"row {row} of split {split!r} has no label in column {column!r}; give it one, or remove "
        "the row"
    )


def image_column(features: Any, wanted: str | None) -> str:
    """Return the column that holds images: the one that is wanted, else the only one.

    Raises:
        UsageError: there is no such column, or it is not clear which.
    """
    import datasets

    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if wanted is not None:
        _require_column(features, wanted, "--image-column", images, "images")
        return wanted
    if len(images) != 1:
        raise UsageError(
            f"{len(images)} columns hold images ({', '.join(images) or 'none'}; all columns: "
            f"{', '.join(features)}); name one with --image-column"
        )
    return images[0]


def label_column(features: Any, wanted: str | None) -> str:
    """Return the column that holds classes: the one that is wanted, else the only likely one.

    Raises:
        UsageError: there is no such column, or it is not clear which.
    """
    import datasets

    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if wanted is not None:
        values = [name for name, kind in features.items() if _may_be_classes(kind)]
        _require_column(features, wanted, "--label-column", [*classes, *values], "classes")
        return wanted
    for name in classes if len(classes) == 1 else ("fine_label", "label"):
        if name in classes:
            return name
    likely = [name for name in _LIKELY if _may_be_classes(features.get(name))]
    if not classes and len(likely) == 1:
        return likely[0]
    raise UsageError(
        f"{len(classes)} columns hold classes ({', '.join(classes) or 'none'}; all columns: "
        f"{', '.join(features)}); name one with --label-column"
    )


def _may_be_classes(kind: Any) -> bool:
    """Whether the values of a column can be used as classes, if the user names it."""
    import datasets

    whole = ("int", "uint", "bool", "string", "large_string")
    return isinstance(kind, datasets.Value) and str(kind.dtype).startswith(whole)


def classes_of(split: Any, label: str, by_number: bool = False) -> tuple[str, ...]:
    """Return the class names: the column's own, else the distinct values of the split.

    Args:
        split: a table.
        label: the column.
        by_number: whether texts that are all whole numbers are in the order of these.
    """
    names = getattr(split.features[label], "names", None)
    if names is not None:
        return tuple(names)
    found = split.unique(label)
    values = sorted(one for one in found if one is not None and str(one).strip())
    if by_number and all(re.fullmatch(r"-?[0-9]+", one) for one in values):
        values.sort(key=int)
    return tuple(map(str, values))


def _require_column(features: Any, name: str, flag: str, usable: list[str], what: str) -> None:
    if name not in usable:
        state = f"holds {features[name]}, not {what}" if name in features else "does not exist"
        raise UsageError(
            f"{flag} {name}: this column {state}; columns of {what}: {', '.join(usable) or 'none'}"
        )
