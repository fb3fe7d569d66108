"""Images of a split that are read and decoded when they are needed; nothing of them is kept.

Shape letters: N images, H and W pixels of an original, S pixels a side of a square.
"""

import dataclasses
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dml_accel.core.tables import printable
from dml_accel.data.listing import Listing
from dml_accel.data.pixels import Geometry, bounded_pixels, grey_maximum, opened, to_rgb, unreadable


@dataclass(frozen=True)
class Damage:
    """An image that cannot be read.

    Attributes:
        row: of its listing.
        place: what to call it.
        reason: why.
        size: bytes of the image when it was listed.
    """

    row: int
    place: str
    reason: str
    size: int = -1


@dataclass(frozen=True)
class Picture:
    """One decoded image.

    Attributes:
        levels: RGB [H, W, 3] or [S, S, 3] uint8.
        brightest: the brightest level of a grey image of 16 bits; None for others.
        damage: images that cannot be read, in whose place this one stands.
    """

    levels: np.ndarray
    brightest: int | None = None
    damage: tuple[Damage, ...] = ()


@dataclass(frozen=True)
class Pictures:
    """The images of a split, or of some of its rows, before they are read.

    Attributes:
        listing: of the split.
        rows: of the listing, in our order, [N] int64.
        geometry: how an image becomes a square.
        grey_bits: see ``pixels.to_rgb``.
        skips: whether another image of its class stands in for one that cannot be read.
        others: the rows of the listing that may, [n] int64; None for all.
    """

    listing: Listing
    rows: Tensor
    geometry: Geometry
    grey_bits: int | None = None
    skips: bool = False
    others: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: Tensor) -> "Pictures":
        """Return the images at ``rows`` (int64) of ours, in that order."""
        return dataclasses.replace(self, rows=self.rows[rows])

    def of_depth(self, grey_bits: int | None) -> "Pictures":
        """Return the same images with another depth of grey."""
        return dataclasses.replace(self, grey_bits=grey_bits)

    def read(self, place: int, whole: bool = False) -> Picture | Damage:
        """Read the image at ``place`` of ours, or what stands in for it.

        Args:
            place: from 0 to N - 1.
            whole: whether to return the original, not its square.

        Returns:
            The image; what is wrong with it, if nothing stands in for it.
        """
        row = int(self.rows[place])
        found = self._read(row, whole)
        if isinstance(found, Picture) or not self.skips:
            return found
        damage = [found]
        for other in stand_ins(self.listing.labels, row, self.others):
            found = self._read(other, whole)
            if isinstance(found, Picture):
                return dataclasses.replace(found, damage=tuple(damage))
            damage.append(found)
        return damage[0]

    def _read(self, row: int, whole: bool) -> Picture | Damage:
        try:
            with bounded_pixels(), opened(io.BytesIO(self.listing.content(row))) as image:
                level = grey_maximum(image)
                levels = to_rgb(image, None if whole else self.geometry, self.grey_bits)
        except Exception as error:  # Pillow raises many kinds for files it cannot parse
            return damaged(self.listing, row, error)
        return Picture(levels, level)


@dataclass(frozen=True)
class HeldPictures(Pictures):
    """Images whose originals are in memory.

    Attributes:
        originals: [H, W, 3] uint8 of each row of ``rows``, or what is wrong with it.
    """

    originals: Sequence[Picture | Damage] = ()

    def select(self, rows: Tensor) -> "HeldPictures":
        """Return the images at ``rows`` (int64) of ours, in that order."""
        kept = [self.originals[row] for row in rows.tolist()]
        return dataclasses.replace(self, rows=self.rows[rows], originals=kept)

    def read(self, place: int, whole: bool = False) -> Picture | Damage:
        """Return the image at ``place`` of ours, or what stands in for it."""
        found = self.originals[place]
        if whole or isinstance(found, Damage):
            return found
        square = self.geometry.square(Image.fromarray(found.levels))
        return dataclasses.replace(found, levels=np.asarray(square))


def damaged(listing: Listing, row: int, error: Exception) -> Damage:
    """Return what is wrong with an image that raised an error when it was read."""
    size = next(iter(listing.names([row])))[1]
    return Damage(row, printable(listing.place(row)), printable(unreadable(error)), size)


def stand_ins(labels: Tensor, row: int, others: Tensor | None = None) -> Iterator[int]:
    """Yield the other rows of an image's class, from the one after it round to the one before.

    Args:
        labels: of a whole listing, [N] int64, so that both feeds agree.
        row: of the listing.
        others: rows that may stand in, [n] int64: not those that are held out. None for all.
    """
    chosen = labels == labels[row]
    if others is not None:
        chosen &= torch.zeros_like(chosen).index_fill_(0, others, True)
    same: Sequence[int] = chosen.nonzero()[:, 0].tolist()
    yield from (other for other in same if other > row)
    yield from (other for other in same if other < row)
