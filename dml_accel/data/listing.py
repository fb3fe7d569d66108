"""What a split consists of before an image is decoded: labels, and where each image lies."""

import hashlib
import os
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class StoredFile:
    """A file, and what the file system knows of it.

    Attributes:
        path: relative to the folder of the data set, or absolute.
        size: bytes.
        modified: time of the last change of its content, ns; anybody can set it.
        changed: time of the last change of its content or of this description, ns.
        inode: its number and that of its device.
    """

    path: str
    size: int
    modified: int
    changed: int
    inode: tuple[int, int]

    @classmethod
    def of(cls, path: str, stat: os.stat_result) -> "StoredFile":
        """Describe a file from its ``os.stat``."""
        inode = (stat.st_dev, stat.st_ino)
        return cls(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, inode)

    @property
    def name(self) -> tuple[str, int, int]:
        """What a copy of the file can share."""
        return self.path, self.size, self.modified

    @property
    def state(self) -> tuple[int, tuple[int, int]]:
        """What tells it from a file that was put in its place."""
        return self.changed, self.inode


# Arrays, because millions of objects take ten times the memory, and every worker process would
# come to hold a copy of its own: using an object writes to it.
@dataclass(frozen=True, eq=False)
class StoredFiles(Sequence[StoredFile]):
    """Many files in about 50 bytes each and their paths.

    Attributes:
        paths: all paths, one after the other, as the file system spells them.
        ends: where each path ends, [N] int64.
        sizes: bytes, [N] int64.
        times: of the last change of the content, and of that or the description, ns, [2, N] int64.
        inodes: devices and numbers, [2, N] uint64.
    """

    paths: bytes
    ends: np.ndarray
    sizes: np.ndarray
    times: np.ndarray
    inodes: np.ndarray

    @classmethod
    def of(cls, found: Iterable[tuple[str, os.stat_result]]) -> "StoredFiles":
        """Take files in the order of their paths."""
        paths: list[str] = []
        times, inodes, sizes = (array("q"), array("q")), (array("Q"), array("Q")), array("q")
        for path, stat in found:
            paths.append(path)
            sizes.append(stat.st_size)
            times[0].append(stat.st_mtime_ns)
            times[1].append(stat.st_ctime_ns)
            inodes[0].append(stat.st_dev)
            inodes[1].append(stat.st_ino)
        order = np.array(sorted(range(len(paths)), key=paths.__getitem__), np.int64)
        blob, ends = bytearray(), np.empty(len(paths), np.int64)
        for place, row in enumerate(order):
            blob += os.fsencode(paths[row])
            ends[place] = len(blob)
        return cls(
            bytes(blob),
            ends,
            np.array(sizes, np.int64)[order],
            np.stack([np.array(one, np.int64)[order] for one in times]),
            np.stack([np.array(one, np.uint64)[order] for one in inodes]),
        )

    @classmethod
    def joined(cls, parts: Sequence["StoredFiles"]) -> "StoredFiles":
        """Return the files of several parts, in their order."""
        if not parts:
            return cls.of(())
        starts = np.cumsum([0, *(len(part.paths) for part in parts[:-1])])
        return cls(
            b"".join(part.paths for part in parts),
            np.concatenate([part.ends + at for part, at in zip(parts, starts, strict=True)]),
            np.concatenate([part.sizes for part in parts]),
            np.concatenate([part.times for part in parts], 1),
            np.concatenate([part.inodes for part in parts], 1),
        )

    def take(self, rows: Sequence[int] | np.ndarray) -> "StoredFiles":
        """Return the files of some rows, in their order."""
        rows = np.asarray(rows, np.int64)
        blob, ends = bytearray(), np.empty(len(rows), np.int64)
        for place, row in enumerate(rows):
            blob += self.paths[self._start(row) : self.ends[row]]
            ends[place] = len(blob)
        return StoredFiles(
            bytes(blob), ends, self.sizes[rows], self.times[:, rows], self.inodes[:, rows]
        )

    def digest(self) -> str:
        """Return a sha256 that is another one when any of the files is another one."""
        found = hashlib.sha256(self.paths)
        for values in (self.ends, self.sizes, self.times, self.inodes):
            found.update(values.tobytes())
        return found.hexdigest()

    def path(self, row: int) -> str:
        """Return the path of a file."""
        return os.fsdecode(self.paths[self._start(row) : self.ends[row]])

    def _start(self, row: int) -> int:
        return int(self.ends[row - 1]) if row else 0

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, row: int) -> StoredFile: ...
    @overload
    def __getitem__(self, row: slice) -> "StoredFiles": ...
    def __getitem__(self, row: int | slice) -> "StoredFile | StoredFiles":
        """Return one file, or those of a range."""
        rows = range(len(self))[row]
        if isinstance(rows, range):
            return self.take(rows)
        modified, changed = self.times[:, rows].tolist()
        device, number = self.inodes[:, rows].tolist()
        return StoredFile(
            self.path(rows), int(self.sizes[rows]), modified, changed, (device, number)
        )

    def __iter__(self) -> Iterator[StoredFile]:
        return (self[row] for row in range(len(self)))


@dataclass(frozen=True)
class Listing:
    """The images of a split before they are decoded.

    Attributes:
        split: its name.
        labels: [N] int64.
        key: what the images depend on besides their files.
    """

    split: str
    labels: Tensor
    key: tuple[object, ...]

    def content(self, row: int) -> bytes:
        """Return the stored bytes of an image.

        Raises:
            ValueError, OSError: it has none, or may not be read.
        """
        raise NotImplementedError

    def place(self, row: int) -> str:
        """Return what to call an image in a message."""
        raise NotImplementedError

    def files(self, rows: Sequence[int]) -> Sequence[StoredFile]:
        """Return the files that hold the images of some rows; empty if they are in memory."""
        raise NotImplementedError

    def digest(self, rows: Sequence[int], contents: Sequence[bytes] | None) -> str:
        """Return the sha256 of the content of ``files``.

        Args:
            rows: the same.
            contents: sha256 of the stored bytes of each row, if they are known.
        """
        raise NotImplementedError

    def names(self, rows: Sequence[int]) -> Iterator[tuple[str, int]]:
        """Yield the name of each image within its data set, empty if it has none, and its bytes."""
        raise NotImplementedError

    def identity(
        self,
        rows: Sequence[int] | Tensor | None = None,
        sizes: Mapping[int, int] | None = None,
    ) -> str:
        """Return the sha256 of the names and sizes of images, without reading them.

        It is the same wherever the data set lies, and whenever it was copied.

        Args:
            rows: those that are meant, in that order; None for all.
            sizes: bytes that images had before they broke, by row.
        """
        if isinstance(rows, Tensor):
            rows = rows.tolist()
        meant = range(len(self.labels)) if rows is None else rows
        digest = hashlib.sha256()
        for row, (name, size) in zip(meant, self.names(meant), strict=True):
            size = size if sizes is None else sizes.get(row, size)
            # A name has several spellings in Unicode, and copies choose differently.
            name = unicodedata.normalize("NFC", name)
            digest.update(f"{size} {name}\0".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def file_digest(path: str | Path) -> bytes:
    """Return the sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
