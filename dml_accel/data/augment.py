"""The words of ``--augment``: read, checked, and applied to one image at a time or to a batch.

Crop, flip and erasing are arithmetic on a whole batch, the first two in ``batches``. torchvision
does the others, image by image, as functions of the pixels and a key.

Shape letters: N images, B rows of a batch, H and W pixels of an image as it is given, S pixels a
side of what networks are given.
"""

import difflib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from dml_accel.core.assignments import literal, pairs_in
from dml_accel.core.config import AUGMENTATIONS
from dml_accel.core.errors import UsageError

Arguments = dict[str, Any]
# What stands in the brackets of a word, with torchvision's names.
_TAKES: Mapping[str, tuple[str, ...]] = {
    "random-resized-crop": ("scale", "ratio", "interpolation"),
    "randaugment": ("num_ops", "magnitude", "num_magnitude_bins", "interpolation"),
    "trivialaugment": ("num_magnitude_bins", "interpolation"),
    "color-jitter": ("brightness", "contrast", "saturation", "hue"),
    "erasing": ("p", "scale", "ratio"),
}
_ERASING = {"p": 0.25, "scale": (0.02, 0.33), "ratio": (0.3, 3.3)}  # but for p, torchvision's
_COLOURS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
_TRIES = 10  # for a box that fits, as in torchvision
_TRIALS = 24  # images on which arguments are tried: each of RandAugment's operations has its turn


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value))


def _is_range(value: Any) -> bool:
    return _is_pair(value) and 0 <= value[0] <= value[1]


_Rule = tuple[Callable[[Any], bool], str]
_COLOUR: _Rule = (lambda one: _is_number(one) or _is_pair(one), "a number, or two as (0.5,1.5)")
# torchvision refuses more, but some values not before an image meets them, and others never.
_ALLOWED: Mapping[str, _Rule] = {
    "p": (lambda p: _is_number(p) and 0 <= p <= 1, "a number from 0 to 1"),
    "scale": (
        lambda scale: _is_range(scale) and 0 < scale[1] <= 1,
        "two shares of the area, the smaller first, as (0.2,1)",
    ),
    "ratio": (
        lambda ratio: _is_range(ratio) and ratio[0] > 0,
        "two positive numbers, the smaller first, as (0.75,1.33)",
    ),
    "num_ops": (lambda n: type(n) is int and 1 <= n <= 14, "a whole number from 1 to 14"),
    "num_magnitude_bins": (
        lambda n: type(n) is int and 2 <= n <= 1000,
        "a whole number from 2 to 1000",
    ),
    "magnitude": (lambda n: type(n) is int and n >= 0, "a whole number, at least 0"),
    "interpolation": (
        lambda name: name in ("nearest", "bilinear", "bicubic"),
        "nearest, bilinear or bicubic",
    ),
    **dict.fromkeys(("brightness", "contrast", "saturation", "hue"), _COLOUR),
}


def parse_augment(words: Sequence[str]) -> dict[str, Arguments]:
    """Return the arguments of each word, in the order in which words are applied.

    Args:
        words: of ``--augment``, as ``flip`` or ``randaugment[magnitude=7]``; ``crop-flip`` is
            returned as ``crop`` and ``flip``, and ``none`` not at all.

    Raises:
        UsageError: a word is unknown, repeated or excludes another, or torchvision refuses an
            argument.
    """
    found: dict[str, Arguments] = {}
    for text in words:
        match = re.fullmatch(r"([^\s\[\]]+)(?:\[(.*)\])?", text)
        if not match:
            raise UsageError(
                f"--augment {text!r} cannot be parsed: write a word, or 'word[key=value,key=value]'"
            )
        word, inner = match[1], match[2] or ""
        _require_known(word)
        arguments = _arguments(text, word, inner)
        for one in ("crop", "flip") if word == "crop-flip" else (word,):
            if one in found:
                raise UsageError(f"--augment {' '.join(words)}: {one} is there twice")
            found[one] = arguments
    if "none" in found and len(found) > 1:
        raise UsageError(f"--augment {' '.join(words)}: none stands alone")
    if "crop" in found and "random-resized-crop" in found:
        raise UsageError(
            f"--augment {' '.join(words)}: crop and random-resized-crop exclude each other"
        )
    for word, arguments in found.items():
        _try(word, arguments)
    return {word: found[word] for word in AUGMENTATIONS if word in found and word != "none"}


def _require_known(word: str) -> None:
    if word not in AUGMENTATIONS:
        near = difflib.get_close_matches(word, AUGMENTATIONS, n=1, cutoff=0.4)
        raise UsageError(
            f"--augment: unknown word {word!r}; nearest: {', '.join(near) or 'none of them'}; "
            f"the words are {', '.join(AUGMENTATIONS)}"
        )


def _arguments(text: str, word: str, inner: str) -> Arguments:
    """Return the arguments in a word's brackets."""
    found: Arguments = {}
    takes = _TAKES.get(word, ())
    for part in pairs_in(inner) if inner.strip() else ():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise UsageError(f"--augment {text!r}: write arguments as [key=value,key=value]")
        if name not in takes:
            known = f"it takes {', '.join(takes)}" if takes else "it takes no arguments"
            raise UsageError(f"--augment {text!r}: {word} takes no {name}; {known}")
        if name in found:
            raise UsageError(f"--augment {text!r}: {name} is there twice")
        found[name] = _value(text, name, value)
    return found


def _value(text: str, name: str, written: str) -> Any:
    value = literal(written)
    value = tuple(value) if isinstance(value, list) else value
    holds, allowed = _ALLOWED[name]
    if not holds(value):
        raise UsageError(f"--augment {text!r}: {name} is {written}; it must be {allowed}")
    return value


def _try(word: str, arguments: Arguments) -> None:
    """Refuse arguments that torchvision refuses, at once or when it meets an image."""
    bins = arguments.get("num_magnitude_bins", 31)
    if word == "randaugment" and arguments.get("magnitude", 9) >= bins:
        raise UsageError(
            f"--augment: magnitude is {arguments.get('magnitude', 9)}; it must be below the "
            f"{bins} of num_magnitude_bins"
        )
    if not arguments or word not in _MAKE:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            transform = _Seeded([_MAKE[word](8, arguments)])
            transform.batch([torch.zeros(3, 8, 8, dtype=torch.uint8)] * _TRIALS, range(_TRIALS))
    except Exception as error:
        said = ", ".join(f"{name}={value}" for name, value in arguments.items())
        reason = " ".join(str(error).split())
        raise UsageError(f"--augment: torchvision refuses {word}[{said}]: {reason}") from error


# ---------------------------------------------------------------- image by image


def _modes(arguments: Arguments) -> Arguments:
    return {
        name: InterpolationMode(value) if name == "interpolation" else value
        for name, value in arguments.items()
    }


_Transform = Callable[[Tensor], Tensor]
_MAKE: Mapping[str, Callable[[int, Arguments], _Transform]] = {
    "random-resized-crop": lambda size, words: v2.RandomResizedCrop(
        size, antialias=True, **_modes(words)
    ),
    "randaugment": lambda _, words: v2.RandAugment(**_modes(words)),
    "trivialaugment": lambda _, words: v2.TrivialAugmentWide(**_modes(words)),
    "color-jitter": lambda _, words: v2.ColorJitter(**(words or _COLOURS)),
}


class _Seeded:
    """Transforms one after the other, with all that is random in them decided by a key."""

    def __init__(self, transforms: Sequence[_Transform]) -> None:
        self._transforms = transforms

    def each(self, images: Iterable[Tensor], keys: Iterable[int]) -> list[Tensor]:
        # They draw from torch's global generator of the CPU, which must not move for others.
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            return [self._one(image, key) for image, key in zip(images, keys, strict=True)]

    def batch(self, images: Iterable[Tensor], keys: Iterable[int]) -> Tensor:
        return torch.stack(self.each(images, keys))

    def _one(self, image: Tensor, key: int) -> Tensor:
        torch.default_generator.manual_seed(key)
        for transform in self._transforms:
            image = transform(image)
        return image


class ImageTransform:
    """What ``--augment`` does to each image by itself: a function of its pixels and a key.

    Images come from anywhere and may differ in size where ``random-resized-crop`` is a word. Crop,
    flip and erasing are not done here. torch's random state stays as it was.

    Args:
        words: of ``--augment``.
        size: S, for ``random-resized-crop``.

    Attributes:
        arguments: of all words; see ``parse_augment``.

    Raises:
        UsageError: see ``parse_augment``.
    """

    def __init__(self, words: Sequence[str], size: int) -> None:
        self.arguments = parse_augment(words)
        self._transforms = [
            _MAKE[word](size, given) for word, given in self.arguments.items() if word in _MAKE
        ]
        self._seeded = _Seeded(self._transforms)

    def __bool__(self) -> bool:
        """Whether it does anything."""
        return bool(self._transforms)

    def __call__(self, image: Tensor, key: int) -> Tensor:
        """Return an image [3, H, W] uint8 as the key has it, [3, S, S] or [3, H, W] uint8."""
        return self.batch([image], [key])[0]

    def batch(self, images: Iterable[Tensor], keys: Iterable[int]) -> Tensor:
        """Return several images, each as it would be alone, stacked: [B, 3, S, S] uint8."""
        return self._seeded.batch(images, keys)

    def each(self, images: Iterable[Tensor], keys: Iterable[int]) -> list[Tensor]:
        """Return several images, each as it would be alone."""
        return self._seeded.each(images, keys)


# ---------------------------------------------------------------- a batch at a time


def erasing_boxes(
    images: int, size: int, arguments: Arguments, generate: torch.Generator
) -> Tensor:
    """Draw the box of each image that is erased, as torchvision's RandomErasing does.

    Args:
        images: N.
        size: S.
        arguments: of the word: ``p``, ``scale`` and ``ratio``.
        generate: what draws.

    Returns:
        First row, row after the last, first column and column after the last, [4, N] int64; an
        image that stays whole has no rows.
    """
    chosen: Arguments = _ERASING | arguments
    least, most = chosen["scale"]
    low, high = (math.log(ratio) for ratio in chosen["ratio"])

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, images, generator=generate, dtype=torch.float64)

    height = width = torch.full((images,), size)
    for _ in range(_TRIES):
        area, shape = uniform(2)
        area, shape = size**2 * (least + (most - least) * area), (low + (high - low) * shape).exp()
        fits = (height < size) & (width < size)  # an earlier one did
        height = torch.where(fits, height, (area * shape).sqrt().round().long())
        width = torch.where(fits, width, (area / shape).sqrt().round().long())
    erased = (height < size) & (width < size) & (uniform(1)[0] < chosen["p"])
    height, width = (torch.where(erased, side, 0) for side in (height, width))
    y, x = uniform(2)
    top, left = (y * (size - height + 1)).long(), (x * (size - width + 1)).long()
    return torch.stack([top, top + height, left, left + width])


def erase(images: Tensor, boxes: Tensor, place: Tensor) -> Tensor:
    """Set a box of each image to 0, in place.

    Args:
        images: normalised, [B, 3, S, S], so that 0 is the mean colour.
        boxes: of these images, [4, B]; see ``erasing_boxes``.
        place: 0 to S - 1 on the device of both.
    """
    top, bottom, left, right = boxes[..., None]  # [B, 1]
    rows, columns = (place >= top) & (place < bottom), (place >= left) & (place < right)  # [B, S]
    return images.masked_fill_(rows[:, None, :, None] & columns[:, None, None, :], 0)
