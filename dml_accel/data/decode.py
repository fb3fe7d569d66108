"""Decode the images of a split into one array in memory, check the labels, cache both.

Ranks play no role here: the first process decodes while it holds a file lock, and the others read
the cache. Only Arrow, image files and safetensors are read, so no input can execute code.
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dml_accel.core.errors import UsageError
from dml_accel.core.files import replacing
from dml_accel.core.rng import key

_CACHE_FORMAT = 1


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


def to_rgb(image: Image.Image, size: int) -> np.ndarray:
    """Return an image as RGB values [S, S, 3] uint8, resized if it is not S x S.

    Raises:
        ValueError: the range of its pixels is unknown.
    """
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"the range of pixels of mode {image.mode} is unknown; store 8 or 16 bits")
    if image.size != (size, size):
        image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image.convert("RGB"))


@contextlib.contextmanager
def bounded_pixels() -> Iterator[None]:
    """Make Pillow refuse images above its pixel limit, which it checks in the header."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unusual tags are harmless
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def opened(file: str | Path | IO[bytes]) -> Image.Image:
    """Open an untrusted image; use it within ``bounded_pixels``.

    Raises:
        Exception: many kinds, if it is not an image.
    """
    return Image.open(file, formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return Pillow's formats except PostScript, which Pillow passes to another program to run."""
    Image.preinit()  # registers the common formats first, so that they are tried first
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def cache_dir() -> Path:
    """Return the folder of decoded images: ``$DML_CACHE``, else ``~/.cache/dml_accel``."""
    return Path(os.environ.get("DML_CACHE", "~/.cache/dml_accel")).expanduser()


def decoded(
    dataset: Any,
    split: str,
    image: str,
    label: str,
    classes: Sequence[str],
    size: int,
    quiet: bool,
    roots: Sequence[Path],
) -> Split:
    """Return the images and labels of a split, from the cache if it holds them undamaged.

    Args:
        dataset: of the datasets library.
        split: its name, for messages.
        image: the column of images.
        label: the column of classes.
        classes: class names, in label order.
        size: pixels per side.
        quiet: show no progress.
        roots: see ``decode``.
    """
    stats = [(f["filename"], os.stat(f["filename"])) for f in dataset.cache_files]
    identity = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    by_value = () if hasattr(dataset.features[label], "names") else tuple(classes)
    digest = key(_CACHE_FORMAT, identity, split, image, label, size, *by_value)
    path = cache_dir() / f"{digest:016x}.safetensors"
    with _lock(path) as writable:
        if identity and path.exists():
            try:
                return _load(path)
            except (ValueError, SafetensorError) as damage:
                print(f"{path} is damaged ({damage}): decoding again", file=sys.stderr)
        labels = _labels(dataset, split, label, classes, bool(by_value))
        decoded = Split(decode(dataset, split, image, size, quiet, roots), labels)
        if writable and identity:
            _store(path, decoded)
        return decoded


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold the lock of a cache file; yield whether the cache can be written."""
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


def _labels(dataset: Any, split: str, column: str, names: Sequence[str], by_value: bool) -> Tensor:
    found, classes = dataset[column][:], len(names)
    if by_value:
        places = {name: place for place, name in enumerate(names)}
        for row, value in enumerate(found):
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
        raise UsageError(
            f"row {row} of split {split!r} has {column} = {labels[row]:g}; with {classes} classes, "
            f"labels must be 0 to {classes - 1}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def decode(
    dataset: Any,
    split: str,
    column: str,
    size: int,
    quiet: bool = False,
    roots: Sequence[Path] = (),
) -> Tensor:
    """Decode every image of a column, [N, S, S, 3] uint8.

    Args:
        dataset: of the datasets library.
        split: its name, for messages.
        column: of images.
        size: S.
        quiet: show no progress.
        roots: folders that must contain every file that a row names; rows are untrusted.

    Raises:
        UsageError: an image cannot be read; the text names its row, and its file if it has one.
    """
    import datasets

    raw = dataset.select_columns(column).cast_column(column, datasets.Image(decode=False))
    images = np.empty((len(raw), size, size, 3), np.uint8)
    if not (quiet or sys.stderr.isatty()):
        print(f"decoding {len(raw):,} images of split {split!r}", file=sys.stderr, flush=True)
    with bounded_pixels():
        for row, record in enumerate(
            tqdm(raw, f"decoding {split}", disable=quiet or None, unit=" images")
        ):
            stored = record[column] or {}
            content: bytes | None = stored.get("bytes")
            path: Any = stored.get("path")
            try:
                if content is None and path is None:
                    raise ValueError("the row is empty")
                if content is None and not any(_is_inside(path, root) for root in roots):
                    raise ValueError("the row names a file outside the data set")
                with opened(io.BytesIO(content) if content is not None else path) as picture:
                    images[row] = to_rgb(picture, size)
            except Exception as error:  # Pillow raises many kinds for files it cannot parse
                # Pillow adds the address of our buffer, which tells a reader nothing.
                reason = str(error).split(" <_io.BytesIO")[0]
                where = f" ({path})" if path else ""
                raise UsageError(
                    f"image {row} of split {split!r}{where} cannot be read: {reason}; repair or "
                    "remove it"
                ) from error
    return torch.from_numpy(images)


def _is_inside(path: str, root: Path) -> bool:
    """Whether a path lies in a folder by name; a link in the folder may still lead elsewhere."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root))


def _digest(split: Split) -> str:
    digest = hashlib.sha256(split.images.numpy().data)
    digest.update(split.labels.numpy().data)
    return digest.hexdigest()


def _store(path: Path, split: Split) -> None:
    try:
        tensors = {"images": split.images, "labels": split.labels}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"sha256": _digest(split)})
    except (OSError, SafetensorError) as error:
        print(f"images are not cached: {error}; set DML_CACHE to a folder", file=sys.stderr)


def _load(path: Path) -> Split:
    with safe_open(path, framework="pt") as file:
        split = Split(file.get_tensor("images"), file.get_tensor("labels"))
        if (file.metadata() or {}).get("sha256") != _digest(split):
            raise ValueError("its sha256 differs from the recorded one")
    return split
