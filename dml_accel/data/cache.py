"""The cache of decoded images: one safetensors file for the rows of a split by one geometry.

A file is found by the names, sizes and times of the files that the images come from. If the file
system knows that one of those was replaced all the same, their contents are compared before what
was kept is used. What is read is checked against its sha256.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dml_accel.core.errors import UnreadableError
from dml_accel.core.files import in_utf8, read_json, replacing, write_json
from dml_accel.core.host import cache_dir
from dml_accel.core.locks import Lock
from dml_accel.core.rng import key
from dml_accel.core.tables import printable
from dml_accel.data import kept
from dml_accel.data.listing import Listing, StoredFile
from dml_accel.data.parts import Parts, state_of
from dml_accel.data.splits import sha256


@dataclass(frozen=True)
class Decoded:
    """The decoded images of some rows.

    Attributes:
        images: [M, S, S, 3] uint8.
        contents: 64 bits of the sha256 of each row's stored bytes, [M] int64.
        grey_bits: of the 16-bit grey images; None if there are none.
        pixels: sha256 of ``images``.
        files: sha256 of the files that they come from.
        unread: rows of the listing that cannot be read, in whose place others stand, [B] int64.
        unreachable: whether some of those have no stored bytes that can be read.
    """

    images: Tensor
    contents: Tensor
    grey_bits: int | None
    pixels: str
    files: str
    unread: Tensor
    unreachable: bool = False


def cached(
    listing: Listing,
    rows: Sequence[int],
    size: int,
    about: tuple[object, ...],
    decode: Callable[[Parts | None], Decoded],
    *,
    dataset: str = "",
    skips: bool = False,
    others: str = "",
) -> Decoded:
    """Return decoded images from the cache, or decode and keep them.

    Args:
        listing: of the split.
        rows: those that are decoded.
        size: S, pixels per side.
        about: how they are decoded.
        decode: decodes them, and keeps parts of them on the way.
        dataset: folder or name of the data set, for a list of what is kept.
        skips: whether images may have others in their place.
        others: which those may be.

    Raises:
        UsageError: the limit of the cache cannot be read.
    """
    most = kept.limit()
    files = listing.files(rows)
    names = key(*(file.name for file in files))
    found = cache_dir()
    if not files or found is None:
        if files:
            _say("there is no home directory")
        return decode(None)
    digest = key(kept.FORMAT, listing.key, len(rows), names, about)
    path = found / f"{digest:016x}.safetensors"
    needed = len(rows) * size * size * 3
    described: dict[str, object] = {"dataset": printable(dataset), "split": listing.split}
    described |= {"images": len(rows), "size": size}
    with _lock(path) as writable:
        with contextlib.suppress(FileNotFoundError):
            try:
                before = _load(path, listing, rows, files, others if skips else None)
                if before:
                    return before
            except (ValueError, SafetensorError) as damage:
                print(f"{path} is damaged ({damage}): decoding again", file=sys.stderr)
        if writable and _has_room(found, path.stem, needed, most):
            parts = Parts(path.with_suffix(kept.PARTS), listing, rows, described)
            decoded = decode(parts)
            # What others have kept meanwhile counts as well.
            described["others"] = others
            if _has_room(found, path.stem, needed, most) and _store(
                path, decoded, files, described
            ):
                parts.remove()
            return decoded
    return decode(None)


def _has_room(folder: Path, name: str, needed: int, most: int) -> bool:
    """Make room for a set of images; say if there is none, unless nothing is to be kept."""
    if needed > most > 0:
        print(
            f"images are not cached: they are {needed / 1e9:,.2f} GB, and {kept.LIMIT_VARIABLE} is "
            f"{most / 1e9:,.2f} GB",
            file=sys.stderr,
        )
    if needed > most or not most:
        return False
    if kept.make_room(folder, needed, most, name):
        return True
    print(
        f"images are not cached: other processes use what fills the {most / 1e9:,.2f} GB of "
        f"{kept.LIMIT_VARIABLE}",
        file=sys.stderr,
    )
    return False


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold the lock of a cache file; yield whether the cache can be written."""
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            state = held.enter_context(kept.open_lock(path.with_suffix(".lock"), wait=True))
        except OSError as error:
            _say(str(error))
            state = None
        if state is Lock.UNSUPPORTED:
            _say(f"{path.parent} cannot be locked")
        yield state is Lock.OURS


def _say(reason: str) -> None:
    print(f"images are not cached: {reason}; set DML_CACHE to a folder", file=sys.stderr)


def _load(
    path: Path,
    listing: Listing,
    rows: Sequence[int],
    files: Sequence[StoredFile],
    others: str | None,
) -> Decoded | None:
    """Return what is kept; None if it was made from other files, or has images that are not theirs.

    Args:
        path: of the set.
        listing: of the split.
        rows: of the set.
        files: that hold them.
        others: which images may stand in for those that cannot be read; None: none.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError, SafetensorError: it is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    with in_utf8(path) as readable, safe_open(readable, framework="pt") as file:
        about = file.metadata() or {}
        state, sidecar = state_of(files), path.with_suffix(".json")
        try:
            is_same = read_json(sidecar).get("state") == state
        except UnreadableError:
            is_same = False
        if not is_same and not _same_contents(listing, rows, about):
            return None
        _write_state(sidecar, state)  # it is used now
        images, contents = file.get_tensor("images"), file.get_tensor("contents")
        unread = file.get_tensor("unread")
        pixels = sha256(images)
        said = tuple(about.get(name) for name in ("sha256", "contents", "unread"))
        if said != (pixels, sha256(contents), sha256(unread)):
            raise ValueError("its sha256 differs from the recorded one")
        if len(unread) and about.get("others", "") != others:
            return None
        if about.get("unreachable") and any(_is_reachable(listing, row) for row in unread.tolist()):
            return None
        bits = about.get("grey_bits")
        return Decoded(
            images, contents, int(bits) if bits else None, pixels, about["files"], unread
        )


def _same_contents(listing: Listing, rows: Sequence[int], about: dict[str, str]) -> bool:
    try:
        return listing.digest(rows, None) == about.get("files")
    except OSError:
        return False


def _is_reachable(listing: Listing, row: int) -> bool:
    try:
        listing.content(row)
    except (OSError, ValueError):
        return False
    return True


def _store(
    path: Path, decoded: Decoded, files: Sequence[StoredFile], described: dict[str, object]
) -> bool:
    """Keep images; return whether that worked."""
    about = {
        "format": str(kept.FORMAT),
        "dataset": str(described["dataset"]),
        "split": str(described["split"]),
        "sha256": decoded.pixels,
        "contents": sha256(decoded.contents),
        "unread": sha256(decoded.unread),
        "others": str(described["others"]),
        "unreachable": "yes" if decoded.unreachable else "",
        "files": decoded.files,
        "grey_bits": str(decoded.grey_bits or ""),
    }
    names = ("images", "contents", "unread")
    try:
        path.with_suffix(".json").unlink(missing_ok=True)
        with replacing(path) as temporary:
            save_file({name: getattr(decoded, name) for name in names}, temporary, metadata=about)
        _write_state(path.with_suffix(".json"), state_of(files))
    except (OSError, SafetensorError) as error:
        _say(str(error))
        return False
    return True


def _write_state(path: Path, state: str) -> None:
    with contextlib.suppress(OSError):  # then the contents are compared again next time
        write_json(path, {"state": state})
