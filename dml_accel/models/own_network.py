"""The folder of a trained network that timm does not build: a module of the caller of ``learn``.

    model.safetensors    the weights, by the names of ``state_dict``
    config.json          class of the module, shape of its inputs, classes
    README.md            what it is, and how its weights are loaded

Whoever uses the weights brings the module.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dml_accel.core.errors import UsageError, one_line
from dml_accel.core.files import in_utf8, read_json, replacing, write_json, write_text
from dml_accel.core.tables import percent, render
from dml_accel.data.batches import Normalisation
from dml_accel.models.timm_config import FILE, OURS, OWN

WEIGHTS, CARD = "model.safetensors", "README.md"
_TEMPLATE = Path(__file__).parent / "templates" / "own.md.j2"


@dataclass(frozen=True)
class OwnNetwork:
    """What a folder says of a network.

    Attributes:
        kind: the class of the module, with its Python module: ``photos.Net``.
        shape: of an image, as the network is given it.
        classes: how many there are.
        normalisation: of uint8 images; None where images were used as they were given.
    """

    kind: str
    shape: tuple[int, ...]
    classes: int
    normalisation: Normalisation | None = None


def kind_of(module: nn.Module) -> str:
    """Return the class of a module, with its Python module unless that is a script."""
    kind = type(module)
    full = f"{kind.__module__}.{kind.__qualname__}"
    return kind.__qualname__ if kind.__module__ == "__main__" else full


def layout_of(module: nn.Module) -> str:
    """Return in words what tells the weights of a module from others, whatever their values."""
    shapes = [(name, list(one.shape)) for name, one in module.state_dict().items()]
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]
    numbers = sum(one.numel() for one in module.state_dict().values())
    return f"{type(module).__name__} of {numbers:,} numbers in {len(shapes)} tensors ({digest})"


# ---------------------------------------------------------------- writing


def write_own(
    folder: Path,
    name: str,
    network: OwnNetwork,
    weights: Mapping[str, Tensor],
    *,
    metrics: Mapping[str, Any],
    images: str,
    steps: int,
    teachers: list[str],
    note: str = "",
) -> None:
    """Write the three files of a trained network.

    Args:
        folder: created if it is missing.
        name: of the network.
        network: what it is.
        weights: that are written.
        metrics: on the test images.
        images: what it was trained on, in words.
        steps: optimizer steps taken.
        teachers: whom it learned from; empty if it learned alone.
        note: which weights these are; empty if they are the last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Cloned, because the format refuses tensors that share memory (tied weights).
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in weights.items()}
    with replacing(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    own: dict[str, Any] = {"class": network.kind, "input_shape": list(network.shape)}
    if network.normalisation is not None:
        own |= {
            "mean": list(network.normalisation.mean),
            "std": list(network.normalisation.std),
        }
    content = {"num_classes": network.classes, OURS: {OWN: own}}
    write_json(folder / FILE, content)
    text = render(
        _TEMPLATE,
        name=name,
        kind=network.kind.rpartition(".")[2],
        network=network,
        metrics=metrics,
        images=images,
        steps=steps,
        teachers=teachers,
        note=note,
        percent=percent,
    )
    write_text(folder / CARD, text)


# ---------------------------------------------------------------- reading


def read_own(folder: Path) -> OwnNetwork:
    """Read what a folder says of a network.

    Raises:
        UsageError: config.json cannot be read, or does not describe a network of a caller's.
    """
    path = folder / FILE
    content = read_json(path)
    ours = content.get(OURS)
    own = ours.get(OWN) if isinstance(ours, dict) else None
    try:
        if not isinstance(own, dict):
            raise KeyError(OWN)
        shape = tuple(int(side) for side in own["input_shape"])
        classes = int(content["num_classes"])
        normalisation = None
        if "mean" in own:
            mean, std = (tuple(float(one) for one in own[name]) for name in ("mean", "std"))
            normalisation = Normalisation(mean, std)
        if min((classes, *shape)) < 1:
            raise ValueError("a size below 1")
        return OwnNetwork(str(own["class"]), shape, classes, normalisation)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} does not describe a network that learn has trained: {error!r}"
        ) from error


def load_own(folder: Path, network: nn.Module) -> None:
    """Load the weights of a folder into the caller's module, in their precision.

    Raises:
        UsageError: they cannot be read, or belong to another module, which is left as it is.
    """
    path, expected = folder / WEIGHTS, network.state_dict()
    try:
        with in_utf8(path) as readable, safe_open(readable, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: list(one.get_shape()) for name, one in slices.items()}
            wanted = {name: list(one.shape) for name, one in expected.items()}
            if shapes != wanted:  # before anything is read
                names = sorted(shapes.keys() | wanted.keys())
                wrong = [name for name in names if shapes.get(name) != wanted.get(name)]
                raise UsageError(
                    f"{path} does not fit network=, a {type(network).__name__}: {wrong[0]} is "
                    f"{shapes.get(wrong[0], 'missing')} in the file and "
                    f"{wanted.get(wrong[0], 'missing')} in the network"
                )
            weights = {name: file.get_tensor(name) for name in shapes}
    except UsageError:
        raise
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {one_line(error)}") from error
    if any(one.dtype.itemsize == 8 and one.is_floating_point() for one in weights.values()):
        network.double()
    network.load_state_dict(weights)
