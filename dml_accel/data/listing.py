"""What a split consists of before an image is decoded: labels, and where each image lies."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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

    def files(self, rows: Sequence[int]) -> list[StoredFile]:
        """Return the files that hold the images of some rows; empty if they are in memory."""
        raise NotImplementedError

    def digest(self, rows: Sequence[int], contents: Sequence[bytes] | None) -> str:
        """Return the sha256 of the content of ``files``.

        Args:
            rows: the same.
            contents: sha256 of the stored bytes of each row, if they are known.
        """
        raise NotImplementedError


def file_digest(path: str | Path) -> bytes:
    """Return the sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
