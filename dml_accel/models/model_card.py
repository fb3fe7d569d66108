"""Model cards: README.md of a trained network, with the metadata that the hub reads."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from dml_accel.models.build import parameter_count
from dml_accel.models.spec import PeerSpec


def public_name(dataset: str) -> str:
    """Return the name of a data set without its local path, which is private."""
    folder = Path(dataset).expanduser()
    # Links are not resolved: the link's own name is the one that its owner chose.
    return Path(os.path.abspath(folder)).name if folder.is_dir() else dataset


def peer_card(
    module: nn.Module,
    spec: PeerSpec,
    metrics: dict[str, Any],
    dataset: str,
    steps: int,
    teachers: list[str],
    distilled: bool,
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
        f"`{dataset}`\n{how}.",
        TIMM_USAGE,
        metrics=metrics,
        dataset=dataset,
        steps=steps,
        library="timm",
        tags=["timm", *["deep-mutual-learning"] * bool(teachers)],
    )


TIMM_USAGE = """```python
import timm
import dml_accel  # registers the *_cifar networks with timm

net = timm.create_model("local-dir:path/to/this/folder", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
```"""


def model_card(
    name: str,
    text: str,
    usage: str,
    *,
    metrics: Mapping[str, Any] | None,
    dataset: str | None,
    steps: int | None,
    library: str,
    tags: list[str],
) -> ModelCard:
    """Return a model card with the metadata that the hub reads.

    Args:
        name: of the model.
        text: what the model is.
        usage: code that uses it.
        metrics: on the test split; None if unknown.
        dataset: it was trained on; None if unknown.
        steps: optimizer steps taken; None if unknown.
        library: that loads it.
        tags: in addition to its task.
    """
    results, reached = None, ""
    if metrics and dataset:
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type="accuracy",
                metric_value=metrics["top1"],
            )
        ]
        last = f"after the last of {steps:,} steps" if steps else "at the end"
        reached = (
            f"\nTop-1 accuracy on the test split {last}: {100 * metrics['top1']:.2f}%\n"
            f"({metrics['n']:,} images).\n"
        )
    about = ModelCardData(
        library_name=library,
        pipeline_tag="image-classification",
        tags=["image-classification", *tags],
        model_name=name,
        eval_results=results,
    )
    return ModelCard(f"---\n{about.to_yaml()}\n---\n\n# {name}\n\n{text}\n{reached}\n{usage}\n")
