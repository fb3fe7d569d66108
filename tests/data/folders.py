"""Folders of images, for tests that read them."""

import io
from collections.abc import Callable

import datasets
from PIL import Image

from dml_accel.data import sources
from tests.helpers import tiny_config

Write = Callable[..., str]
CLASSES = ["cat", "dog", "eel"]
SIZE = 16


def png(value: int, mode: str = "RGB", size: tuple[int, int] = (SIZE, SIZE)) -> bytes:
    """Return a PNG of one colour."""
    buffer = io.BytesIO()
    colour = value if mode in ("L", "P") else (value, value // 2, 7)
    Image.new(mode, size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def split(
    labels: list[int | None], images: list[bytes | None] | None = None, **extra: object
) -> datasets.Dataset:
    """Return a split in the schema of CIFAR-100; ``extra`` columns are (type, values)."""
    images = images or [png(10 * i) for i in range(len(labels))]
    features = {
        "img": datasets.Image(),
        "fine_label": datasets.ClassLabel(names=CLASSES),
        "coarse_label": datasets.ClassLabel(names=["pet", "fish"]),
    }
    columns = {
        "img": [image and {"bytes": image, "path": None} for image in images],
        "fine_label": labels,
        "coarse_label": [0] * len(labels),
    }
    features |= {name: kind for name, (kind, _) in extra.items()}
    columns |= {name: values for name, (_, values) in extra.items()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def read(dataset: str, **changes: object) -> sources.Source:
    """Read a data set at ``SIZE`` pixels."""
    settings: dict[str, object] = {"dataset": dataset, "image_size": SIZE}
    return sources.read(tiny_config(**settings | changes).data)
