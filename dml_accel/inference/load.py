"""Trained peers of a run, a peer folder or a folder of peers, and their networks ready to predict.

A folder may be untrusted: its peers are read by models.peer_folder, its records by SavedRun.

Shape letters: K networks, B images, S pixels per side, C classes.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dml_accel.core.errors import UsageError
from dml_accel.data.batches import PixelSet
from dml_accel.data.pixels import Geometry
from dml_accel.data.splits import Split
from dml_accel.distributed.processes import set_arithmetic
from dml_accel.models.build import refuse_shared
from dml_accel.models.peer_folder import WEIGHTS as WEIGHTS_FILE
from dml_accel.models.peer_folder import PeerFolder, find_peers, load_network, read_peer
from dml_accel.models.timm_config import FILE
from dml_accel.training.checkpoint import is_named, step_of
from dml_accel.training.run_folder import WEIGHTS, SavedRun, mark_of_a_run
from dml_accel.training.status import FILE as STATUS

BATCH_SIZE = 256  # images per forward pass, as in the evaluations of training
LAST, EMA, BEST = WEIGHTS
_WHICH = {LAST: "", EMA: "averaged weights", BEST: "each network's best weights by validation"}
_NEEDS = {EMA: "--ema", BEST: "--keep best and --val-fraction"}
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainedPeers:
    """Trained peers with the same classes and inputs, before their networks are built.

    Attributes:
        path: the folder that was named.
        folders: of the peers, by name.
        classes: class names; their numbers if the folders have no names.
        geometry: how images become the inputs.
        config: the configuration in the run's config.json, flat; empty if this is not a run.
        results: the content of the run's results.json; empty if this is not a run.
        step: of the checkpoint that they were read from; None if they were not.
        note: which checkpoint that is, in words.
        weights: which of their weights these are, as ``--weights`` says.
    """

    path: Path
    folders: Mapping[str, PeerFolder]
    classes: tuple[str, ...]
    geometry: Geometry
    config: Mapping[str, Any]
    results: Mapping[str, Any]
    step: int | None = None
    note: str = ""
    weights: str = LAST

    @property
    def image_size(self) -> int:
        """Pixels per side of the inputs."""
        return self.geometry.size

    @property
    def which(self) -> str:
        """Which weights these are, in words; empty for the last ones of a finished run."""
        return ", ".join(filter(None, (_WHICH[self.weights], self.note)))

    @property
    def grey_bits(self) -> int | None:
        """How many of 16 bits the grey images of the training used; see ``PeerFolder``."""
        return next(iter(self.folders.values())).grey_bits

    @property
    def precision(self) -> str:
        """The mixed precision in which the networks were trained and evaluated.

        Raises:
            UsageError: the record of the run holds another one than there are.
        """
        recorded = self.results.get("mixed_precision")
        if recorded is None:
            return "no"
        if recorded not in ["no", *_HALF]:
            raise UsageError(
                f"{self.path}: its mixed_precision is recorded as {recorded!r}; it must be no, "
                f"{' or '.join(_HALF)}"
            )
        return str(recorded)

    @property
    def results_by_peer(self) -> Mapping[str, Mapping[str, Any]]:
        """The entries of results.json, by peer.

        Raises:
            UsageError: they do not have the form that a run writes.
        """
        try:
            return {str(peer["name"]): dict(peer) for peer in self.results.get("peers", [])}
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{self.path / 'results.json'} does not hold the results of a run"
            ) from error

    def only(self, name: str) -> "TrainedPeers":
        """Return a single peer.

        Raises:
            UsageError: there is none of that name.
        """
        if name not in self.folders:
            raise UsageError(
                f"--peer {name}: {self.path} has no such peer; it has {', '.join(self.folders)}"
            )
        return dataclasses.replace(self, folders={name: self.folders[name]})


def read_trained_peers(path: Path, weights: str = LAST) -> TrainedPeers:
    """Read the peers of a run, a peer folder or a folder of peers; no network is built.

    Args:
        path: the folder.
        weights: which weights of a run, as ``--weights`` says.

    Raises:
        UsageError: the folder holds no trained peer, a peer cannot be read or is missing, the run
            is not finished or has no such weights, or the peers differ in their classes or image
            size.
    """
    saved, is_peer = SavedRun(path), (path / WEIGHTS_FILE).is_file()
    if not is_peer:
        _refuse_other_folders(path)
    is_run = not is_peer and (saved.has_description or (path / STATUS).exists())
    if is_run and not saved.is_done:
        if saved.has_description:
            _ = saved.description  # that of another program is refused
        saves = ", or use its newest checkpoint with --checkpoint latest" * saved.has_checkpoint
        hint = ", or name a peer's folder" * any(path.glob(f"peers/*/{WEIGHTS_FILE}"))
        raise UsageError(
            f"{path} is not finished ({saved.state}): finish it with --resume auto{saves}{hint}"
        )
    # "." has no name, but the folder that it stands for has one.
    where = path
    if weights != LAST:
        where = path / WEIGHTS[weights]
        if not is_run:
            raise UsageError(f"--weights {weights}: {path} is not a run, which may have others")
        if not where.is_dir():
            raise lacks_weights(path, weights)
    folders = {one.name or one.resolve().name: read_peer(one) for one in find_peers(where)}
    _refuse_different(path, folders)
    first = next(iter(folders.values()))
    peers = TrainedPeers(
        path,
        folders,
        _class_names(first),
        first.geometry,
        config=saved.description["config"] if is_run else {},
        results=_results_of(saved, weights) if is_run else {},
        weights=weights,
    )
    differing = peers.results_by_peer.keys() ^ folders.keys() if is_run else set()
    if differing:
        raise UsageError(
            f"{path}: results.json and the folders in {WEIGHTS[weights]} differ: "
            f"{', '.join(sorted(differing))}"
        )
    return peers


def lacks_weights(where: Path, weights: str) -> UsageError:
    """Return the error that a run or a checkpoint does not have weights other than the last."""
    return UsageError(
        f"--weights {weights}: {where} has no {_WHICH[weights]}: training keeps them with "
        f"{_NEEDS[weights]}"
    )


def _results_of(saved: SavedRun, weights: str) -> dict[str, Any]:
    """Return results.json with the metrics of some weights in the place of those of the last."""
    results = saved.results
    if weights == LAST:
        return results
    try:
        peers = [dict(peer) | dict(peer[weights]) for peer in results["peers"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{saved.path / 'results.json'} does not hold the results of {_WHICH[weights]}"
        ) from error
    # The best weights of two networks may be those of two steps, and were not evaluated together.
    steps = results.get("steps") if weights == EMA else None
    return results | {
        "peers": peers,
        "ensemble": results.get(f"{weights}_ensemble"),
        "steps": steps,
    }


def _refuse_other_folders(path: Path) -> None:
    """Refuse a checkpoint, an exported ONNX file and a comparison, with what to name instead."""
    if is_named(path) and (path / "state.json").exists():
        raise UsageError(
            f"{path} is a checkpoint: name its run, and the checkpoint with --checkpoint "
            f"{step_of(path)}"
        )
    exported = next(path.glob("*.onnx"), None)
    if exported and not (path / STATUS).exists():
        raise UsageError(
            f"{path} holds an exported ONNX file, which onnxruntime runs, as its README.md shows: "
            "name the run or peer that it was exported from"
        )
    if mark_of_a_run(path):
        return
    below = ("*/config.json", "*/seed-*/config.json", "*/*/seed-*/config.json")
    runs = [one.parent for pattern in below for one in sorted(path.glob(pattern))]
    runs = [one for one in runs if mark_of_a_run(one)]
    if runs:
        names = ", ".join(str(one.relative_to(path)) for one in runs[:4])
        more = f" and {len(runs) - 4} more" if len(runs) > 4 else ""
        raise UsageError(f"{path} holds {len(runs)} run(s): name one of {names}{more}")


def _class_names(folder: PeerFolder) -> tuple[str, ...]:
    names = folder.classes or tuple(map(str, range(folder.number_of_classes)))
    if len(names) != folder.number_of_classes:
        raise UsageError(
            f"{folder.path / FILE} has {len(names)} class names for {folder.number_of_classes} "
            "classes"
        )
    return names


def _refuse_different(path: Path, folders: Mapping[str, PeerFolder]) -> None:
    """Refuse peers whose predictions cannot be averaged."""
    first_name, first = next(iter(folders.items()))
    for name, folder in folders.items():
        for what, value, expected in (
            ("the number of classes", folder.number_of_classes, first.number_of_classes),
            ("class names", folder.classes, first.classes),
            ("image size", folder.image_size, first.image_size),
            ("how images are resized and cut", folder.geometry, first.geometry),
            ("the depth of grey images", folder.grey_bits, first.grey_bits),
        ):
            if value != expected:
                raise UsageError(
                    f"{path}: {name} and {first_name} cannot form an ensemble, because they differ "
                    f"in {what}; name one of their folders"
                )


class Networks:
    """The networks of trained peers on a device, in evaluation mode.

    Args:
        peers: whose networks.
        device: where they compute.

    Attributes:
        names: of the peers.
        modules: their networks, in the same order.
        classes: names of their classes.
        precision: the mixed precision in which they compute.

    Raises:
        UsageError: a network cannot be built; see ``models.peer_folder.load_network``.
    """

    def __init__(self, peers: TrainedPeers, device: torch.device) -> None:
        self.names, self.classes = list(peers.folders), peers.classes
        self._device, self._folders = device, list(peers.folders.values())
        self._tf32 = bool(peers.config.get("tf32"))
        set_arithmetic(device, self._tf32)  # as in training
        self.modules = [load_network(folder).requires_grad_(False) for folder in self._folders]
        refuse_shared(dict(zip(self.names, self.modules, strict=True)))
        if device.type == "mps":  # MPS has no double precision
            self.modules = [module.float() for module in self.modules]
        self.modules = [module.to(device) for module in self.modules]
        # A CPU has no fp16: networks trained in it compute in single precision there.
        has_precision = device.type != "cpu" or peers.precision != "fp16"
        self.precision = peers.precision if has_precision else "no"

    def only(self, name: str) -> "Networks":
        """Return a single one of these networks, which is not copied."""
        one, place = copy.copy(self), self.names.index(name)
        one.names, one.modules = [name], [self.modules[place]]
        one._folders = [self._folders[place]]
        return one

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return every network's logits, [K, B, C] on the device.

        Args:
            images: RGB levels [B, S, S, 3] uint8, as ``data.decode.to_rgb`` returns them.
        """
        set_arithmetic(self._device, self._tf32)  # somebody else may have changed it
        split = Split(images, torch.zeros(len(images), dtype=torch.int64))
        outputs = []
        for folder, module in zip(self._folders, self.modules, strict=True):
            # The same code as in training, so that the inputs are equal to the last bit.
            prepared = PixelSet(
                split,
                folder.normalisation,
                augment=(),
                seed=0,
                device=self._device,
                dtype=next(module.parameters()).dtype,
            )
            x, _ = prepared.rows(0, len(images))
            with self._autocast():
                outputs.append(module(x))
        wide = torch.float64 if any(o.dtype == torch.float64 for o in outputs) else torch.float32
        return torch.stack([output.to(wide) for output in outputs])

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "no":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=_HALF[self.precision])
