"""Trained networks: load, evaluate, predict, export.

Shape letters: K networks, B images, H and W pixels of an image, C classes.
"""

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dml_accel.api.process import borrowed, own_settings
from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.core.host import expanded, is_on_hub
from dml_accel.core.tables import printable
from dml_accel.core.versions import call_text, require_packages
from dml_accel.data.feeds import reading_workers
from dml_accel.data.pixels import to_rgb, unreadable
from dml_accel.data.selection import split_names
from dml_accel.distributed.device import choose_device
from dml_accel.distributed.launch import launched_rank
from dml_accel.inference import evaluate as evaluation
from dml_accel.inference import images as evaluated
from dml_accel.inference import load as loading
from dml_accel.inference import onnx
from dml_accel.inference import predict as prediction
from dml_accel.inference.checkpoints import read_checkpoint_peers
from dml_accel.inference.export import ENSEMBLE, FORMATS, Exported, deliver, select_peers
from dml_accel.inference.export import export as write_export
from dml_accel.inference.load import BEST, LAST, TrainedPeers, read_trained_peers
from dml_accel.inference.own import export_own, find_own
from dml_accel.inference.predict import ImagePrediction
from dml_accel.models.hub import local_folder, name_of
from dml_accel.training.run_folder import WEIGHTS, SavedRun

if TYPE_CHECKING:
    from pandas import DataFrame

PathLike = str | os.PathLike[str]
OneImage = PathLike | Image.Image | np.ndarray[Any, Any] | Tensor
Images = OneImage | Iterable[OneImage]
OnError = Callable[[str, str], None]
_NAMED = 5  # images that cannot be read
_settings = threading.Lock()  # of torch, which belong to all threads


# ---------------------------------------------------------------- networks


class Networks:
    """Trained networks on a device, ready to predict; ``load`` returns them.

        networks = dml_accel.load("runs/pair")
        networks.predict("cat.png")[0].best

    They predict what ``dml-accel predict`` prints for the same file. Several predict as an
    ensemble, by their mean posterior.

    Attributes:
        path: of the folder that they were loaded from.
        names: of the networks.
        classes: names of the classes, in the order of the logits.
        image_size: pixels per side of their inputs.
        device: where they compute.
        modules: the networks themselves by name, in evaluation mode. Their inputs are normalised;
            ``logits`` does that.
    """

    def __init__(self, peers: TrainedPeers, device: torch.device) -> None:
        with own_settings():
            self._networks = loading.Networks(peers, device)
        self._geometry, self._grey_bits = peers.geometry, peers.grey_bits
        self.path, self.device = peers.path, device
        self.names, self.classes = tuple(peers.folders), peers.classes
        self.image_size = peers.image_size
        self.modules: Mapping[str, nn.Module] = MappingProxyType(
            dict(zip(self.names, self._networks.modules, strict=True))
        )

    def __repr__(self) -> str:
        names, classes = ", ".join(self.names), len(self.classes)
        return f"Networks({names}: {classes} classes, {self.image_size} pixels, {self.device})"

    def predict(
        self, images: Images, *, peer: str | None = None, on_error: OnError | None = None
    ) -> list[ImagePrediction]:
        """Return the likeliest classes of each image, in order.

        Args:
            images: one or several of these: the path of a file; of a folder, for all images in it;
                a pattern such as ``photos/*.jpg``; a PIL image; RGB levels [H, W, 3] uint8 as an
                array or tensor, or [B, H, W, 3]. Each becomes a square as in training.
            peer: the only network to use (default: all, as an ensemble).
            on_error: called with the name of an image that cannot be used and the reason; the image
                is left out. By default that is an error.

        Raises:
            UsageError: an image cannot be used, there is no such peer, or outputs are not finite.
        """
        chosen = self._networks
        if peer not in (None, ENSEMBLE):
            if peer not in self.names:
                names = ", ".join(self.names)
                raise UsageError(f"peer={peer!r}: {self.path} has no such peer; it has {names}")
            chosen = chosen.only(peer)
        with _settings, own_settings():
            batches = prediction.predict(chosen, self._levels(images, on_error or _raise))
            return [one for batch in batches for one in batch]

    def logits(self, images: Images) -> Tensor:
        """Return the logits of every network for each image, [K, B, C] on ``device``.

        Args:
            images: as for ``predict``.

        Raises:
            UsageError: an image cannot be used.
        """
        levels = [one for _, one in self._levels(images, _raise)]
        if not levels:
            return torch.empty(len(self.names), 0, len(self.classes), device=self.device)
        with _settings, own_settings():
            batches = torch.from_numpy(np.stack(levels)).split(loading.BATCH_SIZE)
            return torch.cat([self._networks.logits(batch) for batch in batches], 1)

    def _levels(self, images: Any, on_error: OnError) -> Iterator[tuple[str, np.ndarray]]:
        """Yield names and levels [S, S, 3] of images."""
        for place, image in enumerate(_one_by_one(images)):
            name = f"images[{place}]"
            if isinstance(image, (str, os.PathLike)):
                word = str(expanded(os.fspath(image)))
                word = "./-" if word == "-" else word  # which would be the standard input
                files = prediction.find_images([word], (), on_error)
                yield from prediction.read_images(files, self._geometry, on_error, self._grey_bits)
                continue
            try:
                picture = image if isinstance(image, Image.Image) else _picture(image)
                levels = to_rgb(picture, self._geometry, self._grey_bits)
            except Exception as error:  # Pillow raises many kinds for what it cannot decode
                on_error(name, unreadable(error))
                continue
            yield name, levels


def _raise(name: str, reason: str) -> None:
    raise UsageError(f"{printable(name)}: {printable(reason)}")


def _one_by_one(images: Any) -> Iterable[Any]:
    alone = isinstance(images, (str, os.PathLike, Image.Image))
    if isinstance(images, (np.ndarray, Tensor)):
        alone = images.ndim != 4
    elif not alone and (isinstance(images, Mapping) or not isinstance(images, Iterable)):
        alone = True  # it is refused by its type
    return (images,) if alone else images


def _picture(image: Any) -> Image.Image:
    """Return RGB levels as a picture.

    Raises:
        ValueError: they are not RGB levels [H, W, 3] uint8.
    """
    takes = "give paths, PIL images, or RGB levels [H, W, 3] uint8"
    if not isinstance(image, (np.ndarray, Tensor)):
        raise ValueError(f"a {type(image).__name__} is not an image: {takes}")
    kind, is_tensor = str(image.dtype).removeprefix("torch."), isinstance(image, Tensor)
    fix = ""
    if kind != "uint8":
        to_bytes = ".to(torch.uint8)" if is_tensor else ".astype('uint8')"
        fix = f"; levels from 0 to 255 become uint8 by x{to_bytes}"
        if "float" in kind:
            rounds = f"(255 * x).round().clip(0, 255){to_bytes}"
            fix = f"; values from 0 to 1 become levels by {rounds}, normalised ones are not taken"
    elif image.ndim == 3 and image.shape[0] == 3:
        fix = "; use x.permute(1, 2, 0)" if is_tensor else "; use x.transpose(1, 2, 0)"
    elif image.ndim == 2:
        stack = "torch.stack([x] * 3, -1)" if is_tensor else "numpy.stack([x] * 3, -1)"
        fix = f"; grey levels become RGB by {stack}"
    if kind != "uint8" or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"it is {list(image.shape)} of {kind}: {takes}{fix}")
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    return Image.fromarray(np.ascontiguousarray(array))


# ---------------------------------------------------------------- load


def load(
    source: PathLike,
    *,
    checkpoint: PathLike | int | None = None,
    weights: str | None = None,
    device: str | torch.device | None = None,
) -> Networks:
    """Load the trained networks of a run, or of the folder of a peer or of several.

    Args:
        source: a run or its path, ``peers/<name>`` of one, an exported folder, or
            ``hf-hub:owner/name[@revision]``.
        checkpoint: ``latest``, a step, or the path of a checkpoint of the run, which need not be
            finished (default: the trained networks of a finished run).
        weights: ``last``, ``ema`` or ``best`` (default: last).
        device: where they compute (default: the accelerator of this machine, else the CPU).

    Raises:
        UsageError: the source has no such networks.
    """
    try:
        found = torch.device(device) if device is not None else choose_device(cpu=False)
    except RuntimeError as error:
        raise UsageError(f"device={device!r} is not one of torch: cpu or cuda:0") from error
    with opened(source, checkpoint, weights) as peers:
        return Networks(peers, found)


def _text(source: Any) -> str:
    if not isinstance(source, (str, os.PathLike)):
        raise UsageError(f"a {type(source).__name__} names no networks: give a run, or a path")
    return os.fspath(source)


@contextlib.contextmanager
def opened(
    source: PathLike,
    checkpoint: PathLike | int | None = None,
    weights: str | None = None,
    exports: str | None = None,
) -> Iterator[TrainedPeers]:
    """Yield the trained peers of a source; those of a checkpoint are gone after the context.

    Args:
        source: see ``load``.
        checkpoint: the same.
        weights: the same.
        exports: ``--peer`` of an export, whose ``best`` has the best weights if the run kept them.

    Raises:
        UsageError: the source has no such networks.
    """
    path = local_folder(_text(source))
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder; name a run, or peers/<name> of one")
    if weights is not None and weights not in WEIGHTS:
        raise UsageError(f"--weights is {weights}; it must be one of {', '.join(WEIGHTS)}")
    if weights is None and exports == BEST and checkpoint is None:
        with contextlib.suppress(UsageError):  # not a finished run, which is refused later
            weights = BEST if BEST in SavedRun(path).results else LAST
    with contextlib.ExitStack() as stack:
        if checkpoint is None:
            peers = read_trained_peers(path, weights or LAST)
        else:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            named = checkpoint if isinstance(checkpoint, os.PathLike) else str(checkpoint)
            peers = read_checkpoint_peers(path, os.fspath(named), scratch, weights or LAST)
        if peers.which:
            print(peers.which, file=sys.stderr, flush=True)
        yield peers


# ---------------------------------------------------------------- evaluate


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` returns and writes.

    Attributes:
        path: the folder of evaluation.json, confusion.csv and confusion.png.
        results: the content of evaluation.json: fractions in [0, 1], NLL in nats.
        title: one line: how many images of what.
        unread: the images that could not be read and were left out.
    """

    path: Path
    results: dict[str, Any] = field(repr=False)
    title: str
    unread: tuple[str, ...] = ()
    _confusion: Tensor | None = field(default=None, repr=False, compare=False)
    _classes: tuple[str, ...] = field(default=(), repr=False)

    @property
    def confusion(self) -> "DataFrame | None":
        """Images of each class (rows) by predicted class (columns), of the ensemble or the network.

        None if there are more than 2000 classes.
        """
        import pandas as pd

        if self._confusion is None:
            return None
        return pd.DataFrame(self._confusion.numpy(), self._classes, self._classes)


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
) -> Evaluation:
    """Evaluate trained networks on a data set, as ``dml-accel evaluate`` does.

        dml_accel.evaluate("runs/pair").results["ensemble"]["top1"]

    Args:
        source, checkpoint, weights: see ``load``.
        dataset: as for ``train`` (default: that of the run).
        dataset_config, image_column, label_column, test_split, test_fraction: which images of it
            (default: as in the run).
        bad_images: ``refuse`` images that cannot be read, or ``skip`` them (default: as in the
            run).
        feed: ``auto``, ``memory`` or ``loader``: where images come from, with the same numbers.
        workers: processes that decode images which are not in memory (default: as for ``train``).
        to: the folder of the results (default: ``evaluations/<dataset>-<split>`` in the source).
        cpu: compute on the CPU.

    Raises:
        UsageError: the input does not allow it; nothing has been written.
    """
    arguments = dict(locals())
    _refuse_rank("evaluate")
    with borrowed("evaluate"):
        given = {n: v for n, v in arguments.items() if v is not None and v is not False}
        text = {n: os.fspath(v) if isinstance(v, os.PathLike) else v for n, v in given.items()}
        return evaluate_as(arguments, call_text("evaluate", text))


def _refuse_rank(function: str) -> None:
    if launched_rank():
        raise UsageError(
            f"{function} writes files, and {launched_rank()} is not the first process: call it in "
            "that of RANK 0 alone"
        )


def evaluate_as(values: Mapping[str, Any], command: str) -> Evaluation:
    """Evaluate as a command or call asks.

    Args:
        values: the arguments of ``evaluate``.
        command: the command line or the call, for the record.
    """
    require_packages("evaluate", "matplotlib")
    source, to = _text(values["source"]), values["to"]
    if is_on_hub(source) and not to:
        raise UsageError(f"evaluate {source} needs --to, a folder for its results")
    compute = Config(feed=values["feed"], workers=values["workers"]).compute
    with opened(source, values["checkpoint"], values["weights"]) as peers:
        data = evaluated.choose_images(peers, values)
        folder = expanded(os.fspath(to)) if to else evaluated.folder_of(peers, data)
        evaluated.check_folder(folder)
        device = choose_device(values["cpu"])
        networks = loading.Networks(peers, device)
        split, images = evaluated.read_images(peers, data, compute, bool(values["dataset"]))
        evaluated.refuse_other_evaluation(folder, data, images)
        origin = {
            "of": name_of(peers.path),
            "dataset": data.dataset,
            "split": data.test_split,
            "images": vars(images),
            "command": command,
            **({"step": peers.step, "checkpoint": peers.note} if peers.note else {}),
            **({"weights": peers.weights} if peers.weights != LAST else {}),
        }
        reading = evaluation.Reading(
            reading_workers(compute, on_cpu=device.type == "cpu"), data.bad_images == "skip"
        )
        found = evaluation.evaluate(peers, networks, split, device, origin, reading)
    evaluation.write_evaluation(found, folder)
    unread = evaluated.unread_images(data, split) or [one.place for one in reading.damage]
    if unread:
        some = ", ".join(unread[:_NAMED]) + ", ..." * (len(unread) > _NAMED)
        count = f"{len(unread):,} image{'s' * (len(unread) > 1)}"
        print(f"cannot be read, and not counted: {count}: {some}", file=sys.stderr)
    by = f", by {peers.which}" if peers.which else ""
    read = f"{len(split) - len(unread):,} of " if unread else ""
    title = f"{read}{len(split):,} images of {data.dataset}, split {split_names(data).test}{by}"
    return Evaluation(folder, found.record, title, tuple(unread), found.confusion_CC, found.classes)


# ---------------------------------------------------------------- predict


def predict(
    source: PathLike,
    images: Images,
    *,
    peer: str | None = None,
    checkpoint: PathLike | int | None = None,
    weights: str | None = None,
    cpu: bool = False,
    on_error: OnError | None = None,
) -> list[ImagePrediction]:
    """Predict the classes of images, as ``dml-accel predict`` does: the five likeliest of each.

        for one in dml_accel.predict("runs/pair", ["cat.png", "holiday/"]):
            print(one.image, one.best, one.probabilities[0])

    ``load`` the networks once to predict several times.

    Args:
        source, checkpoint, weights: see ``load``.
        images, peer, on_error: see ``Networks.predict``.
        cpu: compute on the CPU.

    Raises:
        UsageError: the source has no such networks, or an image cannot be used.
    """
    device = choose_device(cpu)
    networks = load(source, checkpoint=checkpoint, weights=weights, device=device)
    return networks.predict(images, peer=peer, on_error=on_error)


# ---------------------------------------------------------------- export


def export(
    source: PathLike,
    *,
    to: PathLike | None = None,
    peer: str | None = None,
    format: str = "safetensors",
    checkpoint: PathLike | int | None = None,
    weights: str | None = None,
    push_to: str | None = None,
    private: bool = False,
    network: nn.Module | None = None,
) -> Exported:
    """Write a trained network, or all of a run, to a folder of its own, and push it to the hub.

        dml_accel.export("runs/pair", peer="resnet8-0", to="exported", format="onnx").folder

    It does what ``dml-accel export`` does.

    Args:
        source, checkpoint, weights: see ``load``. With ``peer="best"`` the weights are the best
            ones, if the run kept them.
        to: a new or empty folder.
        peer: a name, ``best`` (by validation accuracy) or ``ensemble`` (default: the only one).
        format: ``safetensors`` or ``onnx``.
        push_to: ``owner/name`` on the hub. It or ``to`` is needed.
        private: whether the repository is created as a private one.
        network: the module itself, of a run of ``learn`` whose networks timm cannot build; it gets
            the trained weights.

    Raises:
        UsageError: the input does not allow it; nothing has been written.
        RunError: the hub fails.
    """
    arguments = dict(locals())
    _refuse_rank("export")
    with borrowed("export"):
        return export_as(arguments)


def export_as(values: Mapping[str, Any]) -> Exported:
    """Export as a command or call asks.

    Args:
        values: the arguments of ``export``; a command has no ``network``.
    """
    style, peer = values["format"], values["peer"]
    if style not in FORMATS:
        raise UsageError(f"--format is {style}; it must be one of {', '.join(FORMATS)}")
    if style == "onnx":
        require_packages("--format onnx", *onnx.PACKAGES)
    network = values.get("network")
    if network is not None:
        if values["checkpoint"] is not None:
            raise UsageError("network= writes the weights of a finished run: leave checkpoint out")
        own = find_own(local_folder(os.fspath(values["source"])), peer, values["weights"] or LAST)
        return deliver(
            lambda folder: export_own(own, network, folder, style),
            expanded(os.fspath(values["to"])) if values["to"] else None,
            values["push_to"],
            values["private"],
        )
    with opened(values["source"], values["checkpoint"], values["weights"], peer or "") as peers:
        chosen, name = select_peers(peers, peer)
        return deliver(
            lambda folder: write_export(chosen, name, style, folder),
            expanded(os.fspath(values["to"])) if values["to"] else None,
            values["push_to"],
            values["private"],
        )
