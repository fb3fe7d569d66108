"""A chosen network, or all of a cohort, as a folder of its own: for timm, or for ONNX runtimes."""

import contextlib
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from dml_accel.core.config import UsageError
from dml_accel.core.files import UnreadableError, can_be_made, read_at_most, write_json, write_text
from dml_accel.inference import onnx as onnx_model
from dml_accel.inference.load import Trained
from dml_accel.models import peer_folder as frozen
from dml_accel.models.model_card import TIMM_USAGE, model_card, without_place
from dml_accel.models.peer_folder import PeerFolder

BEST, ENSEMBLE = "best", "ensemble"
FORMATS = ("safetensors", "onnx")
_LARGEST_CARD = 2**20  # bytes

_ONNX_USAGE = """```python
import json
import numpy as np
import onnxruntime

known = json.load(open("config.json"))
session = onnxruntime.InferenceSession("model.onnx")
# images: [batch, 3, height, width], float32, RGB levels of 0 ... 255
mean, std = (np.float32(known["pretrained_cfg"][k]).reshape(3, 1, 1) for k in ("mean", "std"))
(answers,) = session.run(None, {"input": (images / 255 - mean) / std})
print([known["label_names"][place] for place in answers.argmax(1)])
```"""

_ENSEMBLE_USAGE = """The ensemble is the mean of their posteriors:

```python
import timm
import dml_accel  # registers the *_cifar networks with timm

nets = [timm.create_model(f"local-dir:{folder}", pretrained=True).eval() for folder in FOLDERS]
posterior = sum(net(x).softmax(-1) for net in nets) / len(nets)
```

or `dml-accel predict path/to/this/folder IMAGE ...`."""


def choose(trained: Trained, peer: str | None) -> tuple[Trained, str]:
    """Return what is meant by ``--peer``, and its name.

    Args:
        trained: a run, or a peer's folder.
        peer: a peer's name, ``best`` by validation accuracy, or ``ensemble``; None for the only.

    Raises:
        UsageError: it is not there, or there is nothing to choose by.
    """
    names = list(trained.folders)
    if peer is None:
        if len(names) > 1:
            raise UsageError(
                f"{trained.path} has {len(names)} peers: choose with --peer {ENSEMBLE}, {BEST} or "
                f"one of {', '.join(names)}"
            )
        return trained, names[0]
    if peer == ENSEMBLE:
        return trained, ENSEMBLE
    if peer == BEST:
        peer = _best(trained)
    return trained.only(peer), peer


def _best(trained: Trained) -> str:
    """Return the peer of the highest validation accuracy, of equal ones that of the lowest NLL."""
    found: dict[str, tuple[float, float]] = {}
    for name in trained.folders:
        val = trained.measured.get(name, {}).get("val")
        if not isinstance(val, dict) or not isinstance(val.get("top1"), int | float):
            raise UsageError(
                f"--peer {BEST} chooses by validation accuracy, and {trained.path} has none (the "
                "test split is for reporting): train with --val-fraction 0.1, or name a peer: "
                f"{', '.join(trained.folders)}"
            )
        nll = val.get("nll")
        found[name] = (val["top1"], -nll if isinstance(nll, int | float) else -math.inf)
    best = max(sorted(found), key=lambda name: found[name])
    said = (
        f"{name} {100 * top1:.2f}% (NLL {-negative:.4f})"
        for name, (top1, negative) in found.items()
    )
    print(f"{BEST} is {best}: on the validation split {', '.join(said)}", file=sys.stderr)
    return best


def check_target(target: Path) -> None:
    """Refuse a folder that is not new or empty, or cannot be made.

    Raises:
        UsageError: see above.
    """
    try:
        if os.path.lexists(target) and not target.is_dir():
            raise UsageError(f"--to {target} is no folder; name a new one")
        if target.is_dir() and any(target.iterdir()):
            raise UsageError(f"--to {target} is not empty; name a new folder")
    except OSError as error:
        raise UsageError(f"--to {target} cannot be read: {error.strerror}") from error
    if not can_be_made(target):
        raise UsageError(f"--to {target} cannot be made or written; name another folder")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to fill; what is in it is in ``target`` afterwards, or nothing is.

    A folder that is there, and empty, is filled where it is: it may be where a volume is mounted,
    or somebody's current one. Otherwise it appears whole.
    """
    target = target.resolve()
    there = target.is_dir()
    parent = target if there else target.parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f".{target.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        if there:
            for entry in sorted(temporary.iterdir()):
                entry.rename(target / entry.name)
        else:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export(chosen: Trained, name: str, style: str, target: Path) -> str:
    """Write a network, or an ensemble, into a new folder.

    Args:
        chosen: what ``choose`` returned.
        name: the same.
        style: one of ``FORMATS``.
        target: the folder; see ``check_target``.

    Returns:
        What was written and how it was checked, in a line.

    Raises:
        UsageError: a network cannot be read, or is not the same as ONNX.
    """
    nets = {one: frozen.build(folder) for one, folder in chosen.folders.items()}
    with new_folder(target) as folder:
        if style == "onnx":
            return _write_onnx(chosen, name, list(nets.values()), folder)
        if name != ENSEMBLE:
            _copy_peer(chosen, name, folder)
            return f"{name} as {', '.join(sorted(file.name for file in folder.iterdir()))}"
        for one in chosen.folders:
            (folder / one).mkdir()
            _copy_peer(chosen, one, folder / one)
        usage = _ENSEMBLE_USAGE.replace("FOLDERS", repr(tuple(chosen.folders)))
        _card(chosen, name, usage, "timm", ["timm"]).save(folder / "README.md")
        return f"{len(nets)} networks as {', '.join(chosen.folders)}"


def _copy_peer(chosen: Trained, name: str, folder: Path) -> None:
    """Copy what timm loads and its card, and nothing else that may lie there."""
    source = chosen.folders[name].path
    shutil.copyfile(source / "model.safetensors", folder / "model.safetensors")
    write_json(folder / "config.json", frozen.description(source / "config.json"))
    try:
        card = read_at_most(source / "README.md", _LARGEST_CARD)
        write_text(folder / "README.md", card.decode(errors="replace"))
    except UnreadableError:  # it came without one
        _card(chosen.only(name), name, TIMM_USAGE, "timm", ["timm"]).save(folder / "README.md")


def _write_onnx(chosen: Trained, name: str, nets: list[nn.Module], folder: Path) -> str:
    together = name == ENSEMBLE
    folders = list(chosen.folders.values())
    if any(one.normalisation != folders[0].normalisation for one in folders):
        raise UsageError(
            f"{chosen.path}: the peers' inputs are not normalised alike, so that no one graph can "
            "take them; export each by its name"
        )
    nets = [net.float() for net in nets]
    net = onnx_model.Ensemble(nets).eval() if together else nets[0]
    output = onnx_model.LOG_MEAN if together else onnx_model.LOGITS
    path = folder / onnx_model.FILE
    found = onnx_model.write(net, chosen.image_size, output, path)
    write_json(folder / "config.json", _onnx_config(chosen, folders[0], output))
    _card(chosen, name, _ONNX_USAGE, "onnx", ["onnx"]).save(folder / "README.md")
    return (
        f"{name} as {onnx_model.FILE} ({path.stat().st_size:,} bytes); largest difference to torch "
        f"{found:.1e} of the largest value"
    )


def _onnx_config(chosen: Trained, like: PeerFolder, output: str) -> dict[str, Any]:
    """Return what a caller of the graph has to know, in the words of timm's config.json."""
    size, count = chosen.image_size, len(chosen.classes)
    return {
        "networks": {name: folder.arch for name, folder in chosen.folders.items()},
        "num_classes": count,
        "label_names": list(chosen.classes),
        "pretrained_cfg": {
            "num_classes": count,
            "input_size": [3, size, size],
            "mean": list(like.normalisation.mean),
            "std": list(like.normalisation.std),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
        },
        "onnx": {
            "file": onnx_model.FILE,
            "input": {
                "name": onnx_model.INPUT,
                "type": "float32",
                "shape": ["batch", 3, size, size],
                "meaning": "RGB on the [0, 1] scale, less mean, divided by std",
            },
            "output": {
                "name": output,
                "type": "float32",
                "shape": ["batch", count],
                "meaning": "logits"
                if output == onnx_model.LOGITS
                else "natural logarithm of the mean of the networks' posteriors",
            },
        },
    }


def _card(chosen: Trained, name: str, usage: str, library: str, tags: list[str]) -> Any:
    """Return a model card with what the run's own records say, as far as they say it."""
    nets = Counter(folder.arch for folder in chosen.folders.values())
    archs = ", ".join(f"`{arch}`" + f" x {n}" * (n > 1) for arch, n in nets.items())
    config = chosen.run.get("config")
    dataset = config.get("dataset") if isinstance(config, dict) else None
    dataset = without_place(dataset) if isinstance(dataset, str) else None
    together = name == ENSEMBLE
    metrics = (
        chosen.results.get("ensemble") if together else chosen.measured.get(name, {}).get("test")
    )
    known = isinstance(metrics, dict) and {"top1", "n"} <= metrics.keys()
    steps = chosen.results.get("steps")
    what = f"An ensemble of {len(chosen.folders)} networks, {archs}" if together else f"A {archs}"
    where = f", trained on `{dataset}`" if dataset else ""
    return model_card(
        name,
        f"{what}{where}, for {len(chosen.classes)} classes and images of {chosen.image_size} x "
        f"{chosen.image_size} pixels.",
        usage,
        metrics=metrics if known else None,
        dataset=dataset,
        steps=steps if isinstance(steps, int) else None,
        library=library,
        tags=tags,
    )
