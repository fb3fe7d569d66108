"""Decode the images of a split into one array in memory.

Ranks play no role here: the first process decodes while it holds a file lock, and the others read
the cache. Only image files, Arrow and safetensors are read, so no input can execute code.
"""

import hashlib
import io
import sys
import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dml_accel.core.errors import UsageError
from dml_accel.data.cache import Decoded, cached
from dml_accel.data.listing import Listing
from dml_accel.data.memory import memory_text
from dml_accel.data.pictures import Damage, damaged
from dml_accel.data.pixels import Geometry, bounded_pixels, depth_of, grey_maximum, opened, to_rgb
from dml_accel.data.splits import sha256

_NAMED = 3


class DamagedImagesError(UsageError):
    """Images cannot be read; the text names them.

    Attributes:
        damage: all of them.
    """

    def __init__(self, damage: Sequence[Damage]) -> None:
        self.damage = damage
        super().__init__(self._text())

    def _text(self) -> str:
        some = "; ".join(
            f"{one.place} cannot be read: {one.reason}" for one in self.damage[:_NAMED]
        )
        if len(self.damage) <= _NAMED:
            return f"{some}; repair or remove {'them' if len(self.damage) > 1 else 'it'}"
        more = f"{len(self.damage):,} images cannot be read: {some}; ..."
        try:
            with tempfile.NamedTemporaryFile(
                "w",
                prefix="dml-accel-damaged-",
                suffix=".txt",
                delete=False,
                encoding="utf-8",
                errors="backslashreplace",
            ) as file:
                file.writelines(f"{one.place}: {one.reason}\n" for one in self.damage)
        except OSError:
            return f"{more} repair or remove them"
        return f"{more} repair or remove them; all are listed in {file.name}"


def decoded(
    listing: Listing,
    rows: Tensor | None,
    geometry: Geometry,
    quiet: bool = False,
    grey_bits: int | None = None,
) -> Decoded:
    """Return the images of a split, from the cache if it holds them undamaged.

    Args:
        listing: what the split consists of.
        rows: those to decode, ascending, [M] int64; None for all.
        geometry: how an image becomes a square of S pixels per side.
        quiet: show no progress.
        grey_bits: see ``pixels.to_rgb``; None: as few as hold the brightest level of the split.

    Raises:
        DamagedImagesError: images cannot be read.
        UsageError: the images do not fit into memory.
    """
    chosen = list(range(len(listing.labels))) if rows is None else rows.tolist()
    about = (geometry, grey_bits, rows is None or sha256(rows))
    return cached(
        listing, chosen, about, lambda: decode(listing, chosen, geometry, quiet, grey_bits)
    )


def decode(
    listing: Listing,
    rows: Sequence[int],
    geometry: Geometry,
    quiet: bool = False,
    grey_bits: int | None = None,
) -> Decoded:
    """Decode images of a split; see ``decoded``."""
    size = geometry.size
    try:
        images = np.empty((len(rows), size, size, 3), np.uint8)
    except (MemoryError, ValueError) as error:
        raise UsageError(memory_text(len(rows), size)) from error
    if not (quiet or sys.stderr.isatty()):
        print(
            f"decoding {len(rows):,} images of split {listing.split!r}", file=sys.stderr, flush=True
        )
    contents: list[bytes] = []
    damage: list[Damage] = []
    brightest: dict[int, int] = {}  # of 16-bit grey images, by place
    with bounded_pixels():
        progress = tqdm(rows, f"decoding {listing.split}", disable=quiet or None, unit=" images")
        for place, row in enumerate(progress):
            try:
                stored = listing.content(row)
                contents.append(hashlib.sha256(stored).digest())
                with opened(io.BytesIO(stored)) as picture:
                    level = grey_maximum(picture)
                    images[place] = to_rgb(picture, geometry, grey_bits)
                if level is not None:
                    brightest[place] = level
            except Exception as error:  # Pillow raises many kinds for files it cannot parse
                damage.append(damaged(listing, row, error))
        if damage:
            raise DamagedImagesError(damage)
        if brightest:
            grey_bits = _one_depth(listing, rows, geometry, images, brightest, grey_bits)
    tensor = torch.from_numpy(images)
    short = np.frombuffer(b"".join(one[:8] for one in contents), np.int64).copy()
    return Decoded(
        tensor,
        torch.from_numpy(short),
        grey_bits if brightest else None,
        sha256(tensor),
        listing.digest(rows, contents) if listing.files(rows) else "",
    )


def _one_depth(
    listing: Listing,
    rows: Sequence[int],
    geometry: Geometry,
    images: np.ndarray,
    brightest: dict[int, int],
    given: int | None,
) -> int:
    """Give all 16-bit grey images of a split the same depth, in place; return its bits."""
    most = max(brightest.values())
    bits = given or depth_of(most)
    above = [place for place, level in brightest.items() if level >= 2**bits]
    if above:
        print(
            f"warning: {len(above):,} grey images of split {listing.split!r} have levels above the "
            f"{2**bits - 1:,} of the training images, such as {most:,}: they become white",
            file=sys.stderr,
        )
    for place, level in brightest.items():
        if given is None and depth_of(level) != bits:
            with opened(io.BytesIO(listing.content(rows[place]))) as picture:
                images[place] = to_rgb(picture, geometry, bits)
    return bits
