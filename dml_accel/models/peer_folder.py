"""The folder of a trained peer, ``peers/<name>``: one reader, one writer.

    model.safetensors    the weights
    config.json          how timm builds the network and prepares its input (timm_config.py)
    README.md            the model card (model_card.py)

timm loads such a folder as ``local-dir:<folder>``. A folder may be untrusted: its JSON is limited
in size, its weights must fit the network, and timm builds that from a registered name and from
plain arguments, none of which makes it open another file.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dml_accel.core.errors import UsageError, one_line
from dml_accel.core.files import in_utf8, replacing, write_text
from dml_accel.data.batches import Normalisation
from dml_accel.data.pixels import Geometry
from dml_accel.models.build import image_problem
from dml_accel.models.model_card import peer_card
from dml_accel.models.spec import PeerSpec, opens_files
from dml_accel.models.timm_config import (
    FILE,
    read_geometry,
    read_timm_config,
    write_timm_config,
)

WEIGHTS = "model.safetensors"
CARD = "README.md"
_LARGEST_BUFFERS = 2**26  # bytes of buffers that are not among the weights


@dataclass(frozen=True)
class PeerFolder:
    """A trained peer as its folder describes it, before its network is built.

    Attributes:
        path: the folder.
        arch: timm's name of the network.
        arguments: what timm builds it with.
        classes: class names; empty if the folder has none.
        number_of_classes: how many classes there are.
        geometry: how images become its inputs.
        normalisation: of its inputs.
        sha256: of model.safetensors.
        grey_bits: how many of the 16 bits of a 16-bit grey image hold its levels; None if the
            network saw no such images.
    """

    path: Path
    arch: str
    arguments: dict[str, Any]
    classes: tuple[str, ...]
    number_of_classes: int
    geometry: Geometry
    normalisation: Normalisation
    sha256: str
    grey_bits: int | None = None

    @property
    def image_size(self) -> int:
        """Pixels per side of its inputs."""
        return self.geometry.size


# ---------------------------------------------------------------- reading


def find_peers(path: Path) -> list[Path]:
    """Return the peer folders that a path names: itself, those of a run, or those in it.

    Raises:
        UsageError: there are none.
    """
    if (path / WEIGHTS).is_file():
        return [path]
    for pattern in (f"peers/*/{WEIGHTS}", f"*/{WEIGHTS}"):
        found = sorted(file.parent for file in path.glob(pattern))
        if found:
            return found
    raise UsageError(
        f"{path} holds no trained peer: neither {WEIGHTS} nor peers/<name> of a finished run"
    )


def read_peer(path: Path) -> PeerFolder:
    """Read one peer's folder.

    Raises:
        UsageError: a file is missing, too large or malformed; the text names it.
    """
    file, weights = path / FILE, path / WEIGHTS
    config = read_timm_config(file)
    try:
        with open(weights, "rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{weights} cannot be read: {error.strerror}") from error
    try:
        cfg = config.content["pretrained_cfg"]
        found = PeerFolder(
            path=path,
            arch=config.arch,
            arguments=config.arguments,
            classes=tuple(str(name) for name in config.content.get("label_names") or ()),
            number_of_classes=int(config.content["num_classes"]),
            geometry=read_geometry(file, cfg),
            normalisation=Normalisation(_three(cfg["mean"]), _three(cfg["std"])),
            sha256=sha256,
            grey_bits=config.grey_bits,
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UsageError(f"{file} does not describe a network as timm does: {error!r}") from error
    if not all(0 < value < math.inf for value in found.normalisation.std):
        raise UsageError(f"{file}: std {list(found.normalisation.std)} must be above 0")
    for name in found.arguments:
        if opens_files(name):
            raise UsageError(f"{file}: the argument {name!r} would make timm open other files")
    if not timm.is_model(found.arch):
        raise UsageError(
            f"{file}: timm has no network {found.arch!r}; if it is your own, start from the file "
            "that registers it: python FILE.py ... instead of dml-accel ..."
        )
    return found


def load_network(folder: PeerFolder) -> nn.Module:
    """Build the network of a peer's folder with its weights, in their precision, on the CPU.

    Raises:
        UsageError: timm does not accept the arguments, or the weights belong to another network.
    """
    path = folder.path / WEIGHTS

    def make() -> nn.Module:
        return timm.create_model(
            folder.arch, num_classes=folder.number_of_classes, **folder.arguments
        )

    try:
        with in_utf8(path) as readable, safe_open(readable, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: one.get_shape() for name, one in slices.items()}
            # Sizes are compared before anything is allocated, and the network that is built for it
            # may not have more parameters than the file has tensors.
            with torch.device("meta"), _at_most_parameters(len(shapes)):
                _require_fit(make(), shapes, path)
            double = any(one.get_dtype() == "F64" for one in slices.values())
            net, weights = make(), {name: file.get_tensor(name) for name in shapes}
            net.load_state_dict(weights)
    except UsageError:
        raise
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {one_line(error)}") from error
    except Exception as error:  # every model family raises its own kinds
        raise UsageError(
            f"{folder.path}: {folder.arch} cannot be built: {one_line(error)}"
        ) from error
    reason = image_problem(net, folder.image_size, folder.number_of_classes)
    if reason:
        size = folder.image_size
        raise UsageError(f"{folder.path} cannot take {size} x {size} images ({reason})")
    if double:
        net.double().load_state_dict(weights)
    return net.eval()


def _require_fit(net: nn.Module, shapes: Mapping[str, list[int]], path: Path) -> None:
    expected = {name: list(like.shape) for name, like in net.state_dict().items()}
    if shapes != expected:
        names = sorted(expected.keys() | shapes.keys())
        wrong = [name for name in names if expected.get(name) != shapes.get(name)]
        raise UsageError(f"{path} does not fit its network: {', '.join(wrong[:3])}")
    buffers = sum(b.numel() * b.element_size() for b in net.buffers())
    if buffers > path.stat().st_size + _LARGEST_BUFFERS:
        raise UsageError(f"{path}: its network has {buffers:,} bytes of buffers beside its weights")


@contextlib.contextmanager
def _at_most_parameters(most: int) -> Iterator[None]:
    """Abort building a network once it has more parameters than there are weights."""
    left = [most]

    def count(*_: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise ValueError(f"it has more than the {most} tensors of {WEIGHTS}")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _three(values: Sequence[float]) -> tuple[float, ...]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


# ---------------------------------------------------------------- writing


def write_peer(
    folder: Path,
    module: nn.Module,
    spec: PeerSpec,
    metrics: dict[str, Any],
    *,
    classes: tuple[str, ...],
    normalisation: Normalisation,
    geometry: Geometry,
    dataset: str,
    steps: int,
    teachers: list[str],
    distilled: bool = False,
    grey_bits: int | None = None,
    weights: Mapping[str, Tensor] | None = None,
    note: str = "",
    split: str = "test",
    training: str = "",
) -> None:
    """Write the three files of a trained peer.

    Args:
        folder: created if it is missing.
        module: the trained network.
        spec: the peer's name, its network and arguments.
        metrics: on the test split, for the model card.
        classes: class names, in label order.
        normalisation: of its inputs.
        geometry: how images become its inputs.
        dataset: it was trained on.
        steps: optimizer steps taken.
        teachers: whom it learned from; empty if it learned alone.
        distilled: whether none of the teachers was updated.
        grey_bits: how many of the 16 bits of a 16-bit grey image hold its levels; None if the
            network saw no such images.
        weights: what is written (default: those of ``module``).
        note: which weights these are, for the model card; empty if they are the last.
        split: what the test split is called.
        training: how it was trained, for the model card; see ``model_card.training_text``.
    """
    write_network(
        folder,
        module,
        spec,
        classes=classes,
        normalisation=normalisation,
        geometry=geometry,
        grey_bits=grey_bits,
        weights=weights,
    )
    card = peer_card(
        module, spec, metrics, dataset, steps, teachers, distilled, geometry, note, split, training
    )
    write_text(folder / CARD, str(card))


def write_network(
    folder: Path,
    module: nn.Module,
    spec: PeerSpec,
    *,
    classes: tuple[str, ...],
    normalisation: Normalisation,
    geometry: Geometry,
    grey_bits: int | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write what timm loads of a network: its weights and its config.json; see ``write_peer``."""
    folder.mkdir(parents=True, exist_ok=True)
    # Cloned, because the format refuses tensors that share memory (tied weights).
    weights = module.state_dict() if weights is None else weights
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in weights.items()}
    with replacing(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_timm_config(
        folder / FILE,
        module,
        spec,
        classes=classes,
        normalisation=normalisation,
        geometry=geometry,
        grey_bits=grey_bits,
    )
