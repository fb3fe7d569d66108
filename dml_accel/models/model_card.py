"""Model cards: README.md of a trained network, with the metadata that the hub reads."""

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from dml_accel.core.config import Config
from dml_accel.core.files import as_utf8
from dml_accel.core.host import is_on_hub
from dml_accel.core.recipes import in_words
from dml_accel.data.pixels import Geometry
from dml_accel.models.build import parameter_count
from dml_accel.models.hub import TAG
from dml_accel.models.spec import PeerSpec, registered_by

_TEMPLATE = Path(__file__).parent / "templates" / "card.md.j2"
# What the hub's index calls the metrics, and what they are in the words of a card.
_METRICS = {
    "top1": ("accuracy", "Top-1 accuracy"),
    "top5": ("accuracy", "Top-5 accuracy"),
    "nll": ("nll", "Negative log-likelihood in nats"),
    "ece": ("ece", "Expected calibration error"),
}
# Flags that a card shows if they are not the defaults, and those that it shows always. Those that
# name files are left out, because paths are private.
_SECTIONS = ("data", "optim", "method", "numerics")
_ALWAYS = ("epochs", "batch_size", "optimizer", "lr", "seed")
_NAME_FILES = {"dataset", "frozen_peers", "links"}


def public_name(dataset: str) -> str:
    """Return the name of a data set as a card shows it, without its local path, which is private.

    Bytes of a folder's name that are not UTF-8 become escapes, as in every text.
    """
    folder = Path(dataset).expanduser()
    # Links are not resolved: the link's own name is the one that its owner chose.
    name = Path(os.path.abspath(folder)).name if folder.is_dir() else dataset
    return as_utf8(name)


def peer_card(
    module: nn.Module,
    spec: PeerSpec,
    metrics: dict[str, Any],
    dataset: str,
    steps: int,
    teachers: list[str],
    distilled: bool,
    geometry: Geometry,
    note: str = "",
    split: str = "test",
    training: str = "",
) -> ModelCard:
    """Return the card of a trained peer; see ``peer_folder.write_peer``."""
    dataset = public_name(dataset)
    how = "from the labels alone"
    if teachers and distilled:
        how = f"by distillation from {', '.join(teachers)}, which were not updated"
    elif teachers:
        how = f"together with {', '.join(teachers)} by Deep Mutual Learning (CVPR 2018)"
    how += "" if spec.start is None else ", starting from trained weights"
    return model_card(
        spec.name,
        f"A `{spec.arch}` with {parameter_count(module):,} parameters, trained on "
        f"`{dataset}`\n{how}.{f' {note}' if note else ''}",
        metrics=metrics,
        dataset=dataset,
        steps=steps,
        geometry=geometry,
        archs=[spec.arch],
        tags=["deep-mutual-learning"] if teachers else [],
        split=split,
        training=training,
    )


def training_text(
    config: Mapping[str, Any],
    peers: Sequence[str],
    versions: Mapping[str, Any],
    commit: str | None,
) -> str:
    """Return how a network was trained, in the words of a card, without local paths.

    Args:
        config: of the run, flat, as its config.json holds it.
        peers: names of all peers of the run.
        versions: of packages, by name.
        commit: of the code; None if unknown.
    """
    usual = Config()
    shown = [name for one in _SECTIONS for name in usual.sections[one].names()]
    defaults = usual.as_dict()
    flags = {
        name: config[name]
        for name in ("seed", *shown)
        if name in config
        and name not in _NAME_FILES
        and (name in _ALWAYS or config[name] != defaults[name])
        and config[name] not in (None, False, [])
    }
    links, frozen = str(config.get("links", "full")), config.get("frozen_peers") or ()
    if links != "full":
        flags["links"] = "FILE" if os.sep in links or links.endswith(".csv") else links
    if frozen:
        flags["frozen_peers"] = [one if is_on_hub(str(one)) else "FOLDER" for one in frozen]
    used = [f"{name} {versions[name]}" for name in ("torch", "timm") if versions.get(name)]
    ours = versions.get("dml-accel")
    code = f"dml_accel{f' {ours}' if ours else ''}{f', commit {commit}' if commit else ''}"
    return (
        f"The run trained {', '.join(f'`{name}`' for name in peers)} with `{in_words(flags)}` "
        f"(flags of `dml-accel train`; those that are not named have their defaults), by {code}, "
        f"with {', '.join(used) or 'unknown versions'}."
    )


def own_networks(archs: Iterable[str]) -> dict[str, str]:
    """Return the networks that timm alone does not know, and the modules that register them."""
    found = {arch: registered_by(arch) for arch in archs}
    return {
        arch: Path(sys.argv[0]).stem if module == "__main__" else module
        for arch, module in found.items()
        if module
    }


def model_card(
    name: str,
    text: str,
    *,
    metrics: Mapping[str, Any] | None,
    dataset: str | None,
    steps: int | None,
    geometry: Geometry,
    usage: str = "timm",
    peers: Sequence[str] = (),
    archs: Sequence[str] = (),
    tags: Sequence[str] = (),
    split: str = "test",
    training: str = "",
) -> ModelCard:
    """Return a model card with the metadata that the hub reads; it names no licence.

    Args:
        name: of the model.
        text: what the model is.
        metrics: on the test split; None if unknown.
        dataset: it was trained on; None if unknown.
        steps: optimizer steps taken; None if unknown.
        geometry: how images become its inputs.
        usage: which code uses it: ``timm``, ``ensemble`` or ``onnx``.
        peers: folders of the networks of an ensemble.
        archs: timm's names of the networks; the card says which of them timm alone does not know.
        tags: besides the task and the library.
        split: what the test split is called.
        training: how it was trained; see ``training_text``.
    """
    library, task = "onnx" if usage == "onnx" else "timm", "image-classification"
    results = None
    if metrics and dataset:
        results = [
            EvalResult(task, dataset, dataset, kind, value, metric_name=words, dataset_split=split)
            for name, (kind, words) in _METRICS.items()
            if isinstance(value := metrics.get(name), float) and math.isfinite(value)
        ]
    card_data = ModelCardData(
        library_name=library,
        pipeline_tag=task,
        tags=[task, library, TAG, *tags],
        datasets=[dataset] if dataset and "/" in dataset else None,
        model_name=name,
        eval_results=results,
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(_TEMPLATE),
        name=name,
        text=text,
        metrics=metrics if dataset else None,
        split=split,
        training=training,
        steps=steps,
        geometry=geometry,
        usage=usage,
        peers=list(peers),
        own=own_networks(archs),
    )
