"""Prediction of image files: found by name, decoded one by one, classified in batches.

Shape letters: B images of a batch, S pixels per side, C classes.
"""

import codecs
import csv
import glob
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dml_accel.core.errors import UnreadableError, UsageError
from dml_accel.core.files import as_utf8, read_at_most
from dml_accel.core.tables import printable, table
from dml_accel.data.image_files import files_below, is_image, kind_of
from dml_accel.data.pixels import Geometry, bounded_pixels, opened, to_rgb, unreadable
from dml_accel.inference.load import BATCH_SIZE, Networks
from dml_accel.mutual.metrics import best_five, log_posteriors

FORMATS = ("table", "jsonl", "csv")
CSV_HEADER = "image,rank,class,index,probability\n"
_NAMED = 5  # files of a folder that cannot be read
_LARGEST_FILE = 2**28  # bytes: Pillow reads some formats whole before it checks their header

# How a list in UTF-16 begins, in the encoding of names of files.
_UTF16 = tuple(os.fsdecode(mark) for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))

OnError = Callable[[str, str], None]  # receives a name and why it cannot be used


@dataclass(frozen=True)
class ImagePrediction:
    """The likeliest classes of one image, at most five, best first.

    Attributes:
        image: the name of the file; of an image that is not a file, its place among the images.
        classes: names of the classes.
        probabilities: of those classes, in [0, 1].
        indices: of those classes among all, as the networks number them.
    """

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    indices: tuple[int, ...]

    @property
    def best(self) -> str:
        """The likeliest class."""
        return self.classes[0]


# ---------------------------------------------------------------- files


def find_images(words: Iterable[str], stdin: Iterable[str], on_error: OnError) -> Iterator[str]:
    """Yield the files that words of the command line stand for, in order.

    Args:
        words: files, folders (all images below them, sorted), globs, or ``-`` for ``stdin``.
        stdin: one file or folder per line.
        on_error: called for a word that stands for no file.

    Raises:
        UsageError: what is read from ``stdin`` is no such list.
    """
    for word in words:
        if word == "-":
            yield from _expand_folders(_listed(stdin), on_error)
        elif os.path.lexists(word):
            yield from _expand_folders([word], on_error)
        else:
            matches = sorted(glob.glob(word, recursive=True))
            yield from _expand_folders(matches or [word], on_error)


def _listed(lines: Iterable[str]) -> Iterator[str]:
    """Yield the names of a list, without what Windows writes around them."""
    for number, line in enumerate(lines):
        if "\0" in line or (not number and line.startswith(_UTF16)):
            raise UsageError(
                "the list on stdin is in UTF-16 or separated by zero bytes; write one name per "
                "line, in UTF-8"
            )
        name = line.removesuffix("\n")
        if not os.path.lexists(name):  # a name may end like this
            name = name.removesuffix("\r")
            name = name.removeprefix("\ufeff") if not number else name
        if name:
            yield name


def _expand_folders(paths: Iterable[str], on_error: OnError) -> Iterator[str]:
    """Yield files as they are and, for a folder, the images below it."""
    for path in paths:
        if not os.path.lexists(path):
            on_error(path, "this file or folder does not exist")
        elif not os.path.isdir(path):
            yield path
        else:
            yield from _images_below(path, on_error)


def _images_below(folder: str, on_error: OnError) -> list[str]:
    """Return the images below a folder, sorted; what else lies there is counted and named."""
    images: list[str] = []
    unreadable: list[str] = []
    try:
        for path, stat in files_below(Path(folder), folder.rstrip("/") or "/"):
            kind = kind_of(path)
            if stat and (kind == "image" or (kind == "unknown" and is_image(Path(path)))):
                images.append(path)
            elif kind != "beside":
                unreadable.append(os.path.relpath(path, folder) + " (a broken link)" * (not stat))
    except UsageError as error:
        on_error(folder, str(error))
    if unreadable:
        count, some = len(unreadable), ", ".join(sorted(unreadable)[:_NAMED])
        some += ", ..." * (count > _NAMED)
        on_error(folder, f"{count:,} file{'s' * (count > 1)} cannot be read: {some}")
    elif not images:
        on_error(folder, "this folder contains no images")
    return sorted(images)


def read_image(
    name: str, geometry: Geometry, grey_bits: int | None = None
) -> tuple[np.ndarray, bool]:
    """Decode one image file, and make it a square as in the evaluations of training.

    Args:
        name: of the file.
        geometry: how it becomes a square of S pixels per side.
        grey_bits: see ``pixels.to_rgb``.

    Returns:
        RGB levels [S, S, 3] uint8, and whether further frames were ignored.

    Raises:
        ValueError: the file cannot be used; the text is the reason.
    """
    try:
        if not Path(name).is_file():
            raise ValueError("this is not a file")
        content = io.BytesIO(read_at_most(Path(name), _LARGEST_FILE))
        with bounded_pixels(), opened(content) as picture:
            levels = to_rgb(picture, geometry, grey_bits)
            try:
                return levels, bool(getattr(picture, "is_animated", False))
            except Exception:  # a damaged second frame does not matter
                return levels, True
    except UnreadableError as error:
        raise ValueError(str(error).removeprefix(f"{name} ")) from error
    except Exception as error:  # Pillow raises many kinds for files it cannot parse
        raise ValueError(unreadable(error)) from error


# ---------------------------------------------------------------- networks


def read_images(
    names: Iterable[str], geometry: Geometry, on_error: OnError, grey_bits: int | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the names and levels [S, S, 3] of image files that can be read.

    Args:
        names: of the files.
        geometry: how images become the inputs of networks.
        on_error: called for a file that cannot be used.
        grey_bits: of the grey images of the training; see ``pixels.to_rgb``.
    """
    for name in names:
        try:
            levels, has_more_frames = read_image(name, geometry, grey_bits)
        except ValueError as error:
            on_error(name, str(error))
            continue
        if has_more_frames:
            print(f"{printable(name)}: only the first frame is used", file=sys.stderr)
        yield name, levels


def predict(
    networks: Networks, images: Iterable[tuple[str, np.ndarray]]
) -> Iterator[list[ImagePrediction]]:
    """Yield predictions for images, a batch at a time.

    Args:
        networks: several predict as an ensemble, by their mean posterior.
        images: names and levels [S, S, 3], such as ``read_images`` yields.

    Raises:
        UsageError: the networks' outputs are not finite.
    """
    batch: list[tuple[str, np.ndarray]] = []
    for one in images:
        batch.append(one)
        if len(batch) == BATCH_SIZE:
            yield _predict_batch(networks, batch)
            batch = []
    if batch:
        yield _predict_batch(networks, batch)


def _predict_batch(
    networks: Networks, batch: Sequence[tuple[str, np.ndarray]]
) -> list[ImagePrediction]:
    images = torch.from_numpy(np.stack([levels for _, levels in batch]))  # [B, S, S, 3]
    log_p = log_posteriors(networks.logits(images))[-1].cpu()  # [B, C]
    if not log_p.exp().isfinite().all():
        raise UsageError(f"the outputs of {', '.join(networks.names)} are not finite")
    values, indices = best_five(log_p)
    classes = networks.classes
    return [
        ImagePrediction(name, tuple(classes[one] for one in row), tuple(p), tuple(row))
        for (name, _), row, p in zip(batch, indices.tolist(), values.exp().tolist(), strict=True)
    ]


# ---------------------------------------------------------------- output


def predictions_table(predictions: Sequence[ImagePrediction]) -> str:
    """Return one row per image: its likeliest classes with their probabilities in percent."""
    rows = [
        [
            printable(one.image),
            *(
                f"{printable(name)} {100 * p:.1f}%"
                for name, p in zip(one.classes, one.probabilities, strict=True)
            ),
        ]
        for one in predictions
    ]
    ranks = max(len(one.classes) for one in predictions)
    return table(rows, ["image", *(str(rank + 1) for rank in range(ranks))], "simple", 1 + ranks)


def predictions_lines(predictions: Sequence[ImagePrediction], style: str) -> str:
    """Return one JSON object per image, or one line of CSV per image and class."""
    content = io.StringIO()
    for one in predictions:
        ranked = list(zip(one.classes, one.indices, one.probabilities, strict=True))
        if style == "jsonl":
            entries = [
                {"class": name, "index": index, "probability": p} for name, index, p in ranked
            ]
            content.write(json.dumps({"image": one.image, "predictions": entries}) + "\n")
        else:
            for rank, (name, index, p) in enumerate(ranked, 1):
                row = (one.image, rank, name, index, p)
                csv.writer(content, lineterminator="\n").writerow(row)
    return as_utf8(content.getvalue())
