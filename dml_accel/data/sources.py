"""Data sets: read from the hub, from a local folder, or scikit-learn's digits."""

import http.client
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dml_accel.core.config import DataConfig
from dml_accel.core.errors import UsageError
from dml_accel.core.versions import require_packages
from dml_accel.data.decode import Split, decoded, to_rgb

_DIGITS_TEST_ROWS = 360


@dataclass(frozen=True)
class Source:
    """A data set: the split to train on, the split to report on, and the class names."""

    train: Split
    test: Split
    classes: tuple[str, ...]


def read(data: DataConfig, quiet: bool = False) -> Source:
    """Read a whole data set into memory.

    Args:
        data: names the data set, its splits and columns, and the image size.
        quiet: show no progress, because another process does.

    Raises:
        UsageError: the data set cannot be reached, or a split, column, label or image cannot be
            used.
    """
    if data.dataset == "digits":
        for name in ("image_column", "label_column", "train_split", "test_split"):
            if getattr(data, name) != getattr(DataConfig, name):
                raise UsageError(
                    f"--{name.replace('_', '-')} has no effect with --dataset digits: drop it"
                )
        return _digits(data.image_size)
    if data.train_split == data.test_split:
        raise UsageError(
            f"--train-split and --test-split are both {data.train_split!r}: test images must not "
            "be training images; name two different splits"
        )
    flags = (data.train_split, "--train-split"), (data.test_split, "--test-split")
    (train, test), classes = _read_splits(data, flags, quiet)
    unseen = (torch.bincount(train.labels, minlength=len(classes)) == 0).nonzero()[:, 0].tolist()
    if unseen and not quiet:
        some = ", ".join(repr(classes[label]) for label in unseen[:5])
        print(
            f"warning: {len(unseen)} of {len(classes)} classes have no training images: {some}",
            file=sys.stderr,
        )
    return Source(train, test, classes)


def read_test(data: DataConfig, quiet: bool = False) -> tuple[Split, tuple[str, ...]]:
    """Read only the split to report on, and the class names; see ``read``."""
    if data.dataset == "digits":
        source = read(data, quiet)
        return source.test, source.classes
    (test,), classes = _read_splits(data, ((data.test_split, "--test-split"),), quiet)
    return test, classes


def _read_splits(
    data: DataConfig, flags: tuple[tuple[str, str], ...], quiet: bool
) -> tuple[list[Split], tuple[str, ...]]:
    """Read splits, each given with the flag that names it, and their common class names."""
    splits = _open(data.dataset, quiet)
    features = [_split(splits, name, flag).features for name, flag in flags]
    image = _image_column(features[0], data.image_column)
    label = _label_column(features[0], data.label_column)
    for other in features[1:]:
        if other.get(image) != features[0][image] or other.get(label) != features[0][label]:
            raise UsageError(
                f"columns {image!r} and {label!r} of split {data.test_split!r} differ from those "
                f"of {data.train_split!r}: both splits need the same image column and classes"
            )
    classes = _classes(splits[flags[0][0]], label)
    if len(classes) < 2:
        raise UsageError(
            f"column {label!r} has {len(classes)} distinct class; at least 2 are needed"
        )
    size, roots = data.image_size, _roots(data.dataset)
    read = [
        decoded(splits[name], name, image, label, classes, size, quiet, roots) for name, _ in flags
    ]
    return read, classes


# ---------------------------------------------------------------- finding the set


def _roots(dataset: str) -> list[Path]:
    """Return the folders that may hold a data set's files: its own, or the hub's caches."""
    import datasets
    import huggingface_hub.constants as hub

    folder = Path(dataset).expanduser()
    if folder.exists():
        return [folder]
    return [Path(datasets.config.HF_CACHE_HOME), Path(hub.HF_HUB_CACHE), Path(hub.HF_HOME)]


def _open(dataset: str, quiet: bool) -> Any:
    require_packages(f"--dataset {dataset}", "datasets")
    import datasets  # imported late: it takes a second, which digits does not need

    try:
        folder = Path(dataset).expanduser()
        present = folder.exists()
    except (OSError, RuntimeError) as error:
        raise UsageError(f"--dataset {dataset} cannot be a folder: {error}") from error
    if not dataset or folder.is_file():
        raise UsageError(f"--dataset {dataset!r} is not a folder; name the folder with the images")
    if not present and (dataset.startswith(("/", ".", "~")) or dataset.count("/") > 1):
        raise UsageError(f"--dataset {dataset}: this folder does not exist")
    if not present and not hub_answers():
        # Online, the library would retry for half a minute; offline it uses its cache at once.
        datasets.config.HF_HUB_OFFLINE = True
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True
    if quiet or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        # Kept on disk, because the cache of decoded images is keyed by those files.
        name = str(folder) if present else dataset
        return datasets.load_dataset(name, keep_in_memory=False)
    except ConnectionError as error:
        raise UsageError(
            f"--dataset {dataset}: the hub cannot be reached, the data set is not cached here, and "
            "there is no local folder of that name. Connect once, name a folder of images, or use "
            "--dataset digits"
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UsageError(
            f"--dataset {dataset}: not a local folder, and not a data set that you can read on the "
            "hub"
        ) from error
    except Exception as error:  # the library raises many kinds for files it cannot parse
        raise UsageError(f"--dataset {dataset} cannot be read: {_root_cause(error)}") from error


def hub_answers() -> bool:
    """Whether the hub answers within seconds; any HTTP status counts as an answer."""
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(
            urllib.request.Request(hub.ENDPOINT, method="HEAD"), timeout=5
        ).close()
    except urllib.error.HTTPError as answer:
        answer.close()
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _split(splits: Any, name: str, flag: str) -> Any:
    if name not in splits:
        raise UsageError(
            f"the data set has no split {name!r} (it has: {', '.join(splits)}); choose one with "
            f"{flag}, or arrange the folder as train/<class>/*.png and test/<class>/*.png"
        )
    if len(splits[name]) == 0:
        raise UsageError(f"split {name!r} has no images; choose another with {flag}")
    return splits[name]


def _image_column(features: Any, wanted: str | None) -> str:
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


def _label_column(features: Any, wanted: str | None) -> str:
    import datasets

    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if wanted is not None:
        values = [name for name, kind in features.items() if _may_be_classes(kind)]
        _require_column(features, wanted, "--label-column", [*classes, *values], "classes")
        return wanted
    for name in classes if len(classes) == 1 else ("fine_label", "label"):
        if name in classes:
            return name
    raise UsageError(
        f"{len(classes)} columns hold classes ({', '.join(classes) or 'none'}; all columns: "
        f"{', '.join(features)}); name one with --label-column"
    )


def _may_be_classes(kind: Any) -> bool:
    """Whether the values of a column can be used as classes, if the user names it."""
    import datasets

    whole = ("int", "uint", "bool", "string", "large_string")
    return isinstance(kind, datasets.Value) and str(kind.dtype).startswith(whole)


def _classes(split: Any, label: str) -> tuple[str, ...]:
    """Return the class names: the column's own, else the distinct values of the split."""
    names = getattr(split.features[label], "names", None)
    if names is not None:
        return tuple(names)
    values = sorted(value for value in split.unique(label) if value is not None)
    return tuple(map(str, values))


def _require_column(features: Any, name: str, flag: str, usable: list[str], what: str) -> None:
    if name not in usable:
        state = f"holds {features[name]}, not {what}" if name in features else "does not exist"
        raise UsageError(
            f"{flag} {name}: this column {state}; columns of {what}: {', '.join(usable) or 'none'}"
        )


def _digits(size: int) -> Source:
    require_packages("--dataset digits", "scikit-learn:sklearn")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # stored as 0 ... 16
    images = torch.from_numpy(np.stack([to_rgb(Image.fromarray(g), size) for g in grey]))
    labels = torch.from_numpy(bunch.target).long()
    cut = len(labels) - _DIGITS_TEST_ROWS
    return Source(
        Split(images[:cut], labels[:cut]),
        Split(images[cut:], labels[cut:]),
        tuple(str(name) for name in bunch.target_names),
    )
