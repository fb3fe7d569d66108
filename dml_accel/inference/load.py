"""Trained networks in use: those of a run, or one peer, with what their inputs and outputs mean.

A folder may be a stranger's; see frozen.py for how it is read.

Shape letters: K networks, B images, S pixels a side, C classes.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dml_accel.core.config import UsageError
from dml_accel.data.batches import ImageSet
from dml_accel.data.decode import Split
from dml_accel.models import peer_folder as frozen
from dml_accel.models.peer_folder import PeerFolder, description
from dml_accel.training.saved import state_of

ROWS = 256  # images that are computed at once, as in the evaluations of training
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Trained:
    """Networks that tell the same classes apart, as their folders describe them.

    Attributes:
        path: of the run or of the peer.
        folders: of the peers, by name.
        classes: their names, or their numbers where no folder tells.
        image_size: pixels a side of the inputs.
        run: the content of the run's config.json; empty where this is no run.
        results: that of its results.json; empty where there is none.
    """

    path: Path
    folders: Mapping[str, PeerFolder]
    classes: tuple[str, ...]
    image_size: int
    run: Mapping[str, Any]
    results: Mapping[str, Any]

    @property
    def precision(self) -> str:
        """The mixed precision that the networks were trained and evaluated in."""
        found = self.results.get("mixed_precision")
        return found if found in _HALF else "no"

    @property
    def measured(self) -> Mapping[str, Mapping[str, Any]]:
        """What results.json says of each peer, by name.

        Raises:
            UsageError: it is not as a run writes it.
        """
        try:
            return {str(peer["name"]): dict(peer) for peer in self.results.get("peers", [])}
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{self.path / 'results.json'} is not one of a run") from error

    def only(self, name: str) -> "Trained":
        """Return one of the peers alone.

        Raises:
            UsageError: there is none of that name.
        """
        if name not in self.folders:
            raise UsageError(
                f"--peer {name}: {self.path} has no such peer; it has {', '.join(self.folders)}"
            )
        one = {name: self.folders[name]}
        return Trained(self.path, one, self.classes, self.image_size, self.run, self.results)


def find(path: Path) -> Trained:
    """Read what a run, a peer's folder or a folder of peers holds; no network is built.

    Raises:
        UsageError: it holds no trained peer, one cannot be read, some are missing, the run is not
            finished, or they do not have the same classes and image size.
    """
    if not path.is_dir():
        raise UsageError(f"{path} is no folder; name a run, or peers/<name> of one")
    is_peer = (path / "model.safetensors").exists()
    is_run = not is_peer and any((path / name).exists() for name in ("config.json", "status.json"))
    if is_run and not (path / "results.json").is_file():
        raise UsageError(
            f"{path} is not finished ({state_of(path)}): let it end with --resume auto, or name a "
            "peer's folder"
        )
    found = frozen.folders_of(path)
    folders = {one.name or one.resolve().name: frozen.read(one) for one in found}
    first = next(iter(folders.values()))
    _require_alike(path, folders)
    classes = first.classes or tuple(map(str, range(first.number_of_classes)))
    if len(classes) != first.number_of_classes:
        raise UsageError(
            f"{first.path / 'config.json'} names {len(classes)} classes and counts "
            f"{first.number_of_classes}"
        )
    run: dict[str, Any] = {}
    results: dict[str, Any] = {}
    if is_run:
        run, results = description(path / "config.json"), description(path / "results.json")
    trained = Trained(path, folders, classes, first.image_size, run, results)
    differing = trained.measured.keys() ^ folders.keys() if results else set()
    if differing:
        raise UsageError(
            f"{path}: results.json and the folders in peers differ: {', '.join(sorted(differing))}"
        )
    return trained


def _require_alike(path: Path, folders: Mapping[str, PeerFolder]) -> None:
    first_name, first = next(iter(folders.items()))
    for name, folder in folders.items():
        for what, mine, its in (
            ("classes", folder.number_of_classes, first.number_of_classes),
            ("class names", folder.classes, first.classes),
            ("pixels a side", folder.image_size, first.image_size),
        ):
            if mine != its:
                raise UsageError(
                    f"{path}: {name} and {first_name} do not answer together, as they differ in "
                    f"{what}; name one of their folders"
                )


def device_of(cpu: bool) -> torch.device:
    """Return the accelerator of this machine, else the CPU."""
    found = None if cpu else torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")


class Networks:
    """Networks that were built, ready to answer.

    Args:
        trained: what to build.
        device: where.

    Raises:
        UsageError: one cannot be built; see ``frozen.build``.
    """

    def __init__(self, trained: Trained, device: torch.device) -> None:
        self.names = list(trained.folders)
        self._device, self._folders = device, list(trained.folders.values())
        self.modules = [frozen.build(folder).requires_grad_(False) for folder in self._folders]
        if device.type == "mps":  # it knows no double precision
            self.modules = [module.float() for module in self.modules]
        self.modules = [module.to(device) for module in self.modules]
        # fp16 is for accelerators: what was trained there in it answers in single precision here.
        suits = device.type != "cpu" or trained.precision != "fp16"
        self.precision = trained.precision if suits else "no"

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return what every network makes of some images.

        Args:
            images: RGB levels [B, S, S, 3], uint8, as ``decoding.to_rgb`` makes them.

        Returns:
            Logits [K, B, C] on the device.
        """
        split, answers = Split(images, torch.zeros(len(images), dtype=torch.int64)), []
        for folder, module in zip(self._folders, self.modules, strict=True):
            # What makes the batches of training normalises these, too, to the last bit.
            prepared = ImageSet(
                split,
                folder.normalisation,
                augment="none",
                seed=0,
                device=self._device,
                dtype=next(module.parameters()).dtype,
            )
            x, _ = prepared.rows(0, len(images))
            with self._precision():
                answers.append(module(x))
        wide = torch.float64 if any(a.dtype == torch.float64 for a in answers) else torch.float32
        return torch.stack([answer.to(wide) for answer in answers])

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "no":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=_HALF[self.precision])
