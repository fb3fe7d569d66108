"""Parts of a set of images that is being decoded, so that an interrupted start goes on there.

A part holds what was decoded of some consecutive images: complete or absent, and checked against
its sha256 when it is read. Parts lie in a folder of the set, whose name says from which files they
come, and how they are decoded; each says what the file system knew of its own files besides.
"""

import contextlib
import hashlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dml_accel.core.files import in_utf8, replacing, write_json
from dml_accel.data.kept import ABOUT
from dml_accel.data.listing import Listing, StoredFile
from dml_accel.data.splits import sha256

PART_BYTES = 64 * 2**20  # of images
UNREAD, NOT_GREY = -2, -1


@dataclass(frozen=True)
class Pass:
    """Images that are decoded, and what else is known of them; the first pass fills it.

    Attributes:
        images: [M, S, S, 3] uint8.
        contents: sha256 of the stored bytes of each, [M, 32] uint8.
        levels: brightest level of the grey images of 16 bits, [M] int32; -1 for other images, and
            -2 for those that are not decoded.
    """

    images: np.ndarray
    contents: np.ndarray
    levels: np.ndarray

    @classmethod
    def empty(cls, images: int, size: int) -> "Pass":
        """Return one for so many images of ``size`` x ``size`` pixels, none of them decoded."""
        return cls(
            np.empty((images, size, size, 3), np.uint8),
            np.zeros((images, 32), np.uint8),
            np.full(images, UNREAD, np.int32),
        )

    @property
    def spans(self) -> list[slice]:
        """The places of every part."""
        step = max(1, PART_BYTES // max(1, self.images[:1].nbytes))
        count = len(self.images)
        return [slice(at, min(at + step, count)) for at in range(0, count, step)]

    def tensors(self, span: slice) -> dict[str, Tensor]:
        """Return a part; it shares our memory."""
        return {name: torch.from_numpy(value[span]) for name, value in vars(self).items()}


class Parts:
    """The parts of one set on disk.

    Args:
        folder: theirs.
        listing: of the split.
        rows: those of the set.
        about: what the set is, for a list of what is kept.
    """

    def __init__(
        self, folder: Path, listing: Listing, rows: Sequence[int], about: dict[str, object]
    ) -> None:
        self._folder, self._listing, self._rows, self._about = folder, listing, rows, about
        self._keeps = True
        self.saved = 0

    def load(self, done: Pass, number: int) -> bool:
        """Fill in a part; return whether it is there, undamaged, and of the same files."""
        path, span = self._path(number), done.spans[number]
        if not path.exists():
            return False
        try:
            with in_utf8(path) as readable, safe_open(readable, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("state") != self._state(span):
                    return False
                found = {name: file.get_tensor(name) for name in done.tensors(span)}
            if about.get("sha256") != _digest(found):
                raise ValueError("its sha256 differs from the recorded one")
            for name, value in done.tensors(span).items():
                if found[name].shape != value.shape:
                    raise ValueError(f"its {name} are {tuple(found[name].shape)}")
                value.copy_(found[name])
        except (OSError, ValueError, RuntimeError, SafetensorError) as damage:
            print(f"{path} is damaged ({damage}): decoding it again", file=sys.stderr)
            done.levels[span] = UNREAD
            return False
        return True

    def save(self, done: Pass, number: int) -> None:
        """Keep a part; without room for it the set is decoded all the same."""
        if not self._keeps:
            return
        span = done.spans[number]
        tensors = done.tensors(span)
        about = {"state": self._state(span), "sha256": _digest(tensors)}
        try:
            if not self._folder.exists():
                self._folder.mkdir()
                write_json(self._folder / ABOUT, self._about)
            with replacing(self._path(number)) as temporary:
                save_file(tensors, temporary, metadata=about)
            self.saved += 1
        except (OSError, SafetensorError) as error:
            self._keeps = False
            print(f"what is decoded is not kept on the way: {error}", file=sys.stderr)

    def remove(self) -> None:
        """Remove all of them: the set is complete."""
        with contextlib.suppress(OSError):
            shutil.rmtree(self._folder)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.safetensors"

    def _state(self, span: slice) -> str:
        return state_of(self._listing.files(self._rows[span]))


def state_of(files: Sequence[StoredFile]) -> str:
    """Return a digest of what the file system knows of some files."""
    return hashlib.sha256(repr([file.state for file in files]).encode()).hexdigest()


def _digest(tensors: dict[str, Tensor]) -> str:
    listed = sorted((name, str(value.dtype), sha256(value)) for name, value in tensors.items())
    return hashlib.sha256(repr(listed).encode()).hexdigest()
