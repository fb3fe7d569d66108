"""Networks that start from trained weights: of the hub, a peer's folder or a file.

Files are untrusted: only safetensors and a size-limited config.json beside them are read, and
neither can execute code. timm adapts the weights to the network, and every weight must have its
place there; only a classifier for another number of classes is dropped.
"""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from dml_accel.core.errors import UsageError, one_line
from dml_accel.core.files import in_utf8
from dml_accel.core.host import is_on_hub, require_hub_cache
from dml_accel.data.arrow import hub_answers
from dml_accel.models.hub import local_folder, name_of
from dml_accel.models.spec import HUB
from dml_accel.models.timm_config import FILE, TimmConfig, read_timm_config

_WEIGHTS = "model.safetensors"
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".tar")
_LONGEST_REASON = 300  # characters: timm lists every tensor that does not fit


@dataclass(frozen=True)
class PretrainedWeights:
    """Trained weights, before a network holds them.

    Attributes:
        source: the file, or its name on the hub.
        sha256: of the file.
        classes: of its classifier.
        tensors: by name.
        overlay: what else timm must know about them (its ``pretrained_cfg_overlay``).
        arguments: what their network was built with, if that is known.
    """

    source: str
    sha256: str
    classes: int
    tensors: dict[str, Tensor]
    overlay: dict[str, Any]
    arguments: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """Return what a run records about them."""
        return {"source": self.source, "sha256": self.sha256, "classes": self.classes}


def read_weights(arch: str, start: str) -> PretrainedWeights:
    """Read the trained weights that a network starts from.

    Args:
        arch: timm's name of the network.
        start: ``HUB``, a folder with model.safetensors, a safetensors file, or a model of the hub
            as ``hf-hub:owner/name[@revision]``.

    Raises:
        UsageError: they cannot be downloaded or read, belong to another network, or are pickled.
    """
    known = _known(arch)
    classes = known.num_classes if known else 0
    if start == HUB:
        path, source = _download(arch, known)
        tensors, sha256 = _tensors(path)
        return PretrainedWeights(source, sha256, classes, tensors, {}, {})
    try:
        path = _file(local_folder(start) if is_on_hub(start) else Path(start).expanduser())
    except (OSError, RuntimeError) as error:  # no permission; no such user's home
        raise UsageError(f"pretrained={start} cannot be read: {error}") from error
    config = _config_beside(path, arch)
    tensors, sha256 = _tensors(path)
    classifier = known.classifier if known else None
    first = classifier if isinstance(classifier, str) else next(iter(classifier or ("",)))
    if f"{first}.weight" in tensors:
        classes = len(tensors[f"{first}.weight"])
    elif config and config.classes:
        classes = config.classes
    # A file holds the classifier as this network has it, without the offset of timm's original.
    overlay = {"label_offset": None}
    arguments = config.arguments if config else {}
    return PretrainedWeights(name_of(path), sha256, classes, tensors, overlay, arguments)


def _known(arch: str) -> Any:
    """Return what timm knows about a network's trained weights; None if it knows nothing."""
    try:
        return get_pretrained_cfg(arch)
    except RuntimeError:  # it knows the network, but not the tag behind its name
        return None


def trained_size(arch: str) -> int | None:
    """Return the pixels per side on which timm's weights of a network were trained, if it knows."""
    known = _known(arch)
    return int(known.input_size[-1]) if known else None


def build_pretrained(
    arch: str, arguments: Mapping[str, Any], classes: int, weights: PretrainedWeights
) -> nn.Module:
    """Build a network with trained weights on the CPU; a classifier of another size is random.

    Raises:
        UsageError: the weights belong to another network.
    """
    try:
        # First with the weights' own number of classes, where every weight must have its place. On
        # the meta device this needs no memory; the warnings say that nothing was loaded.
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            _create(arch, arguments, weights.classes, weights)
        net = _create(arch, arguments, classes, weights)
    except Exception as error:  # every model family raises its own kinds
        hint = ""
        if weights.arguments and weights.arguments != dict(arguments):
            text = ",".join(f"{name}={value}" for name, value in weights.arguments.items())
            hint = f"; it was built with [{text}]"
        raise UsageError(
            f"{weights.source} does not fit {arch}{hint}: {one_line(error)[:_LONGEST_REASON]}"
        ) from error
    net.pretrained_cfg.pop("state_dict", None)
    return net


def _create(
    arch: str, arguments: Mapping[str, Any], classes: int, weights: PretrainedWeights
) -> Any:
    overlay = weights.overlay | {
        "state_dict": dict(weights.tensors),  # a copy: timm removes a classifier that does not fit
        "num_classes": weights.classes,
    }
    return timm.create_model(
        arch, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay, **arguments
    )


# ---------------------------------------------------------------- the hub


def _download(arch: str, known: Any) -> tuple[Path, str]:
    """Return the file of timm's weights in the cache of the hub, and its name on the hub."""
    from huggingface_hub import errors, hf_hub_download

    if known is None or not known.hf_hub_id:
        tagged = timm.list_models(f"{arch.partition('.')[0]}.*", pretrained=True)
        there = f" (there are: {', '.join(tagged[:5])})" if tagged else ""
        raise UsageError(
            f"there are no weights of {arch} on the hub{there}; write pretrained=FOLDER_OR_FILE, "
            "or drop pretrained"
        )
    repository, _, revision = known.hf_hub_id.partition("@")
    file = (known.hf_hub_filename or _WEIGHTS).replace("pytorch_model.bin", _WEIGHTS)
    source = f"{repository}/{file}"
    if not file.endswith(".safetensors"):
        raise UsageError(
            f"the weights of {arch} on the hub ({source}) are not safetensors; convert them, and "
            "write pretrained=FILE.safetensors"
        )

    require_hub_cache()

    def fetch(cached: bool) -> Path:
        return Path(
            hf_hub_download(repository, file, revision=revision or None, local_files_only=cached)
        )

    try:
        return fetch(cached=True), source
    except errors.LocalEntryNotFoundError:
        pass
    if not hub_answers():
        raise UsageError(
            f"the weights of {arch} ({source}) are not cached here, and the hub cannot be reached; "
            "connect once, write pretrained=FOLDER_OR_FILE, or drop pretrained"
        )
    try:
        return fetch(cached=False), source
    except Exception as error:  # from the hub's library, the connection or the disk
        reason = one_line(error)[:_LONGEST_REASON]
        raise UsageError(
            f"the weights of {arch} ({source}) cannot be downloaded: {type(error).__name__}: "
            f"{reason}"
        ) from error


# ---------------------------------------------------------------- files


def _file(path: Path) -> Path:
    """Return the safetensors file that a path names.

    Raises:
        UsageError: there is none, or the file is pickled and could execute code.
    """
    found = path / _WEIGHTS if path.is_dir() else path
    if found.suffix == ".safetensors" and found.is_file():
        return found
    if path.is_dir():
        pickles = sorted(one.name for one in path.iterdir() if one.suffix in _PICKLES)
    else:
        pickles = [path.name] if path.suffix in _PICKLES else []
    if pickles:
        raise UsageError(
            f"pretrained={path}: {pickles[0]} is pickled and could execute code; if you trust it, "
            f"load it and save its tensors with safetensors.torch.save_file as {_WEIGHTS}"
        )
    if not path.exists():
        raise UsageError(f"pretrained={path}: this file or folder does not exist")
    hint = ""
    for below, what in (
        ("peers/*", "a run: name one of its peers"),
        ("*", "an ensemble: name one"),
    ):
        peers = sorted(path.glob(f"{below}/{_WEIGHTS}"))
        hint = hint or (f"; it is {what}, {peers[0].parent}" if peers else "")
    raise UsageError(
        f"pretrained={path} is neither a .safetensors file nor a folder with {_WEIGHTS}{hint}"
    )


def _config_beside(path: Path, arch: str) -> TimmConfig | None:
    """Return the config.json beside weights, if there is one and it is of this network."""
    file = path.with_name(FILE)
    if path.name != _WEIGHTS or not file.exists():
        return None
    found = read_timm_config(file)
    if found.arch.partition(".")[0] != arch.partition(".")[0]:
        raise UsageError(f"{path} holds the weights of {found.arch}, not of {arch}")
    return found


def _tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with in_utf8(path) as readable:
            tensors = load_file(readable)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {one_line(error)}") from error
    if not tensors:  # timm would load other weights instead
        raise UsageError(f"{path} holds no weights")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UsageError(f"{path}: {name} has values that are not finite")
    return tensors, sha256
