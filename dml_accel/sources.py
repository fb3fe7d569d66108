"""Where images come from: the hub, a local folder or scikit-learn's digits, decoded once, cached.

No process rank is known here: whoever comes first decodes under a file lock, the rest read the
cache. Nothing that is read can execute code: Arrow, image files and safetensors only.
"""

import contextlib
import fcntl
import hashlib
import http.client
import io
import os
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dml_accel.config import Config, UsageError
from dml_accel.keys import key

_CACHE_FORMAT = 1
_DIGITS_TEST_ROWS = 360


@dataclass(frozen=True)
class Split:
    """Decoded images: ``images`` [N, S, S, 3] uint8 and ``labels`` [N] int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Tensor) -> "Split":
        """Return the given rows, shape [n] int64, in that order."""
        return Split(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class Source:
    """A data set: the split to train on, the split to report on, and the names of the classes."""

    train: Split
    test: Split
    classes: tuple[str, ...]


def read(config: Config, quiet: bool = False) -> Source:
    """Read ``config.dataset``, all of it, into memory.

    Args:
        config: names the set, its splits, columns and the image size.
        quiet: let the library show no download bars (this process is one of several).

    Raises:
        UsageError: the set cannot be reached, or a split, column, label or image is not usable.
    """
    if config.dataset == "digits":
        for name in ("image_column", "label_column", "train_split", "test_split"):
            if getattr(config, name) != getattr(Config, name):
                raise UsageError(
                    f"--{name.replace('_', '-')} does not apply to digits; leave it out"
                )
        return _digits(config.image_size)
    splits = _open(config.dataset, quiet)
    features = [_split(splits, name, flag).features for name, flag in _split_flags(config)]
    image = _image_column(features[0], config.image_column)
    label = _label_column(features[0], config.label_column)
    for other in features[1:]:
        if other.get(image) != features[0][image] or other.get(label) != features[0][label]:
            raise UsageError(
                f"columns {image!r} and {label!r} of split {config.test_split!r} are not those of "
                f"{config.train_split!r}: both need the same image column and the same classes"
            )
    classes = tuple(features[0][label].names)
    if len(classes) < 2:
        raise UsageError(f"column {label!r} has {len(classes)} class; at least 2 are needed")
    train, test = (
        _decoded(splits[name], name, image, label, len(classes), config.image_size)
        for name in (config.train_split, config.test_split)
    )
    return Source(train, test, classes)


# ---------------------------------------------------------------- finding the set


def _open(dataset: str, quiet: bool) -> Any:
    import datasets  # imported late: it costs a second that 'digits' need not pay

    try:
        folder = Path(dataset).expanduser()
        present = folder.exists()
    except (OSError, RuntimeError) as error:
        raise UsageError(f"--dataset {dataset} cannot be a folder: {error}") from error
    if not dataset or folder.is_file():
        raise UsageError(f"--dataset {dataset!r} is no folder; name the one that holds the images")
    if not present and (dataset.startswith(("/", ".", "~")) or dataset.count("/") > 1):
        raise UsageError(f"--dataset {dataset}: there is no such folder")
    if not present and not _hub_answers():
        # The library would retry for half a minute; offline it uses what is cached, at once.
        datasets.config.HF_HUB_OFFLINE = True
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True
    if quiet or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        # On disk and not in memory: the cache of decoded images is keyed by those files.
        name = str(folder) if present else dataset
        return datasets.load_dataset(name, keep_in_memory=False)
    except ConnectionError as error:
        raise UsageError(
            f"--dataset {dataset}: the hub cannot be reached, nothing of it is cached here, and no "
            "local folder has that name. Connect once, name a folder of images, or use "
            "--dataset digits"
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UsageError(
            f"--dataset {dataset}: neither a folder here nor a data set that the hub lets you read"
        ) from error
    except Exception as error:  # the library raises many kinds for files it cannot parse
        raise UsageError(f"--dataset {dataset} cannot be read: {_root_cause(error)}") from error


def _hub_answers() -> bool:
    """Whether the hub answers at all, within seconds (any HTTP status is an answer)."""
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


def _split_flags(config: Config) -> tuple[tuple[str, str], ...]:
    return (config.train_split, "--train-split"), (config.test_split, "--test-split")


def _split(splits: Any, name: str, flag: str) -> Any:
    if name not in splits:
        raise UsageError(
            f"the data set has no split {name!r} (it has: {', '.join(splits)}); choose with {flag}"
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
        _require_column(features, wanted, "--label-column", classes, "classes")
        return wanted
    for name in classes if len(classes) == 1 else ("fine_label", "label"):
        if name in classes:
            return name
    raise UsageError(
        f"{len(classes)} columns hold classes ({', '.join(classes) or 'none'}; all columns: "
        f"{', '.join(features)}); name one with --label-column"
    )


def _require_column(features: Any, name: str, flag: str, usable: list[str], what: str) -> None:
    if name not in usable:
        state = f"holds no {what} but {features[name]}" if name in features else "does not exist"
        raise UsageError(
            f"{flag} {name}: this column {state}; columns of {what}: {', '.join(usable) or 'none'}"
        )


# ---------------------------------------------------------------- decoding and caching


def _digits(size: int) -> Source:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # stored as 0 ... 16
    images = torch.from_numpy(np.stack([_to_rgb(Image.fromarray(g), size) for g in grey]))
    labels = torch.from_numpy(bunch.target).long()
    cut = len(labels) - _DIGITS_TEST_ROWS
    return Source(
        Split(images[:cut], labels[:cut]),
        Split(images[cut:], labels[cut:]),
        tuple(str(name) for name in bunch.target_names),
    )


def _to_rgb(image: Image.Image, size: int) -> np.ndarray:
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; store 8 or 16 bits")
    if image.size != (size, size):
        image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image.convert("RGB"))


def cache_dir() -> Path:
    """The folder of decoded images: ``$DML_CACHE``, else ``~/.cache/dml_accel``."""
    return Path(os.environ.get("DML_CACHE", "~/.cache/dml_accel")).expanduser()


def _decoded(dataset: Any, split: str, image: str, label: str, classes: int, size: int) -> Split:
    """Return the split's images, from the cache where it holds them undamaged."""
    stats = [(f["filename"], os.stat(f["filename"])) for f in dataset.cache_files]
    identity = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    digest = key(_CACHE_FORMAT, identity, split, image, label, size)
    path = cache_dir() / f"{digest:016x}.safetensors"
    with _lock(path) as writable:
        if identity and path.exists():
            try:
                return _load(path)
            except (ValueError, SafetensorError) as damage:
                print(f"{path} is damaged ({damage}); decoding again", file=sys.stderr)
        labels = _labels(dataset, split, label, classes)
        decoded = Split(_decode(dataset, split, image, size), labels)
        if writable and identity:
            _store(path, decoded)
        return decoded


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold the file's lock, so that one process decodes and the others then read."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path.with_suffix(".lock"), "w")  # noqa: SIM115
    except OSError as error:
        print(f"images are not cached: {error}; set DML_CACHE to a folder", file=sys.stderr)
        yield False
        return
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield True


def _labels(dataset: Any, split: str, column: str, classes: int) -> Tensor:
    labels = np.asarray(dataset[column][:], dtype=np.float64)
    bad = ~((labels >= 0) & (labels < classes))  # a missing label is NaN here
    if bad.any():
        row = int(bad.argmax())
        raise UsageError(
            f"row {row} of split {split!r} has {column} = {labels[row]:g}; with {classes} classes "
            f"labels run from 0 to {classes - 1}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _decode(dataset: Any, split: str, column: str, size: int) -> Tensor:
    import datasets

    raw = dataset.select_columns(column).cast_column(column, datasets.Image(decode=False))
    images = np.empty((len(raw), size, size, 3), np.uint8)
    if not sys.stderr.isatty():
        print(f"decoding {len(raw):,} images of split {split!r}", file=sys.stderr, flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for row, record in enumerate(tqdm(raw, f"decoding {split}", disable=None, unit=" images")):
            stored = record[column] or {}
            content: bytes | None = stored.get("bytes")
            path: Any = stored.get("path")
            try:
                if content is None and path is None:
                    raise ValueError("the row is empty")
                with Image.open(io.BytesIO(content) if content is not None else path) as picture:
                    images[row] = _to_rgb(picture, size)
            except Exception as error:  # Pillow raises many kinds for files it cannot parse
                # A buffer's address says nothing to a reader.
                reason = str(error).split(" <_io.BytesIO")[0]
                where = f" ({path})" if path else ""
                raise UsageError(
                    f"image {row} of split {split!r}{where} cannot be read: {reason}"
                ) from error
    return torch.from_numpy(images)


def _digest(split: Split) -> str:
    digest = hashlib.sha256(split.images.numpy().data)
    digest.update(split.labels.numpy().data)
    return digest.hexdigest()


def _store(path: Path, split: Split) -> None:
    """Write under a temporary name, then rename: a reader sees the whole file or none."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        tensors = {"images": split.images, "labels": split.labels}
        save_file(tensors, temporary, metadata={"sha256": _digest(split)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        print(f"images are not cached: {error}; set DML_CACHE to a folder", file=sys.stderr)


def _load(path: Path) -> Split:
    with safe_open(path, framework="pt") as file:
        split = Split(file.get_tensor("images"), file.get_tensor("labels"))
        if (file.metadata() or {}).get("sha256") != _digest(split):
            raise ValueError("its sha256 is not the recorded one")
    return split
