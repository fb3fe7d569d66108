"""The cache of decoded images: one safetensors file for the rows of a split at one size.

A file is found by the names, sizes and times of the files that the images come from. If the file
system knows that one of those was replaced all the same, their contents are compared before what
was kept is used. What is read is checked against its sha256.
"""

import contextlib
import hashlib
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
from dml_accel.core.locks import Lock, lock
from dml_accel.core.rng import key
from dml_accel.data.listing import Listing, StoredFile
from dml_accel.data.splits import sha256

_FORMAT = 2


@dataclass(frozen=True)
class Decoded:
    """The decoded images of some rows.

    Attributes:
        images: [M, S, S, 3] uint8.
        contents: 64 bits of the sha256 of each row's stored bytes, [M] int64.
        grey_bits: of the 16-bit grey images; None if there are none.
        pixels: sha256 of ``images``.
        files: sha256 of the files that they come from.
    """

    images: Tensor
    contents: Tensor
    grey_bits: int | None
    pixels: str
    files: str


def cached(
    listing: Listing,
    rows: Sequence[int],
    about: tuple[object, ...],
    decode: Callable[[], Decoded],
) -> Decoded:
    """Return decoded images from the cache, or decode and keep them.

    Args:
        listing: of the split.
        rows: those that are decoded.
        about: how they are decoded.
        decode: decodes them.
    """
    files = listing.files(rows)
    names = key(*(file.name for file in files))
    found = cache_dir()
    if not files or found is None:
        if files:
            _say("there is no home directory")
        return decode()
    digest = key(_FORMAT, listing.key, len(rows), names, about)
    path = found / f"{digest:016x}.safetensors"
    with _lock(path) as writable:
        with contextlib.suppress(FileNotFoundError):
            try:
                kept = _load(path, listing, rows, files)
                if kept:
                    return kept
            except (ValueError, SafetensorError) as damage:
                print(f"{path} is damaged ({damage}): decoding again", file=sys.stderr)
        decoded = decode()
        if writable:
            _store(path, decoded, files)
        return decoded


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold the lock of a cache file; yield whether the cache can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path.with_suffix(".lock"), "w")  # noqa: SIM115
    except OSError as error:
        _say(str(error))
        yield False
        return
    with handle:
        state, reason = lock(handle, wait=True)
        if state is Lock.UNSUPPORTED:
            _say(f"{path.parent} cannot be locked ({reason})")
        yield state is Lock.OURS


def _say(reason: str) -> None:
    print(f"images are not cached: {reason}; set DML_CACHE to a folder", file=sys.stderr)


def _state_of(files: Sequence[StoredFile]) -> str:
    return hashlib.sha256(repr([file.state for file in files]).encode()).hexdigest()


def _load(
    path: Path, listing: Listing, rows: Sequence[int], files: Sequence[StoredFile]
) -> Decoded | None:
    """Return what is kept; None if it was made from other files.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError, SafetensorError: it is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    with in_utf8(path) as readable, safe_open(readable, framework="pt") as file:
        about = file.metadata() or {}
        state, sidecar = _state_of(files), path.with_suffix(".json")
        try:
            is_same = read_json(sidecar).get("state") == state
        except UnreadableError:
            is_same = False
        if not is_same:
            if listing.digest(rows, None) != about.get("files"):
                return None
            _write_state(sidecar, state)
        images, contents = file.get_tensor("images"), file.get_tensor("contents")
        pixels = sha256(images)
        if about.get("sha256") != pixels or about.get("contents") != sha256(contents):
            raise ValueError("its sha256 differs from the recorded one")
        bits = about.get("grey_bits")
        return Decoded(images, contents, int(bits) if bits else None, pixels, about["files"])


def _store(path: Path, decoded: Decoded, files: Sequence[StoredFile]) -> None:
    about = {
        "sha256": decoded.pixels,
        "contents": sha256(decoded.contents),
        "files": decoded.files,
        "grey_bits": str(decoded.grey_bits or ""),
    }
    try:
        path.with_suffix(".json").unlink(missing_ok=True)
        with replacing(path) as temporary:
            tensors = {"images": decoded.images, "contents": decoded.contents}
            save_file(tensors, temporary, metadata=about)
        _write_state(path.with_suffix(".json"), _state_of(files))
    except (OSError, SafetensorError) as error:
        _say(str(error))


def _write_state(path: Path, state: str) -> None:
    with contextlib.suppress(OSError):  # then the contents are compared again next time
        write_json(path, {"state": state})
