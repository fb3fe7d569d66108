"""What trained networks see in image files: found, read one by one, answered in batches.

Shape letters: B images of a batch, S pixels a side, C classes.
"""

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
from PIL import Image
from torch import Tensor

from dml_accel.core.config import UsageError
from dml_accel.core.files import UnreadableError, read_at_most
from dml_accel.core.tables import printable, table
from dml_accel.data.decode import bounded_pixels, opened, to_rgb
from dml_accel.inference.load import ROWS, Networks
from dml_accel.mutual.metrics import best_five, log_posteriors

FORMATS = ("table", "jsonl", "csv")
_LARGEST_FILE = 2**28  # bytes: several formats are read whole before their header is looked at


@dataclass(frozen=True)
class Prediction:
    """What a network, or an ensemble, makes of one image: the likeliest classes, best first.

    Attributes:
        image: the file's name, as it was given or found.
        classes: at most five numbers of classes.
        probabilities: of those, in [0, 1].
    """

    image: str
    classes: tuple[int, ...]
    probabilities: tuple[float, ...]


def names_of(
    words: Iterable[str], stdin: Iterable[str], bad: Callable[[str, str], None]
) -> Iterator[str]:
    """Yield the files that words of the command line name, in order.

    Args:
        words: files, folders (all images below, sorted), globs, or ``-`` for names in ``stdin``.
        stdin: a file or folder a line.
        bad: told the word and the reason where one names nothing.
    """
    for word in words:
        if word == "-":
            lines = (line.rstrip("\n") for line in stdin)
            yield from _below((line for line in lines if line), bad)
        elif os.path.lexists(word):
            yield from _below([word], bad)
        else:
            yield from _below(sorted(glob.glob(word, recursive=True)) or [word], bad)


def _below(paths: Iterable[str], bad: Callable[[str, str], None]) -> Iterator[str]:
    """Yield files as they are and, of folders, the images below them by their endings, sorted."""
    Image.init()
    for path in paths:
        if not os.path.lexists(path):
            bad(path, "there is no such file or folder")
            continue
        if not os.path.isdir(path):
            yield path
            continue
        images = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(path)
            for name in names
            if os.path.splitext(name)[1].lower() in Image.EXTENSION and not name.startswith(".")
        ]
        if not images:
            bad(path, "no image is in this folder")
        yield from sorted(images)


def read(name: str, size: int) -> tuple[np.ndarray, bool]:
    """Read one image file as training reads its images.

    Returns:
        RGB levels [S, S, 3] uint8, and whether there were more frames than the first.

    Raises:
        ValueError: it cannot be used; the text says why.
    """
    try:
        if not Path(name).is_file():
            raise ValueError("this is no file")
        content = io.BytesIO(read_at_most(Path(name), _LARGEST_FILE))
        with bounded_pixels(), opened(content) as picture:
            levels = to_rgb(picture, size)
            try:
                return levels, bool(getattr(picture, "is_animated", False))
            except Exception:  # a second frame that is broken is no matter
                return levels, True
    except UnreadableError as error:
        raise ValueError(str(error).removeprefix(f"{name} ")) from error
    except Exception as error:  # Pillow raises many kinds for files it cannot parse
        reason = str(error).split(" <_io.BytesIO")[0]
        raise ValueError(reason or type(error).__name__) from error


def predict(
    networks: Networks, size: int, names: Iterable[str], bad: Callable[[str, str], None]
) -> Iterator[list[Prediction]]:
    """Yield what the ensemble of some networks makes of image files, a batch at a time.

    Args:
        networks: they answer together, by their mean posterior; one answers alone.
        size: S, pixels a side of their inputs.
        names: of files.
        bad: told the name and the reason of each that cannot be used.

    Raises:
        UsageError: what the networks return is not finite.
    """
    batch: list[tuple[str, np.ndarray]] = []
    for name in names:
        try:
            levels, animated = read(name, size)
        except ValueError as error:
            bad(name, str(error))
            continue
        if animated:
            print(f"{printable(name)}: the first of its frames is used", file=sys.stderr)
        batch.append((name, levels))
        if len(batch) == ROWS:
            yield _answer(networks, batch)
            batch = []
    if batch:
        yield _answer(networks, batch)


def _answer(networks: Networks, batch: Sequence[tuple[str, np.ndarray]]) -> list[Prediction]:
    images = torch.from_numpy(np.stack([levels for _, levels in batch]))
    log_p: Tensor = log_posteriors(networks.logits(images))[-1].cpu()
    if not log_p.exp().isfinite().all():
        raise UsageError(f"what {', '.join(networks.names)} predict is not finite")
    values, places = best_five(log_p)
    return [
        Prediction(name, tuple(row.tolist()), tuple(value.exp().tolist()))
        for (name, _), row, value in zip(batch, places, values, strict=True)
    ]


# ---------------------------------------------------------------- on the screen


def as_table(predictions: Sequence[Prediction], classes: Sequence[str]) -> str:
    """Return one row an image: each of the likeliest classes with its percentage."""
    rows = [
        [
            printable(one.image),
            *(
                f"{printable(classes[place])} {100 * p:.1f}%"
                for place, p in zip(one.classes, one.probabilities, strict=True)
            ),
        ]
        for one in predictions
    ]
    ranks = min(5, len(classes))
    return table(rows, ["image", *(str(rank + 1) for rank in range(ranks))], "simple", 1 + ranks)


def as_lines(predictions: Sequence[Prediction], classes: Sequence[str], style: str) -> str:
    """Return a JSON object an image, or a line of CSV for each of its likeliest classes."""
    content = io.StringIO()
    for one in predictions:
        ranked = list(zip(one.classes, one.probabilities, strict=True))
        if style == "jsonl":
            found = [
                {"class": classes[place], "index": place, "probability": p} for place, p in ranked
            ]
            content.write(json.dumps({"image": one.image, "predictions": found}) + "\n")
        else:
            for rank, (place, p) in enumerate(ranked, 1):
                row = (one.image, rank, classes[place], place, p)
                csv.writer(content, lineterminator="\n").writerow(row)
    return content.getvalue().encode("utf-8", "replace").decode()  # names may be no UTF-8


CSV_HEADER = "image,rank,class,index,probability\n"
