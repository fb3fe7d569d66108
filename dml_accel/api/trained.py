"""Trained networks: load, evaluate, predict, export."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

PathLike = str | os.PathLike[str]


class Networks:
    """Trained networks, ready to predict.

    Attributes:
        names: of the peers.
        classes: their names.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]

    def predict(self, images: Any, peer: str | None = None) -> list[Any]:
        """Return the likeliest classes of images."""
        raise NotImplementedError

    def logits(self, images: Any) -> "Tensor":
        """Return the logits of every network, [K, B, C]."""
        raise NotImplementedError


def load(
    source: PathLike,
    checkpoint: PathLike | int | None = None,
    weights: str | None = None,
    cpu: bool = False,
) -> Networks:
    """Load trained networks from a run, a peer's folder or ``hf-hub:owner/name``."""
    raise NotImplementedError


def evaluate(
    source: PathLike,
    *,
    dataset: PathLike | None = None,
    dataset_config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    test_split: str | None = None,
    test_fraction: float | None = None,
    bad_images: str | None = None,
    feed: str = "auto",
    workers: int | None = None,
    to: PathLike | None = None,
    checkpoint: PathLike | int | None = None,
    weights: str | None = None,
    cpu: bool = False,
) -> Any:
    """Evaluate trained networks on a data set, as the command ``evaluate`` does."""
    raise NotImplementedError


def predict(
    source: PathLike,
    images: Any,
    *,
    peer: str | None = None,
    checkpoint: PathLike | int | None = None,
    weights: str | None = None,
    cpu: bool = False,
) -> list[Any]:
    """Predict the classes of images, as the command ``predict`` does."""
    raise NotImplementedError


def export(
    source: PathLike,
    *,
    to: PathLike | None = None,
    peer: str | None = None,
    format: str = "safetensors",  # noqa: A002 - the name of the flag
    checkpoint: PathLike | int | None = None,
    weights: str | None = None,
    push_to: str | None = None,
    private: bool = False,
    network: "nn.Module | None" = None,
) -> Any:
    """Write a trained network to a folder of its own, as the command ``export`` does."""
    raise NotImplementedError
