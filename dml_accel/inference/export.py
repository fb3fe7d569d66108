"""Export of a network or an ensemble, for timm or as ONNX: into a new folder, and to the hub."""

import contextlib
import math
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import nn

from dml_accel.core.errors import RunError, UnreadableError, UsageError
from dml_accel.core.files import can_be_made, read_at_most, read_json, write_json, write_text
from dml_accel.inference import onnx
from dml_accel.inference.load import TrainedPeers
from dml_accel.models.hub import check_push, push_folder
from dml_accel.models.model_card import model_card, own_networks, public_name, training_text
from dml_accel.models.peer_folder import CARD, WEIGHTS, PeerFolder, load_network
from dml_accel.models.timm_config import FILE, GREY_BITS, OURS, input_entries
from dml_accel.training.choosing import best_of
from dml_accel.training.run_folder import SavedRun

BEST, ENSEMBLE = "best", "ensemble"
FORMATS = ("safetensors", "onnx")
_LARGEST_CARD = 2**20  # bytes


# ---------------------------------------------------------------- what to export


def select_peers(peers: TrainedPeers, asked: str | None) -> tuple[TrainedPeers, str]:
    """Return the peers that ``--peer`` selects, and a name for them.

    Args:
        peers: of a run, or a single one.
        asked: a peer's name, ``best`` (by validation accuracy) or ``ensemble``; None for the only
            peer.

    Raises:
        UsageError: there is no such peer, several could be meant, or there is no validation
            accuracy.
    """
    names = list(peers.folders)
    if asked is None:
        if len(names) > 1:
            raise UsageError(
                f"{peers.path} has {len(names)} peers: choose with --peer {ENSEMBLE}, {BEST} or "
                f"one of {', '.join(names)}"
            )
        return peers, names[0]
    if asked == ENSEMBLE:
        return peers, ENSEMBLE
    name = _best_peer(peers) if asked == BEST else asked
    return peers.only(name), name


def _best_peer(peers: TrainedPeers) -> str:
    """Return the best peer by validation; see ``best_of``."""
    scores: dict[str, dict[str, Any]] = {}
    for name in peers.folders:
        val = peers.results_by_peer.get(name, {}).get("val")
        if not isinstance(val, dict) or not isinstance(val.get("top1"), int | float):
            raise UsageError(
                f"--peer {BEST} chooses by validation accuracy, but {peers.path} has none"
                f"{f' at {peers.note}' if peers.note else ''} (the test split is for reporting): "
                f"train with --val-fraction 0.1, or name a peer: {', '.join(peers.folders)}"
            )
        nll = val.get("nll")
        scores[name] = {
            "top1": val["top1"],
            "nll": nll if isinstance(nll, int | float) else math.inf,
        }
    best = best_of(scores)
    words = (
        f"{name} {100 * score['top1']:.2f}% (NLL {score['nll']:.4f})"
        for name, score in scores.items()
    )
    print(f"{BEST} is {best}: on the validation split {', '.join(words)}", file=sys.stderr)
    return best


# ---------------------------------------------------------------- the target folder


def check_target(target: Path) -> None:
    """Refuse a target that is not a new or empty folder, or cannot be created.

    Raises:
        UsageError: see above.
    """
    try:
        if os.path.lexists(target) and not target.is_dir():
            raise UsageError(f"--to {target} is not a folder; name a new one")
        if target.is_dir() and any(target.iterdir()):
            raise UsageError(f"--to {target} is not empty; name a new folder")
    except OSError as error:
        raise UsageError(f"--to {target} cannot be read: {error.strerror}") from error
    if not can_be_made(target):
        raise UsageError(f"--to {target} cannot be created or written; name another folder")


@contextlib.contextmanager
def filling(target: Path) -> Iterator[Path]:
    """Yield a temporary folder, and move its content to ``target`` at the end.

    An existing empty folder is kept, because it may be a mount point or a working directory; a new
    one appears whole. After an error the temporary folder is removed.
    """
    target = target.resolve()
    exists = target.is_dir()
    parent = target if exists else target.parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f".{target.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        if exists:
            for entry in sorted(temporary.iterdir()):
                entry.rename(target / entry.name)
        else:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---------------------------------------------------------------- to a folder, and to the hub


@dataclass(frozen=True)
class Exported:
    """What an export has written, and where.

    Attributes:
        folder: that was written; None if the files are only on the hub.
        text: one line: which files, and how they were checked.
        address: of the repository on the hub; empty if nothing was pushed.
        commit: of the files there.
        notes: lines about the repository that its owner should know.
    """

    folder: Path | None
    text: str
    address: str = ""
    commit: str = ""
    notes: tuple[str, ...] = ()


def deliver(
    write: Callable[[Path], str],
    to: Path | None,
    push_to: str | None = None,
    private: bool = False,
) -> Exported:
    """Write a folder, and push it to the hub if that is asked for; check both before.

    Args:
        write: writes the files of an export into the folder that it is given, which does not exist
            or is empty; returns a line about them.
        to: that folder; None for one that is removed once it is pushed.
        push_to: ``owner/name`` on the hub; None to push nothing.
        private: whether the repository is created as a private one.

    Raises:
        UsageError: neither is named, the folder cannot be written, or ``check_push`` refuses.
        RunError: the hub fails; the text says where the files are kept.
    """
    if to is None and push_to is None:
        raise UsageError("say where to: --to names a folder, --push-to a repository of the hub")
    if private and push_to is None:
        raise UsageError("--private has no effect without --push-to: drop it")
    if to is not None:
        check_target(to)
    repository = None if push_to is None else check_push(push_to, private)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "export" if to is None else to
        text = write(folder)
        if repository is None:
            return Exported(to, text)
        try:
            pushed = push_folder(repository, folder)
        except RunError as error:
            kept = "" if to is None else f"; the files are in {to}"
            raise RunError(f"{error}{kept}") from error
        return Exported(to, text, pushed.address, pushed.commit, pushed.notes)


# ---------------------------------------------------------------- writing


def export(peers: TrainedPeers, name: str, style: str, target: Path) -> str:
    """Write a network or an ensemble into a new folder.

    Args:
        peers: as ``select_peers`` returns them.
        name: the same.
        style: one of ``FORMATS``.
        target: the folder; see ``check_target``.

    Returns:
        One line: which files were written, and how they were checked.

    Raises:
        UsageError: a network cannot be loaded, or its ONNX file would differ from it.
    """
    # The networks are built for safetensors, too: a damaged folder must not be passed on.
    nets = [load_network(folder) for folder in peers.folders.values()]
    with filling(target) as folder:
        if style == "onnx":
            return _write_onnx(peers, name, nets, folder)
        if name == ENSEMBLE:
            return _copy_ensemble(peers, folder) + _what_timm_needs(peers)
        _copy_peer(peers, name, folder)
        files = ", ".join(sorted(file.name for file in folder.iterdir()))
        return f"{name} as {files}{_what_timm_needs(peers)}"


def _what_timm_needs(peers: TrainedPeers) -> str:
    own = own_networks(folder.arch for folder in peers.folders.values())
    return "".join(
        f"; timm does not know {arch} by itself: import {module}, which registers it, before timm "
        "loads the folder"
        for arch, module in own.items()
    )


def _copy_ensemble(peers: TrainedPeers, folder: Path) -> str:
    for name in peers.folders:
        (folder / name).mkdir()
        _copy_peer(peers, name, folder / name)
    write_text(folder / CARD, str(_card(peers, ENSEMBLE, "ensemble")))
    return f"{len(peers.folders)} networks as {', '.join(peers.folders)}"


def _copy_peer(peers: TrainedPeers, name: str, folder: Path) -> None:
    """Copy the three files of a peer, and nothing else that its folder may hold."""
    source = peers.folders[name].path
    shutil.copyfile(source / WEIGHTS, folder / WEIGHTS)
    write_json(folder / FILE, read_json(source / FILE))
    try:
        card = read_at_most(source / CARD, _LARGEST_CARD)
        write_text(folder / CARD, card.decode(errors="replace"))
    except UnreadableError:  # there is none
        write_text(folder / CARD, str(_card(peers.only(name), name, "timm")))


def _write_onnx(peers: TrainedPeers, name: str, nets: list[nn.Module], folder: Path) -> str:
    folders = list(peers.folders.values())
    if any(one.normalisation != folders[0].normalisation for one in folders):
        raise UsageError(
            f"{peers.path}: the peers' inputs are normalised differently, so one graph cannot "
            "serve all of them; export each peer by its name"
        )
    nets = [net.float() for net in nets]
    is_ensemble = name == ENSEMBLE
    net = onnx.Ensemble(nets).eval() if is_ensemble else nets[0]
    output = onnx.LOG_MEAN if is_ensemble else onnx.LOGITS
    path = folder / onnx.FILE
    difference = onnx.write_onnx(net, (3, peers.image_size, peers.image_size), output, path)
    write_json(folder / FILE, _onnx_config(peers, folders[0], output))
    write_text(folder / CARD, str(_card(peers, name, "onnx")))
    return (
        f"{name} as {onnx.FILE} ({path.stat().st_size:,} bytes); largest difference to torch "
        f"{difference:.1e} of the largest value"
    )


def _onnx_config(peers: TrainedPeers, first: PeerFolder, output: str) -> dict[str, Any]:
    """Return inputs, outputs and classes of a graph, with the keys of timm's config.json."""
    size, classes = peers.image_size, len(peers.classes)
    meaning = {
        onnx.LOGITS: "logits",
        onnx.LOG_MEAN: "natural logarithm of the mean of the networks' posteriors",
    }
    grey = {} if first.grey_bits is None else {OURS: {GREY_BITS: first.grey_bits}}
    return grey | {
        "networks": {name: folder.arch for name, folder in peers.folders.items()},
        "num_classes": classes,
        "label_names": list(peers.classes),
        "pretrained_cfg": {
            "num_classes": classes,
            **input_entries(first.geometry, first.normalisation),
        },
        "onnx": {
            "file": onnx.FILE,
            "input": {
                "name": onnx.INPUT,
                "type": "float32",
                "shape": ["batch", 3, size, size],
                "meaning": "RGB on the [0, 1] scale, minus mean, divided by std",
            },
            "output": {
                "name": output,
                "type": "float32",
                "shape": ["batch", classes],
                "meaning": meaning[output],
            },
        },
    }


def _card(peers: TrainedPeers, name: str, usage: str) -> ModelCard:
    """Return a model card; dataset, steps and accuracy only if the run's records hold them."""
    nets = Counter(folder.arch for folder in peers.folders.values())
    archs = ", ".join(f"`{arch}`" + f" x {n}" * (n > 1) for arch, n in nets.items())
    dataset = peers.config.get("dataset")
    dataset = public_name(dataset) if isinstance(dataset, str) else None
    steps = peers.results.get("steps")
    what, metrics = f"A {archs}", peers.results_by_peer.get(name, {}).get("test")
    if name == ENSEMBLE:
        what = f"An ensemble of {len(peers.folders)} networks, {archs}"
        metrics = peers.results.get("ensemble")
    is_complete = isinstance(metrics, dict) and {"top1", "n"} <= metrics.keys()
    size = peers.image_size
    return model_card(
        name,
        f"{what}{f', trained on `{dataset}`' if dataset else ''}, for {len(peers.classes)} classes "
        f"and images of {size} x {size} pixels{f': {peers.which}' if peers.which else ''}.",
        metrics=metrics if is_complete else None,
        dataset=dataset,
        steps=steps if isinstance(steps, int) else None,
        training=_training(peers),
        geometry=peers.geometry,
        usage=usage,
        peers=list(peers.folders),
        archs=list(nets),
        split=_test_split(peers),
    )


def _training(peers: TrainedPeers) -> str:
    """Return how a run was trained, for a card; empty if there is no record of it."""
    if not peers.config:
        return ""
    description = SavedRun(peers.path).description
    versions, commit = description.get("versions"), description.get("commit")
    return training_text(
        peers.config,
        list(peers.results_by_peer) or list(peers.folders),
        versions if isinstance(versions, dict) else {},
        commit if isinstance(commit, str) else None,
    )


def _test_split(peers: TrainedPeers) -> str:
    """Return what the test split of a run is called; older runs do not say."""
    splits = peers.results.get("splits")
    name = splits.get("test") if isinstance(splits, dict) else peers.config.get("test_split")
    return name if isinstance(name, str) else "test"
