"""config.json as timm writes it beside a network's weights: one reader, one writer.

Files are untrusted: their size is limited, and every value that is used is checked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data import resolve_data_config
from torch import nn

from dml_accel.core.errors import UsageError
from dml_accel.core.files import read_json, write_json
from dml_accel.data.batches import Normalisation
from dml_accel.data.pixels import INTERPOLATIONS, Geometry
from dml_accel.models.spec import PeerSpec

FILE = "config.json"
# Entries that timm does not know and leaves alone.
OURS, GREY_BITS, OWN = "dml_accel", "grey_bits", "own_network"
DEPTHS = range(8, 17)  # bits of a grey level
_MODES = ("center", "squash")
_LARGEST_RESIZE = 8192  # pixels, as of --eval-resize


@dataclass(frozen=True)
class TimmConfig:
    """What config.json says about a network.

    Attributes:
        path: of the file.
        arch: timm's name of the network.
        classes: how many classes it has; 0 if the file does not say.
        arguments: what timm builds the network with.
        content: the whole file.
        grey_bits: see ``write_timm_config``.
    """

    path: Path
    arch: str
    classes: int
    arguments: dict[str, Any]
    content: dict[str, Any]
    grey_bits: int | None


def read_timm_config(path: Path) -> TimmConfig:
    """Read a config.json.

    Raises:
        UsageError: it cannot be read, is too large, or does not describe a network as timm does.
    """
    content = read_json(path)
    refuse_own(path, content)
    arch, arguments = content.get("architecture"), content.get("model_args") or {}
    classes = content.get("num_classes") or 0
    if not (isinstance(arch, str) and isinstance(classes, int) and isinstance(arguments, dict)):
        raise UsageError(f"{path} does not describe a network as timm does")
    if classes < 0:
        raise UsageError(f"{path} has num_classes {classes}; it must be above 0")
    # As in timm, the number of classes is that of the network, whatever its arguments repeat.
    arguments = {name: value for name, value in arguments.items() if name != "num_classes"}
    return TimmConfig(path, arch, classes, arguments, content, _grey_bits(path, content))


def refuse_own(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse the config.json of a network that only its author can build, with what to do instead.

    Raises:
        UsageError: see ``own_network``.
    """
    ours = content.get(OURS)
    own = ours.get(OWN) if isinstance(ours, dict) else None
    if isinstance(own, dict):
        raise UsageError(
            f"{path.parent} holds a {own.get('class')} that learn has trained, which timm cannot "
            "build: in Python, dml_accel.export(RUN, peer=..., network=..., to=...) writes it, and "
            "load_state_dict takes its model.safetensors"
        )


def _grey_bits(path: Path, content: Mapping[str, Any]) -> int | None:
    ours = content.get(OURS, {})
    found = ours.get(GREY_BITS) if isinstance(ours, dict) else ours
    if found is None:
        return None
    if type(found) is not int or found not in DEPTHS:
        raise UsageError(
            f"{path}: {OURS}.{GREY_BITS} is {found!r}; it must be an integer from {DEPTHS[0]} to "
            f"{DEPTHS[-1]}"
        )
    return found


def read_geometry(path: Path, cfg: Mapping[str, Any]) -> Geometry:
    """Return how images become inputs, as timm resolves it.

    Args:
        path: of the file, for messages.
        cfg: its ``pretrained_cfg``; what it leaves out has timm's own defaults.

    Raises:
        UsageError: inputs are not squares, or are prepared in a way that is not known here.
        KeyError, TypeError, ValueError, IndexError: an entry is of another kind.
    """
    size = int(cfg["input_size"][1])
    if list(cfg["input_size"]) != [3, size, size] or size < 1:
        raise UsageError(
            f"{path}: input_size {cfg['input_size']} must be three channels of a square image"
        )
    found = resolve_data_config({}, pretrained_cfg=cfg)
    share = float(found["crop_pct"])
    if not (0 < share <= 1 and size / share <= _LARGEST_RESIZE):
        raise UsageError(
            f"{path}: crop_pct {share} must be above 0 and at most 1, and input_size / crop_pct at "
            f"most {_LARGEST_RESIZE:,} pixels"
        )
    for name, known in (("crop_mode", _MODES), ("interpolation", INTERPOLATIONS)):
        if found[name] not in known:
            raise UsageError(f"{path}: {name} {found[name]!r} must be one of {', '.join(known)}")
    return Geometry.from_crop(size, share, found["crop_mode"], found["interpolation"])


def input_entries(geometry: Geometry, normalisation: Normalisation) -> dict[str, Any]:
    """Return the entries of ``pretrained_cfg`` from which timm prepares the same inputs."""
    return {
        "input_size": [3, geometry.size, geometry.size],
        "mean": list(normalisation.mean),
        "std": list(normalisation.std),
        "interpolation": geometry.interpolation,
        "crop_pct": geometry.crop_pct,
        "crop_mode": geometry.mode,
    }


def write_timm_config(
    path: Path,
    module: nn.Module,
    spec: PeerSpec,
    *,
    classes: tuple[str, ...],
    normalisation: Normalisation,
    geometry: Geometry,
    grey_bits: int | None = None,
) -> None:
    """Write how to build a network and how to prepare its input.

    Args:
        path: of the file.
        module: the network, with timm's ``pretrained_cfg``.
        spec: its name in timm, and its arguments.
        classes: class names, in label order.
        normalisation: of its inputs.
        geometry: how images become its inputs.
        grey_bits: how many of the 16 bits of a 16-bit grey image hold its levels; None if the
            network saw no such images.
    """
    known: Any = module.pretrained_cfg
    heads = {name: known[name] for name in ("first_conv", "classifier") if known.get(name)}
    content: dict[str, Any] = {
        "architecture": spec.arch,
        "num_classes": len(classes),
        "num_features": getattr(module, "num_features", None),
        "model_args": spec.arguments,
        "label_names": list(classes),
        "pretrained_cfg": {
            "num_classes": len(classes),
            **input_entries(geometry, normalisation),
            "fixed_input_size": bool(known.get("fixed_input_size")),
            "pool_size": None,
            **heads,
        },
    }
    if grey_bits is not None:
        content[OURS] = {GREY_BITS: grey_bits}
    write_json(path, content)
