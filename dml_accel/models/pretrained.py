"""Networks that start from trained weights: of the hub, of a peer's folder, or of a file.

A file may be a stranger's. What is read is safetensors and JSON of bounded size beside it, neither
of which can execute. timm fits the weights to the network, and every one of them must have its
place there; only a classifier for another number of classes is left out.
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

from dml_accel.core.config import UsageError
from dml_accel.core.files import LARGEST_JSON, UnreadableError, read_json
from dml_accel.data.sources import hub_answers

# Parts of arguments' names that would make timm read another file, or a pickle, or build elsewhere
# than where it is told to.
LEADS_ELSEWHERE = ("pretrained", "checkpoint", "cache_dir", "url", "file", "device", "dtype")
HUB = ""  # what a peer's start is called where timm knows the place on the hub
_WEIGHTS = "model.safetensors"
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".tar")
_LONGEST_REASON = 300  # characters; timm names every tensor that does not fit


@dataclass(frozen=True)
class Weights:
    """Trained weights that no network holds yet.

    Attributes:
        source: the file, or its name on the hub.
        sha256: of the file.
        classes: how many its classifier tells apart.
        tensors: by name.
        overlay: what else timm has to know about them.
        arguments: what their network was built with, where that is known.
    """

    source: str
    sha256: str
    classes: int
    tensors: dict[str, Tensor]
    overlay: dict[str, Any]
    arguments: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """Return what a run keeps about them."""
        return {"source": self.source, "sha256": self.sha256, "classes": self.classes}


def read(arch: str, start: str) -> Weights:
    """Read the weights that a network starts from.

    Args:
        arch: timm's name of the network.
        start: ``HUB``, a folder with model.safetensors, or a file of that kind.

    Raises:
        UsageError: they cannot be reached or read, are of another network, or could execute.
    """
    known = _known(arch)
    if start == HUB:
        path, source = _download(arch, known)
        described, overlay = {"num_classes": known.num_classes}, {}
    else:
        try:
            path = _file(Path(start).expanduser())
        except (OSError, RuntimeError) as error:  # no permission; no such user's home
            raise UsageError(f"pretrained={start} cannot be read: {error}") from error
        source, described = str(path), _described(path, arch)
        # Files hold the weights as the network has them now, whatever the first ones were like.
        overlay = {"label_offset": None}
    tensors, sha256 = _tensors(path)
    classes = described.get("num_classes") or (known.num_classes if known else 0)
    classifier = known.classifier if known else None
    first = classifier if isinstance(classifier, str) else next(iter(classifier or ("",)))
    if start != HUB and f"{first}.weight" in tensors:
        classes = len(tensors[f"{first}.weight"])
    arguments = dict(described.get("model_args") or {})
    return Weights(source, sha256, classes, tensors, overlay, arguments)


def _known(arch: str) -> Any:
    """Return what timm knows of a network's trained weights; None where it knows nothing."""
    try:
        return get_pretrained_cfg(arch)
    except RuntimeError:  # the network, but not the tag behind its name
        return None


def build(arch: str, arguments: Mapping[str, Any], classes: int, weights: Weights) -> nn.Module:
    """Build a network that holds trained weights, on the CPU; a new classifier is drawn at random.

    Raises:
        UsageError: the weights are of another network.
    """
    try:
        # With their own number of classes every weight must have its place: no memory is needed to
        # find out, and that nothing is loaded is what the warnings say.
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            _create(arch, arguments, weights.classes, weights)
        net = _create(arch, arguments, classes, weights)
    except Exception as error:  # every model family raises its own kinds
        reason = " ".join(str(error).split())
        hint = ""
        if weights.arguments != dict(arguments):
            text = ",".join(f"{name}={value}" for name, value in weights.arguments.items())
            hint = f"; it was built with [{text}]"
        raise UsageError(
            f"{weights.source} does not fit {arch}{hint}: {reason[:_LONGEST_REASON]}"
        ) from error
    net.pretrained_cfg.pop("state_dict", None)
    return net


def _create(arch: str, arguments: Mapping[str, Any], classes: int, weights: Weights) -> Any:
    overlay = weights.overlay | {
        "state_dict": dict(weights.tensors),  # timm takes a classifier out
        "num_classes": weights.classes,
    }
    return timm.create_model(
        arch, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay, **arguments
    )


# ---------------------------------------------------------------- the hub


def _download(arch: str, known: Any) -> tuple[Path, str]:
    """Return the file of timm's weights in the hub's cache, and its name on the hub."""
    from huggingface_hub import errors, hf_hub_download

    if known is None or not known.hf_hub_id:
        tagged = timm.list_models(f"{arch.partition('.')[0]}.*", pretrained=True)
        there = f" (there are: {', '.join(tagged[:5])})" if tagged else ""
        raise UsageError(
            f"there are no weights of {arch} on the hub{there}; write pretrained=FOLDER_OR_FILE, "
            "or leave pretrained out"
        )
    repository, _, revision = known.hf_hub_id.partition("@")
    file = (known.hf_hub_filename or _WEIGHTS).replace("pytorch_model.bin", _WEIGHTS)
    source = f"{repository}/{file}"
    if not file.endswith(".safetensors"):
        raise UsageError(
            f"the weights of {arch} on the hub ({source}) are no safetensors; convert them, and "
            "write pretrained=FILE.safetensors"
        )

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
            f"the weights of {arch} ({source}): the hub cannot be reached, and they are not cached "
            "here; connect once, write pretrained=FOLDER_OR_FILE, or leave pretrained out"
        )
    try:
        return fetch(cached=False), source
    except Exception as error:  # of the hub's library, of the connection or of the disk
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise UsageError(
            f"the weights of {arch} ({source}) cannot be downloaded: {type(error).__name__}: "
            f"{reason}"
        ) from error


# ---------------------------------------------------------------- files


def _file(path: Path) -> Path:
    """Return the file of safetensors that a path means.

    Raises:
        UsageError: there is none; what is there could execute.
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
            f"pretrained={path}: {pickles[0]} is pickled and could execute code; load it where "
            f"you trust it, and save its tensors with safetensors.torch.save_file as {_WEIGHTS}"
        )
    if not path.exists():
        raise UsageError(f"pretrained={path}: there is no such file or folder")
    peers = sorted(one.parent.name for one in path.glob(f"peers/*/{_WEIGHTS}"))
    hint = f"; it is a run, name one of its peers: {path}/peers/{peers[0]}" if peers else ""
    raise UsageError(
        f"pretrained={path} is no .safetensors file, nor a folder with {_WEIGHTS}{hint}"
    )


def _described(path: Path, arch: str) -> dict[str, Any]:
    """Return what the config.json beside weights says; nothing where there is none."""
    file = path.with_name("config.json")
    if path.name != _WEIGHTS or not file.exists():
        return {}
    try:
        found = read_json(file, LARGEST_JSON)
    except UnreadableError as error:
        raise UsageError(str(error)) from error
    theirs = str(found.get("architecture"))
    if theirs.partition(".")[0] != arch.partition(".")[0]:
        raise UsageError(f"{path} holds the weights of a {theirs}, and not of a {arch}")
    classes, arguments = found.get("num_classes"), found.get("model_args") or {}
    if not isinstance(classes, int) or classes < 0 or not isinstance(arguments, dict):
        raise UsageError(f"{file} does not describe a network as timm does")
    return found


def _tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not tensors:  # timm would take others instead
        raise UsageError(f"{path} holds no weights")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UsageError(f"{path}: {name} holds numbers that are not finite")
    return tensors, sha256
