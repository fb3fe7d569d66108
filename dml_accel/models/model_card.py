"""Model cards: README.md of a trained network, with the metadata that the hub reads."""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from dml_accel.core.files import as_utf8
from dml_accel.data.pixels import Geometry
from dml_accel.models.build import parameter_count
from dml_accel.models.spec import PeerSpec, registered_by

_TEMPLATE = Path(__file__).parent / "templates" / "card.md.j2"


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
) -> ModelCard:
    """Return a model card with the metadata that the hub reads.

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
    """
    library, task = "onnx" if usage == "onnx" else "timm", "image-classification"
    results = None
    if metrics and dataset:
        results = [EvalResult(task, dataset, dataset, "accuracy", metrics["top1"])]
    card_data = ModelCardData(
        library_name=library,
        pipeline_tag=task,
        tags=[task, library, *tags],
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
        steps=steps,
        geometry=geometry,
        usage=usage,
        peers=list(peers),
        own=own_networks(archs),
    )
