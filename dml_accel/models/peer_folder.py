"""Networks that teach and do not learn, read from the folders of trained peers.

A folder may be a stranger's. What is read is JSON of bounded size, and from safetensors what fits
the network; that is built by timm from its registered name and plain arguments, none of which leads
to another file.
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
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dml_accel.core.config import Config, UsageError
from dml_accel.core.files import LARGEST_JSON, UnreadableError, read_json
from dml_accel.data.batches import Data, Normalisation, lay_weights, memory_format
from dml_accel.distributed.placement import Placement
from dml_accel.models import build as building
from dml_accel.models.pretrained import LEADS_ELSEWHERE

_BESIDE_WEIGHTS = 2**26  # bytes that buffers may take which are not among the weights


@dataclass(frozen=True)
class PeerFolder:
    """A trained peer as its folder describes it; the weights are read, and no network is built.

    Attributes:
        path: the folder.
        arch: timm's name of the network.
        arguments: what timm builds it with.
        classes: names of the classes; empty where the folder does not tell.
        number_of_classes: how many there are.
        image_size: pixels a side of its inputs.
        normalisation: of its inputs.
        sha256: of model.safetensors.
    """

    path: Path
    arch: str
    arguments: dict[str, Any]
    classes: tuple[str, ...]
    number_of_classes: int
    image_size: int
    normalisation: Normalisation
    sha256: str


def folders_of(path: Path) -> list[Path]:
    """Return the folders of peers that a path means: itself, all peers of a run, or those in it.

    Raises:
        UsageError: it is neither.
    """
    if (path / "model.safetensors").is_file():
        return [path]
    for pattern in ("peers/*/model.safetensors", "*/model.safetensors"):
        found = sorted(file.parent for file in path.glob(pattern))
        if found:
            return found
    raise UsageError(
        f"{path} holds no trained peer (model.safetensors), nor peers/<name> of a finished run"
    )


def read(path: Path) -> PeerFolder:
    """Read one peer's folder.

    Raises:
        UsageError: a file is missing, too large, or not what it should be; it is named.
    """
    file, weights = path / "config.json", path / "model.safetensors"
    described = description(file)
    try:
        with open(weights, "rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{weights} cannot be read: {error.strerror}") from error
    try:
        cfg = described["pretrained_cfg"]
        size = cfg["input_size"]
        arguments = dict(described.get("model_args") or {})
        known = PeerFolder(
            path=path,
            arch=str(described["architecture"]),
            arguments=arguments,
            classes=tuple(str(name) for name in described.get("label_names") or ()),
            number_of_classes=int(described["num_classes"]),
            image_size=int(size[1]),
            normalisation=Normalisation(_three(cfg["mean"]), _three(cfg["std"])),
            sha256=sha256,
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UsageError(f"{file} does not describe a network as timm does: {error!r}") from error
    if not all(0 < value < math.inf for value in known.normalisation.std):
        raise UsageError(f"{file}: std {list(known.normalisation.std)} is not above 0")
    if list(size) != [3, known.image_size, known.image_size]:
        raise UsageError(f"{file}: input size {size} is not three channels of a square")
    for name in arguments:
        if any(part in name for part in LEADS_ELSEWHERE):
            raise UsageError(f"{file}: the argument {name!r} would lead to other files")
    if not timm.is_model(known.arch):
        raise UsageError(f"{file}: timm knows no network {known.arch!r}")
    return known


def build(folder: PeerFolder) -> nn.Module:
    """Build the network of a peer's folder, with its weights and in their precision, on the CPU.

    Raises:
        UsageError: timm does not accept the arguments, or the weights are of another network.
    """
    path = folder.path / "model.safetensors"

    def make() -> nn.Module:
        return timm.create_model(
            folder.arch, num_classes=folder.number_of_classes, **folder.arguments
        )

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: one.get_shape() for name, one in slices.items()}
            # Nothing is allocated, nor built without end, before the sizes are known to fit.
            with torch.device("meta"), _at_most_parameters(len(found)):
                _require_fit(make(), found, path)
            double = any(one.get_dtype() == "F64" for one in slices.values())
            net, weights = make(), {name: file.get_tensor(name) for name in found}
            net.load_state_dict(weights)
    except UsageError:
        raise
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    except Exception as error:  # every model family raises its own kinds
        reason = " ".join(str(error).split())
        raise UsageError(f"{folder.path}: {folder.arch} cannot be built: {reason}") from error
    reason = building.refusal(net, folder.image_size, folder.number_of_classes)
    if reason:
        size = folder.image_size
        raise UsageError(f"{folder.path} cannot take {size} x {size} images ({reason})")
    if double:
        net.double().load_state_dict(weights)
    return net.eval()


def _require_fit(net: nn.Module, found: Mapping[str, list[int]], path: Path) -> None:
    expected = {name: list(like.shape) for name, like in net.state_dict().items()}
    if found != expected:
        names = sorted(expected.keys() | found.keys())
        wrong = [name for name in names if expected.get(name) != found.get(name)]
        raise UsageError(f"{path} does not fit its network: {', '.join(wrong[:3])}")
    beside = sum(b.numel() * b.element_size() for b in net.buffers())
    if beside > path.stat().st_size + _BESIDE_WEIGHTS:
        raise UsageError(f"{path}: its network would take {beside:,} bytes beside its weights")


@contextlib.contextmanager
def _at_most_parameters(most: int) -> Iterator[None]:
    """Stop the building of a network that has more parameters than there are weights for."""
    left = [most]

    def count(*_: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise ValueError(f"it has more than the {most} tensors of model.safetensors")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


class Frozen:
    """A trained network among peers that learn, on their device and in their precision.

    Args:
        name: what ``--links`` calls it.
        folder: where it comes from.
        net: on the right device, in the right precision, in evaluation mode.
        normalisation: what the images of the run are normalised with.
    """

    def __init__(
        self, name: str, folder: PeerFolder, net: nn.Module, normalisation: Normalisation
    ) -> None:
        self.name, self.folder, self._net = name, folder, net
        like = next(net.parameters())
        ours, theirs = normalisation, folder.normalisation
        scale = [a / b for a, b in zip(ours.std, theirs.std, strict=True)]
        shift = [(a - b) / c for a, b, c in zip(ours.mean, theirs.mean, theirs.std, strict=True)]
        self._scale = None if ours == theirs else like.new_tensor(scale).view(3, 1, 1)
        self._shift = like.new_tensor(shift).view(3, 1, 1)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Return logits [B, C] of images [B, 3, S, S] that are normalised as the run's are."""
        return self._net(x if self._scale is None else x * self._scale + self._shift)


def read_all(
    paths: Sequence[str], classes: Sequence[str], image_size: int
) -> dict[str, PeerFolder]:
    """Read the frozen peers of a run: frozen-0, frozen-1, ... in the order given.

    Raises:
        UsageError: one cannot be read, or has other classes or another image size than the run.
    """
    folders = [read(found) for path in paths for found in folders_of(Path(path).expanduser())]
    for folder in folders:
        if folder.number_of_classes != len(classes):
            raise UsageError(
                f"--frozen-peers {folder.path} tells {folder.number_of_classes} classes apart; "
                f"these images have {len(classes)}"
            )
        if folder.classes and folder.classes != tuple(classes):
            differing = next((a, b) for a, b in zip(folder.classes, classes, strict=True) if a != b)
            raise UsageError(
                f"--frozen-peers {folder.path} was trained on other classes: {differing[0]!r} "
                f"where these images have {differing[1]!r}"
            )
        if folder.image_size != image_size:
            raise UsageError(
                f"--frozen-peers {folder.path} takes images of {folder.image_size} pixels and not "
                f"{image_size}; use --image-size {folder.image_size}"
            )
    return {f"frozen-{index}": folder for index, folder in enumerate(folders)}


def prepare(
    folders: Mapping[str, PeerFolder], images: Data, config: Config, placement: Placement
) -> list[Frozen]:
    """Build the frozen peers, each process all of them, on its device and in the run's precision.

    Args:
        folders: by name, in order.
        images: of the run.
        config: the run's.
        placement: where this process's networks are.
    """
    prepared = []
    for name, folder in folders.items():
        net = build(folder).requires_grad_(False)
        net = net.double() if config.float64 else net.float()
        lay_weights(net, memory_format(config, placement.device))
        net = placement.processes.accelerator.prepare_model(net, evaluation_mode=True).eval()
        prepared.append(Frozen(name, folder, net, images.normalisation))
    return prepared


def _three(values: Sequence[float]) -> tuple[float, ...]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def description(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file of bounded size, which may be a stranger's.

    Raises:
        UsageError: it cannot be read, or is no such thing.
    """
    try:
        return read_json(path, LARGEST_JSON)
    except UnreadableError as error:
        raise UsageError(str(error)) from error
