"""A data set looked at as a whole: every image is read and decoded, and none is kept.

An image takes 16 bytes of memory: part of its sha256, and its sides.
"""

import collections
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dml_accel.core.host import cores
from dml_accel.data.listing import Listing
from dml_accel.data.pictures import Damage, damaged
from dml_accel.data.pixels import bounded_pixels, opened, to_rgb
from dml_accel.data.progress import Progress
from dml_accel.data.workers import Results, in_pieces

_PIECE = 32
_FEWEST_FOR_WORKERS = 500
_SEEN = np.dtype([("content", np.uint64), ("height", np.uint32), ("width", np.uint32)])


@dataclass(frozen=True)
class Checked:
    """What was found in a split.

    Attributes:
        seen: ``content`` (64 bits of the sha256 of the stored bytes; 0 if there are none),
            ``height`` and ``width`` (pixels, upright; 0 if it cannot be read) of each image, [N].
        kinds: images by format and mode, as "JPEG RGB".
        unreadable: how many images cannot be read.
    """

    seen: np.ndarray
    kinds: Counter[str] = field(default_factory=collections.Counter)
    unreadable: int = 0

    def sides(self) -> list[tuple[int, int, int]]:
        """Return the smallest, middle and largest of widths and of heights; none of no images."""
        read = self.seen[self.seen["width"] > 0]
        if not len(read):
            return []
        found = []
        for name in ("width", "height"):
            side = np.sort(read[name])
            found.append((int(side[0]), int(side[len(side) // 2]), int(side[-1])))
        return found

    def copies_within(self) -> int:
        """Return how many images have the same content as an earlier one of the split."""
        content = self._contents()
        return len(content) - len(np.unique(content))

    def copies_of(self, other: "Checked") -> int:
        """Return how many images have the same content as one of another split."""
        return int(np.isin(self._contents(), other._contents()).sum())

    def _contents(self) -> np.ndarray:
        content = self.seen["content"]
        return content[content > 0]


def check(
    listing: Listing,
    workers: int | None,
    found_bad: Callable[[Damage], None],
    quiet: bool = False,
) -> Checked:
    """Read and decode every image of a split.

    Args:
        listing: of the split.
        workers: processes that read images; None: one for each core, if there are many images.
        found_bad: is told of each image that cannot be read, in the order of the listing.
        quiet: show no progress.
    """
    count = len(listing.labels)
    if workers is None:
        workers = cores() if count >= _FEWEST_FOR_WORKERS else 0
    seen, kinds, place = np.zeros(count, _SEEN), Counter[str](), 0
    unreadable = 0
    with (
        Results(_Look(listing), in_pieces(range(count), _PIECE), workers=workers) as results,
        Progress(f"checking {listing.split}", count, quiet=quiet) as progress,
    ):
        for looks in results:
            for content, height, width, kind, damage in looks:
                seen[place] = content, height, width
                place += 1
                if damage is None:
                    kinds[kind] += 1
                else:
                    unreadable += 1
                    found_bad(damage)
            progress.add(len(looks))
    return Checked(seen, kinds, unreadable)


_Seen = tuple[int, int, int, str, Damage | None]


@dataclass(frozen=True)
class _Look:
    """Reads a few images; it runs in worker processes."""

    listing: Listing

    def __call__(self, rows: Sequence[int]) -> list[_Seen]:
        return [self._look(row) for row in rows]

    def _look(self, row: int) -> _Seen:
        content = 0
        try:
            stored = self.listing.content(row)
            content = int.from_bytes(hashlib.sha256(stored).digest()[:8], "little")
            with bounded_pixels(), opened(io.BytesIO(stored)) as image:
                kind = f"{image.format} {image.mode}"
                height, width, _ = to_rgb(image, None).shape
        except Exception as error:  # Pillow raises many kinds for files it cannot parse
            return content, 0, 0, "", damaged(self.listing, row, error)
        return content, height, width, kind, None
