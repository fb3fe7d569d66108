"""What is measured on images of a split before it is read: sizes, depth of grey, levels.

A large split of photographs is judged by some of its images, chosen by a key: the same for both
feeds, every seed and any number of workers.

Shape letters: N images, S pixels a side.
"""

import contextlib
import hashlib
import io
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dml_accel.core.config import SMALL_IMAGES
from dml_accel.core.errors import UnreadableError
from dml_accel.core.files import read_json, write_json
from dml_accel.core.host import cache_dir
from dml_accel.core.locks import lock
from dml_accel.core.rng import generator, key
from dml_accel.data.decode import DamagedImagesError
from dml_accel.data.listing import Listing
from dml_accel.data.pictures import Damage, Picture, Pictures
from dml_accel.data.pixels import bounded_pixels, depth_of, opened
from dml_accel.data.progress import Progress
from dml_accel.data.splits import sha256
from dml_accel.data.workers import Results, in_pieces

MEASURED = 10_000  # images on which a large split of photographs is measured
_LOOKED_AT = 100  # images whose size is looked at
_PIECE = 32
_LEVELS = 256


def measured_rows(count: int, size: int) -> Tensor | None:
    """Return which of ``count`` squares of ``size`` pixels are measured, int64; None: all."""
    if count <= MEASURED or size <= SMALL_IMAGES:
        return None
    order = torch.randperm(count, generator=generator("measured images"))
    return order[:MEASURED].sort().values


# ---------------------------------------------------------------- sizes


def typical_size(listing: Listing) -> tuple[int, int] | None:
    """Return the median of the shorter and of the longer sides of some images, in pixels.

    None if none of them can be read.
    """
    found = sizes_of(listing, some_rows(len(listing.labels)))
    if not found:
        return None
    short, long = zip(*map(sorted, found), strict=True)
    return round(statistics.median(short)), round(statistics.median(long))


def are_squares(listing: Listing, rows: Sequence[int], size: int, every: bool) -> bool:
    """Whether the images at ``rows`` that can be read have ``size`` x ``size`` pixels.

    Args:
        listing: of the images.
        rows: of it.
        size: pixels per side.
        every: whether to look at all of them, or at some.
    """
    square = {(size, size)}
    some = [rows[place] for place in some_rows(len(rows))]
    return set(sizes_of(listing, some)) <= square and (
        not every or set(sizes_of(listing, rows)) <= square
    )


def some_rows(count: int) -> list[int]:
    """Return the places of some of ``count`` images, chosen by a key."""
    return torch.randperm(count, generator=generator("sizes"))[:_LOOKED_AT].tolist()


def sizes_of(listing: Listing, rows: Sequence[int]) -> list[tuple[int, int]]:
    """Return width and height of images, from the beginning of each; of those that can be read."""
    return [image.size for image in _headers(listing, rows)]


def _headers(listing: Listing, rows: Sequence[int]) -> Iterator[Image.Image]:
    """Yield images of which only the beginning was decoded; those that can be read."""
    with bounded_pixels():
        for row in rows:
            try:
                with opened(io.BytesIO(listing.content(row))) as image:
                    yield image
            except Exception:  # Pillow raises many kinds for files it cannot parse: named later
                continue


# ---------------------------------------------------------------- levels


@dataclass(frozen=True)
class Survey:
    """What some images of a split say of all of them.

    Attributes:
        counts: how often each level occurs in their squares, [3, 256] int64.
        grey_bits: as many as hold the brightest level of their grey images of 16 bits; None if
            there are none.
    """

    counts: Tensor
    grey_bits: int | None


def level_counts(images: Tensor) -> Tensor:
    """Return how often each level occurs in images [N, S, S, 3] uint8, by channel, [3, 256]."""
    counts = torch.zeros(images.shape[-1], _LEVELS, dtype=torch.int64)
    for chunk in images.reshape(-1, images.shape[-1]).split(1 << 20):
        for channel, levels in enumerate(chunk.unbind(1)):
            counts[channel] += torch.bincount(levels, minlength=_LEVELS)
    return counts


def survey(pictures: Pictures, also: Pictures, workers: int, quiet: bool = False) -> Survey:
    """Measure images, or return what was measured on the same files before.

    Args:
        pictures: whose levels are counted.
        also: further ones, whose depth of grey counts.
        workers: processes that read.
        quiet: show no progress.

    Raises:
        DamagedImagesError: images cannot be read, and nothing stands in for them.
    """
    listing = pictures.listing
    rows = torch.cat([pictures.rows, also.rows])
    files = listing.files(rows.tolist())
    cache = cache_dir()
    if cache is None or not files:
        return _survey(pictures, also, workers, quiet)
    others = None if pictures.others is None else sha256(pictures.others)
    about = (pictures.geometry, pictures.skips, sha256(pictures.rows), sha256(also.rows), others)
    state = hashlib.sha256(repr([(file.name, file.state) for file in files]).encode()).hexdigest()
    path = cache / f"{key('survey', listing.key, about, state):016x}.survey.json"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            # One process measures, and the others read what it has found.
            lock(stack.enter_context(open(path.with_suffix(".lock"), "w")), wait=True)
        with contextlib.suppress(UnreadableError, KeyError, TypeError, ValueError):
            kept = read_json(path)
            counts = torch.tensor(kept["counts"], dtype=torch.int64).view(3, _LEVELS)
            bits = kept["grey_bits"]
            return Survey(counts, None if bits is None else int(bits))
        found = _survey(pictures, also, workers, quiet)
        with contextlib.suppress(OSError):  # then they are measured again next time
            write_json(path, {"counts": found.counts.tolist(), "grey_bits": found.grey_bits})
    return found


def _survey(pictures: Pictures, also: Pictures, workers: int, quiet: bool) -> Survey:
    counts, brightest = _measure(pictures, workers, quiet)
    _, other = _measure(also, workers, quiet) if len(also) else (None, None)
    levels = [level for level in (brightest, other) if level is not None]
    if not levels:
        return Survey(counts, None)
    bits = depth_of(max(levels))
    counts, _ = _measure(pictures.of_depth(bits), workers, quiet)
    return Survey(counts, bits)


def _measure(pictures: Pictures, workers: int, quiet: bool) -> tuple[Tensor, int | None]:
    """Return the counts of levels, and the brightest level of grey images of 16 bits."""
    count = len(pictures)
    counts = torch.zeros(3, _LEVELS, dtype=torch.int64)
    brightest: int | None = None
    damage: list[Damage] = []
    if not (quiet or sys.stderr.isatty()):
        print(f"measuring {count:,} images", file=sys.stderr, flush=True)
    workers = workers if count > 2 * _PIECE else 0
    with (
        Results(_Measurer(pictures), in_pieces(range(count), _PIECE), workers=workers) as results,
        Progress("measuring", count, quiet=quiet) as progress,
    ):
        for found, level, bad, done in results:
            counts += torch.from_numpy(found)
            brightest = max((one for one in (brightest, level) if one is not None), default=None)
            damage += bad
            progress.add(done)
    if damage:
        raise DamagedImagesError(damage)
    return counts, brightest


class _Measurer:
    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures

    def __call__(self, places: Sequence[int]) -> tuple[np.ndarray, int | None, list[Damage], int]:
        squares, levels, damage = [], [], []
        for place in places:
            found = self._pictures.read(place)
            if isinstance(found, Picture):
                squares.append(torch.from_numpy(np.array(found.levels)))
                levels += [found.brightest] if found.brightest is not None else []
            else:
                damage.append(found)
        size = self._pictures.geometry.size
        images = torch.stack(squares) if squares else torch.zeros(0, size, size, 3).byte()
        return level_counts(images).numpy(), max(levels, default=None), damage, len(places)
