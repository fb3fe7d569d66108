"""Decode the images of a split into one array in memory.

Ranks play no role here: the first process decodes while it holds a file lock, and the others read
the cache. Only image files, Arrow and safetensors are read, so no input can execute code.
"""

import functools
import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dml_accel.core.errors import UsageError
from dml_accel.core.host import cores
from dml_accel.core.tables import printable
from dml_accel.data.cache import Decoded, cached
from dml_accel.data.listing import Listing
from dml_accel.data.memory import memory_text, processes_here
from dml_accel.data.parts import NOT_GREY, UNREAD, Parts, Pass
from dml_accel.data.pictures import Damage, damaged, stand_ins
from dml_accel.data.pixels import Geometry, bounded_pixels, depth_of, grey_maximum, opened, to_rgb
from dml_accel.data.progress import Progress
from dml_accel.data.splits import sha256
from dml_accel.data.workers import Results, in_pieces

_NAMED = 3
# Fewer images are decoded here before workers have started.
FEWEST_FOR_WORKERS = 500
_MOST_WORKERS = 16
_PIECE, _PIECE_BYTES = 32, 4 * 2**20


class DamagedImagesError(UsageError):
    """Images cannot be read; the text names them.

    Attributes:
        damage: all of them.
    """

    def __init__(self, damage: Sequence[Damage]) -> None:
        self.damage = damage
        super().__init__()

    def __str__(self) -> str:
        return self._text

    @functools.cached_property
    def _text(self) -> str:  # when it is shown, because it may list them in a file
        some = "; ".join(
            f"{one.place} cannot be read: {one.reason}" for one in self.damage[:_NAMED]
        )
        if len(self.damage) <= _NAMED:
            them = "them" if len(self.damage) > 1 else "it"
            return f"{some}; repair or remove {them}, or use --bad-images skip"
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
            return f"{more} repair or remove them, or use --bad-images skip"
        return (
            f"{more} repair or remove them, or use --bad-images skip; all are listed in {file.name}"
        )


def decoded(
    listing: Listing,
    rows: Tensor | None,
    geometry: Geometry,
    quiet: bool = False,
    grey_bits: int | None = None,
    *,
    dataset: str = "",
    skips: bool = False,
    others: Tensor | None = None,
    classes: Sequence[str] = (),
    as_one: bool = True,
) -> Decoded:
    """Return the images of a split, from the cache if it holds them undamaged.

    Args:
        listing: what the split consists of.
        rows: those to decode, ascending, [M] int64; None for all.
        geometry: how an image becomes a square of S pixels per side.
        quiet: show no progress.
        grey_bits: see ``pixels.to_rgb``; None: as few as hold the brightest level of the split.
        dataset: folder or name of the data set, for a list of what is kept.
        skips: whether another image of its class stands in for one that cannot be read.
        others: rows that may stand in, int64; None for all.
        classes: names, for messages.
        as_one: whether all grey images of 16 bits have one depth without ``grey_bits``, or each the
            depth that holds its brightest level.

    Raises:
        DamagedImagesError: images cannot be read.
        UsageError: the images do not fit into memory, or no image of a class can be read.
    """
    chosen = list(range(len(listing.labels))) if rows is None else rows.tolist()

    def decode_them(parts: Parts | None) -> Decoded:
        return decode(
            listing,
            chosen,
            geometry,
            quiet,
            grey_bits,
            skips=skips,
            others=others,
            classes=classes,
            as_one=as_one,
            parts=parts,
        )

    about: tuple[object, ...] = (geometry, grey_bits, rows is None or sha256(rows))
    about += () if as_one else ("each by itself",)
    return cached(
        listing,
        chosen,
        geometry.size,
        about,
        decode_them,
        dataset=dataset,
        skips=skips,
        others="" if others is None else sha256(others),
    )


def decode(
    listing: Listing,
    rows: Sequence[int],
    geometry: Geometry,
    quiet: bool = False,
    grey_bits: int | None = None,
    *,
    skips: bool = False,
    others: Tensor | None = None,
    classes: Sequence[str] = (),
    as_one: bool = True,
    parts: Parts | None = None,
) -> Decoded:
    """Decode images of a split; see ``decoded``.

    Args:
        parts: of these images, to go on with and to keep; None: none are kept.
    """
    try:
        done = Pass.empty(len(rows), geometry.size)
    except (MemoryError, ValueError) as error:
        raise UsageError(memory_text(len(rows), geometry.size)) from error
    # While others wait for a set that is kept, all cores are ours.
    workers = cores() // (1 if parts else processes_here())
    reader = _Reader(listing, geometry, grey_bits)
    damage = _fill(done, reader, rows, parts, quiet, workers)
    if damage and not skips:
        raise DamagedImagesError(list(damage.values()))
    shown = dict(enumerate(rows))  # which row an image is of
    unread = [rows[place] for place in damage]
    unreachable = any(not done.contents[place].any() for place in damage)
    if damage:
        _let_others_stand_in(done, reader, shown, damage, others, classes)
    grey = done.levels > NOT_GREY
    has_one_depth = grey.any() and (as_one or grey_bits is not None)
    bits = _one_depth(done, reader, shown, workers) if has_one_depth else None
    images = torch.from_numpy(done.images)
    contents = [bytes(one) for one in done.contents]
    short = np.ascontiguousarray(done.contents[:, :8]).view(np.int64)[:, 0].copy()
    return Decoded(
        images,
        torch.from_numpy(short),
        bits,
        sha256(images),
        listing.digest(rows, contents) if listing.files(rows) else "",
        torch.tensor(unread, dtype=torch.int64),
        unreachable,
    )


def _fill(
    done: Pass,
    reader: "_Reader",
    rows: Sequence[int],
    parts: Parts | None,
    quiet: bool,
    workers: int,
) -> dict[int, Damage]:
    """Decode all images that no part holds; return what is wrong with some, by place."""
    spans, split = done.spans, printable(reader.listing.split)
    several = parts if len(spans) > 1 else None
    loaded = {number for number in range(len(spans)) if several and several.load(done, number)}
    places = (done.levels == UNREAD).nonzero()[0].tolist()
    before = len(rows) - len(places)
    if not (quiet or sys.stderr.isatty()):
        more = f": {before:,} of them are already" if before else ""
        print(
            f"decoding {len(rows):,} images of split {split!r}{more}", file=sys.stderr, flush=True
        )
    damage: dict[int, Damage] = {}
    number = 0
    try:
        with Progress(f"decoding {split}", len(rows), before, quiet) as progress:
            for piece, read in _read(reader, places, dict(enumerate(rows)), workers):
                for name, values in vars(done).items():
                    values[piece] = getattr(read, name).numpy()
                damage |= {piece[at]: one for at, one in read.damage}
                progress.add(len(piece))
                while several and number < len(spans) and (piece[-1] + 1 >= spans[number].stop):
                    if number not in loaded:
                        several.save(done, number)
                    number += 1
    except KeyboardInterrupt:
        if several and several.saved and not quiet:
            print("what is decoded is kept: the next start goes on there", file=sys.stderr)
        raise
    return damage


@dataclass(frozen=True)
class _Read:
    """A few decoded images; see ``Pass``.

    Attributes:
        damage: what is wrong with some, by place among them.
    """

    images: Tensor
    contents: Tensor
    levels: Tensor
    damage: list[tuple[int, Damage]]


@dataclass(frozen=True)
class _Reader:
    """Decodes images; it runs in worker processes."""

    listing: Listing
    geometry: Geometry
    grey_bits: int | None

    def __call__(self, rows: Sequence[int]) -> _Read:
        done = Pass.empty(len(rows), self.geometry.size)
        damage = []
        with bounded_pixels():
            for place, row in enumerate(rows):
                try:
                    stored = self.listing.content(row)
                    sha = hashlib.sha256(stored).digest()
                    done.contents[place] = np.frombuffer(sha, np.uint8)
                    with opened(io.BytesIO(stored)) as picture:
                        level = grey_maximum(picture)
                        done.images[place] = to_rgb(picture, self.geometry, self.grey_bits)
                    done.levels[place] = NOT_GREY if level is None else level
                except Exception as error:  # Pillow raises many kinds for files it cannot parse
                    done.images[place] = 0
                    damage.append((place, damaged(self.listing, row, error)))
        return _Read(**done.tensors(slice(None)), damage=damage)


def _read(
    reader: _Reader, places: Sequence[int], shown: dict[int, int], workers: int
) -> Iterable[tuple[list[int], _Read]]:
    """Yield decoded images in pieces, with their places, in order; in workers if there are many."""
    image_bytes = 3 * reader.geometry.size**2
    size = max(1, min(_PIECE, _PIECE_BYTES // image_bytes))
    pieces = [list(piece) for piece in in_pieces(places, size)]
    requests = [[shown[place] for place in piece] for piece in pieces]
    workers = min(_MOST_WORKERS, workers, len(pieces))
    if len(places) < FEWEST_FOR_WORKERS or workers < 2:
        workers = 0
    while True:
        try:
            results = Results(reader, requests, workers=workers, result_bytes=size * image_bytes)
            break
        except UsageError:  # there is little shared memory
            workers //= 2
    with results:
        yield from zip(pieces, results, strict=False)


def _let_others_stand_in(
    done: Pass,
    reader: _Reader,
    shown: dict[int, int],
    damage: dict[int, Damage],
    others: Tensor | None,
    classes: Sequence[str],
) -> None:
    """Put the next readable image of its class in place of each that cannot be read.

    Args:
        done: our images; those are filled in.
        reader: reads images that are not among ours.
        shown: the row of each place; those of stand-ins are put in.
        damage: of our images, by place.
        others: rows that may stand in; None for all.
        classes: their names.
    """
    places = {row: place for place, row in shown.items()}
    found: dict[int, _Read] = {}
    labels = reader.listing.labels
    for place, one in damage.items():
        for row in stand_ins(labels, one.row, others):
            there = places.get(row)
            if there is not None:
                if there in damage:
                    continue
                done.images[place], done.levels[place] = done.images[there], done.levels[there]
            else:
                read = found.setdefault(row, reader([row]))
                if read.damage:
                    continue
                done.images[place], done.levels[place] = read.images[0].numpy(), int(read.levels[0])
            shown[place] = row
            break
        else:
            label = int(labels[one.row])
            name = repr(printable(classes[label])) if classes else f"{label}"
            raise UsageError(
                f"no image of class {name} in split {printable(reader.listing.split)!r} can be "
                f"read, {one.place} among them ({one.reason}): repair them, or remove the class"
            )
        if not done.contents[place].any():  # it has no bytes; no other image is a copy of it
            sha = hashlib.sha256(b"unreachable " + os.fsencode(one.place)).digest()
            done.contents[place] = np.frombuffer(sha, np.uint8)


def _one_depth(done: Pass, reader: _Reader, shown: dict[int, int], workers: int) -> int:
    """Give all 16-bit grey images of a split the same depth, in place; return its bits."""
    given, most = reader.grey_bits, int(done.levels.max())
    bits = given or depth_of(most)
    above = int((done.levels >= 2**bits).sum())
    if above:
        print(
            f"warning: {above:,} grey images of split {reader.listing.split!r} have levels above "
            f"the {2**bits - 1:,} of the training images, such as {most:,}: they become white",
            file=sys.stderr,
        )
    if given is None:
        grey = (done.levels > NOT_GREY).nonzero()[0].tolist()
        others = [place for place in grey if depth_of(int(done.levels[place])) != bits]
        again = _Reader(reader.listing, reader.geometry, bits)
        for piece, read in _read(again, others, shown, workers):
            if read.damage:
                raise DamagedImagesError([one for _, one in read.damage])
            done.images[piece] = read.images.numpy()
    return bits
