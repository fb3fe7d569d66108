"""One image, from the bytes of a file to RGB levels, whole or as a square; the same everywhere.

Files are untrusted: only Pillow's own decoders run, and an image above Pillow's pixel limit is
refused by its header.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image

from dml_accel.core.config import DataConfig

_DEPTHS = (8, 10, 12, 14, 16)  # bits of a grey level, as cameras and scanners deliver them
_DARK = 16  # of 255: the brightest of 12 bits when only the high 8 of 16 are kept
# How an image with this EXIF orientation is brought upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
INTERPOLATIONS = tuple(one.name.lower() for one in Image.Resampling)
# Formats that Pillow passes to another program to run, or knows by name only.
_UNREADABLE = ("EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF")


@contextlib.contextmanager
def bounded_pixels() -> Iterator[None]:
    """Make Pillow refuse images above its pixel limit, which it checks in the header."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unusual tags are harmless
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def opened(file: str | Path | IO[bytes]) -> Image.Image:
    """Open an untrusted image; use it within ``bounded_pixels``.

    Raises:
        Exception: many kinds, if it is not an image.
    """
    return Image.open(file, formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.preinit()  # registers the common formats first, so that they are tried first
    Image.init()
    return tuple(name for name in Image.ID if name not in _UNREADABLE)


@functools.cache
def endings() -> frozenset[str]:
    """Return the endings of files that hold images which can be opened: ``.jpg`` and others."""
    known = _formats()
    return frozenset(end for end, name in Image.registered_extensions().items() if name in known)


def unreadable(error: BaseException) -> str:
    """Return why an image cannot be read, from whatever Pillow has raised."""
    # Pillow adds the address of our buffer, which tells a reader nothing.
    return str(error).split(" <_io.BytesIO")[0] or type(error).__name__


# ---------------------------------------------------------------- geometry


@dataclass(frozen=True)
class Geometry:
    """How an image of any size becomes a square, as torchvision and timm do it for evaluation.

    Attributes:
        size: S, pixels per side of the square.
        resize: R, at least S: pixels of the shorter side before the square is cut out of the
            middle; with ``squash``, of both sides.
        mode: ``center`` or ``squash``, as ``--crop-mode``; of which timm has the names.
        interpolation: one of ``INTERPOLATIONS``; training resizes bilinearly.
    """

    size: int
    resize: int
    mode: str = "center"
    interpolation: str = "bilinear"

    @classmethod
    def of(cls, data: DataConfig) -> "Geometry":
        """Return the geometry of a configuration."""
        return cls(data.size, data.resize, data.crop_mode)

    @classmethod
    def from_crop(
        cls, size: int, crop_pct: float, mode: str, interpolation: str = "bilinear"
    ) -> "Geometry":
        """Return the geometry that timm makes of ``crop_pct``: S divided by it is R."""
        return cls(size, math.floor(size / crop_pct), mode, interpolation)

    @property
    def crop_pct(self) -> float:
        """Share of the side that is cut out, from which timm computes R again."""
        share = self.size / self.resize
        return share if math.floor(self.size / share) == self.resize else math.nextafter(share, 0)

    def square(self, image: Image.Image) -> Image.Image:
        """Return the square of an upright image."""
        width, height = image.size
        short, long = sorted(image.size)
        if self.mode == "squash":
            wanted = (self.resize, self.resize)
        elif short == self.resize:
            wanted = image.size
        else:
            other = int(self.resize * long / short)
            wanted = (self.resize, other) if width <= height else (other, self.resize)
        if wanted != image.size:
            image = image.resize(wanted, Image.Resampling[self.interpolation.upper()])
        left, top = (round((side - self.size) / 2) for side in image.size)
        if image.size != (self.size, self.size):
            image = image.crop((left, top, left + self.size, top + self.size))
        return image


# ---------------------------------------------------------------- levels


def grey_maximum(image: Image.Image) -> int | None:
    """Return the brightest level of a grey image of 16 bits; None for other images."""
    return int(np.asarray(image).max()) if image.mode.startswith("I;16") else None


def depth_of(level: int) -> int:
    """Return how many bits hold a grey level: 8, 10, 12, 14 or 16."""
    return next(bits for bits in _DEPTHS if level < 2**bits)


def to_rgb(
    image: Image.Image, geometry: Geometry | None, grey_bits: int | None = None
) -> np.ndarray:
    """Return an image as RGB levels [H, W, 3] uint8, as a viewer shows it.

    It is turned as its EXIF orientation says, and what is transparent is painted over white.

    Args:
        image: as opened.
        geometry: how it becomes a square; None: it stays whole.
        grey_bits: how many of the 16 bits of a grey image its levels use: 10 and 12 are common.
            Brighter levels become white. None: as few as hold the brightest level of this image.

    Raises:
        ValueError: the range of its pixels is unknown.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"the range of pixels of mode {image.mode} is unknown; store 8 or 16 bits")
    wide = any(
        ";16" in str(tile[3]) for tile in getattr(image, "tile", ())
    )  # gone once it is loaded
    image.load()
    turn = _TURNS.get(_orientation(image))  # after loading, because some formats turn themselves
    brightest = grey_maximum(image)
    if brightest is not None:  # Pillow's own conversion would clip at 255
        white = 2 ** (grey_bits or depth_of(brightest)) - 1
        levels = np.asarray(image).astype(np.uint32).clip(0, white) * 255 // white
        image = Image.fromarray(levels.astype(np.uint8))
    elif wide and 0 < np.asarray(image.convert("RGB")).max() < _DARK:
        raise ValueError("it uses the low bits of 16-bit colour, of which 8 are kept; store 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":  # converting would copy it
        image = image.convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
    return np.asarray(image if geometry is None else geometry.square(image))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a loaded image; 1, upright, if its tags cannot be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # tags are as untrusted as pixels, and Pillow raises many kinds
        return 1
