"""Where the images of a run come from: all are in memory, or each is read when it is needed.

choose_feed   which of the two, and why
into_memory   decodes the splits
when_needed   looks at some images, and leaves the rest for later

Both give a run the same pixels: what they depend on is in the data section of the configuration.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dml_accel.core.config import ComputeConfig, DataConfig
from dml_accel.core.host import cores
from dml_accel.data.catalogue import Listed
from dml_accel.data.decode import DamagedImagesError, decoded
from dml_accel.data.listing import Listing
from dml_accel.data.memory import (
    bytes_needed,
    machine_memory,
    processes_here,
    require_bytes,
    require_memory,
)
from dml_accel.data.pictures import Damage, HeldPictures, Picture, Pictures
from dml_accel.data.pixels import Geometry
from dml_accel.data.progress import Progress
from dml_accel.data.selection import decoded_rows, training_rows
from dml_accel.data.splits import Split
from dml_accel.data.survey import are_squares, measured_rows, sizes_of, some_rows, survey
from dml_accel.data.workers import Results, in_pieces, worker_count

_SHARE = 4  # images in memory take at most one part in so many of it
_ROLES = ("train", "val", "test")
_CHANNELS = 3
_FEW = 200  # images that are decoded in this process
_PIECE = 8


@dataclass(frozen=True)
class Fed:
    """The splits of a data set, as a feed gives them.

    Attributes:
        splits: by role.
        pixels: sha256 of the decoded images of each; None if they are read when they are needed.
        contents: 64 bits of the sha256 of each image's stored bytes, by role; empty if they were
            not read.
        grey_bits: how many of 16 bits the grey images of the training split use.
        level_counts: of the images that were measured, [3, 256]; None if those are in memory.
        damage: of images in memory, in whose place others stand.
    """

    splits: Mapping[str, Split]
    pixels: Mapping[str, str | None]
    contents: Mapping[str, Tensor]
    grey_bits: int | None
    level_counts: Tensor | None = None
    damage: Sequence[Damage] = ()


def choose_feed(data: DataConfig, feed: str, listed: Listed) -> tuple[str, str]:
    """Return ``memory`` or ``loader``, and why in words.

    The choice follows from what there is in all, not from what is free now.

    Args:
        data: the size of images, and how they are cut.
        feed: ``--feed``.
        listed: the images.
    """
    if feed != "auto":
        return feed, f"as --feed {feed} says"
    if _cuts_originals(data, listed, every=False):
        return "loader", "because random-resized-crop cuts from the originals"
    images = _images(data, listed)
    takes = (
        f"they take {_in_words(bytes_needed(images, data.size))} of {_in_words(machine_memory())}"
    )
    return ("memory", takes) if fits(images, data.size) else ("loader", f"because {takes}")


def fits(images: int, size: int, feed: str = "auto") -> bool:
    """Whether images are to be in memory: as ``--feed`` says, or because they fit its share."""
    if feed != "auto":
        return feed == "memory"
    return bytes_needed(images, size) <= machine_memory() / _SHARE


def _images(data: DataConfig, listed: Listed) -> int:
    rows = decoded_rows(listed.splits["train"].labels, data)
    trained = len(listed.splits["train"].labels) if rows is None else len(rows)
    return trained + sum(len(listed.splits[r].labels) for r in _ROLES[1:] if r in listed.splits)


def _in_words(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _cuts_originals(data: DataConfig, listed: Listed, every: bool) -> bool:
    """Whether training images are cut from originals that are not the squares of evaluation.

    Args:
        data: how images are cut.
        listed: the images.
        every: whether to look at the size of each, or of some.
    """
    if not data.cuts_originals:
        return False
    if data.resize != data.size:  # even a square is cut for evaluation
        return True
    listing = listed.splits["train"]
    rows = decoded_rows(listing.labels, data)
    chosen = range(len(listing.labels)) if rows is None else rows.tolist()
    return not are_squares(listing, chosen, data.size, every)


def reading_workers(compute: ComputeConfig, on_cpu: bool = False) -> int:
    """Return how many workers decode images for this process; see ``worker_count``."""
    return worker_count(compute.workers, on_cpu, cores(), processes_here())


# ---------------------------------------------------------------- read when they are needed


def when_needed(data: DataConfig, listed: Listed, compute: ComputeConfig, quiet: bool) -> Fed:
    """Measure some training images, and leave the others for later.

    Raises:
        UsageError: one of those cannot be read.
    """
    listings, workers = listed.splits, reading_workers(compute)
    rows, val = training_rows(listings["train"].labels, data)
    everything = {
        role: _pictures(data, one, rows if role == "train" else None)
        for role, one in listings.items()
    }
    train = everything["train"]
    measured = measured_rows(len(rows), data.size)
    # Of few or small images all are looked at, those that are held out as well.
    also = train.rows[:0] if val is None or measured is not None else val
    looked_at = train.select(rows if measured is None else rows[measured])
    found = survey(looked_at, train.select(also), workers, quiet)
    splits = {
        role: Split(one.of_depth(found.grey_bits), listings[role].labels)
        for role, one in everything.items()
    }
    return Fed(splits, dict.fromkeys(splits), {}, found.grey_bits, found.counts)


def _pictures(data: DataConfig, listing: Listing, others: Tensor | None) -> Pictures:
    """Return all images of a listing; ``others`` are those that may stand in for bad ones."""
    rows = torch.arange(len(listing.labels))
    skips = others is not None and data.bad_images == "skip"
    return Pictures(listing, rows, Geometry.of(data), skips=skips, others=others)


# ---------------------------------------------------------------- memory


def into_memory(data: DataConfig, listed: Listed, compute: ComputeConfig, quiet: bool) -> Fed:
    """Decode the splits; of training images that are cut from their originals, those.

    Raises:
        UsageError: they do not fit into memory, or cannot be read.
    """
    listings = listed.splits
    labels = listings["train"].labels
    rows, (trained, _) = decoded_rows(labels, data), training_rows(labels, data)
    cuts = _cuts_originals(data, listed, every=True)
    squares = _images(data, listed) - (len(labels if rows is None else rows) if cuts else 0)
    require_memory(squares, data.size)
    early = None
    # The depth of grey of many images is that of those that are measured, as of the other feed.
    if cuts or measured_rows(len(trained), data.size) is not None:
        early = when_needed(data, listed, compute, quiet)
    bits = early.grey_bits if early else None
    splits: dict[str, Split] = {}
    pixels: dict[str, str | None] = {}
    contents: dict[str, Tensor] = {}
    damage: list[Damage] = []
    skipped: list[Damage] = []
    for role, listing in listings.items():
        try:
            if role == "train" and early and cuts:
                held = _originals(early.splits[role], rows, compute, quiet)
                splits[role], pixels[role] = Split(held, listing.labels, rows), None
                continue
            chosen = rows if role == "train" else None
            skips = data.bad_images == "skip"
            found = decoded(
                listing,
                chosen,
                Geometry.of(data),
                quiet,
                bits,
                dataset=data.dataset,
                skips=skips,
                others=trained if role == "train" else None,
                classes=listed.classes,
                as_one=role == "train" and early is None,
            )
        except DamagedImagesError as error:  # those of the other splits are named as well
            damage += error.damage
            continue
        unread = marked(found.unread, len(listing.labels))
        splits[role] = Split(found.images, listing.labels, chosen, unread)
        skipped += _damage(Pictures(listing, found.unread, Geometry.of(data)))
        pixels[role], contents[role] = found.pixels, found.contents
        bits = found.grey_bits if role == "train" and early is None else bits
    if damage:
        raise DamagedImagesError(damage)
    counts = early.level_counts if early else None
    return Fed(splits, pixels, contents, bits, counts, skipped)


def _damage(unread: Pictures) -> list[Damage]:
    """Return what is wrong with images that could not be read, which the cache does not hold."""
    found = (unread.read(place) for place in range(len(unread)))
    return [one for one in found if isinstance(one, Damage)]


def marked(unread: Tensor, count: int) -> Tensor | None:
    """Return whether each of ``count`` rows is among ``unread``; None if none is."""
    if not len(unread):
        return None
    marks = torch.zeros(count, dtype=torch.bool)
    marks[unread] = True
    return marks


def _originals(
    split: Split, rows: Tensor | None, compute: ComputeConfig, quiet: bool
) -> HeldPictures:
    """Decode the whole originals of some rows of a split."""
    assert isinstance(split.images, Pictures)
    chosen = split.images if rows is None else split.images.select(rows)
    some = sizes_of(chosen.listing, chosen.rows[some_rows(len(chosen))].tolist())
    mean = sum(width * height * _CHANNELS for width, height in some) / max(1, len(some))
    require_bytes(mean * len(chosen), f"the originals of {len(chosen):,} images")
    found: list[Picture | Damage] = []
    workers = reading_workers(compute) if len(chosen) > _FEW else 0
    pieces = in_pieces(range(len(chosen)), _PIECE)
    with (
        Results(_Whole(chosen), pieces, workers=workers) as results,
        Progress("decoding originals", len(chosen), quiet=quiet) as progress,
    ):
        for pieces_read in results:
            found += pieces_read
            progress.add(len(pieces_read))
    bad = [one for one in found if isinstance(one, Damage)]
    if bad:
        raise DamagedImagesError(bad)
    return HeldPictures(**vars(chosen), originals=found)


class _Whole:
    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures

    def __call__(self, places: Sequence[int]) -> list[Picture | Damage]:
        return [self._pictures.read(place, whole=True) for place in places]
