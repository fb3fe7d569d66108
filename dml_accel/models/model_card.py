"""One folder per trained peer, which timm loads as it stands: ``local-dir:<folder>``."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors.torch import save_file

from dml_accel.core.files import write_json
from dml_accel.data.batches import Normalisation
from dml_accel.models.build import parameter_count
from dml_accel.models.spec import Peer


def write_peer(
    folder: Path,
    peer: Peer,
    metrics: dict[str, Any],
    *,
    classes: tuple[str, ...],
    normalisation: Normalisation,
    image_size: int,
    dataset: str,
    steps: int,
    taught_by: list[str],
    distilled: bool = False,
) -> None:
    """Write model.safetensors, config.json and README.md of one peer into ``folder``.

    Args:
        folder: made where missing.
        peer: the trained peer.
        metrics: its metrics on the test split, for the model card.
        classes: names of the classes, in label order.
        normalisation: what its inputs are normalised with.
        image_size: pixels a side of its inputs.
        dataset: what it was trained on.
        steps: optimizer steps it took.
        taught_by: names of the peers that it learned from; none where it learned alone.
        distilled: whether none of those learned with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Cloned, because the format refuses tensors that share memory (tied weights).
    tensors = {
        n: t.detach().cpu().contiguous().clone() for n, t in peer.module.state_dict().items()
    }
    temporary = folder / ".model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / "model.safetensors")
    dataset = without_place(dataset)
    config = timm_config(peer, classes, normalisation, image_size)
    write_json(folder / "config.json", config)
    _card(peer, metrics, dataset, steps, taught_by, distilled).save(folder / "README.md")


def without_place(dataset: str) -> str:
    """Return how a data set is called elsewhere: where a folder lies is nobody else's business."""
    folder = Path(dataset).expanduser()
    # Not resolved: a link is named for what it is to be called.
    return Path(os.path.abspath(folder)).name if folder.is_dir() else dataset


def timm_config(
    peer: Peer, classes: tuple[str, ...], normalisation: Normalisation, image_size: int
) -> dict[str, Any]:
    """Return timm's config.json: how to build the network and how to prepare its input."""
    known: Any = peer.module.pretrained_cfg
    heads = {name: known[name] for name in ("first_conv", "classifier") if known.get(name)}
    return {
        "architecture": peer.spec.arch,
        "num_classes": len(classes),
        "num_features": getattr(peer.module, "num_features", None),
        "model_args": peer.spec.arguments,
        "label_names": list(classes),
        "pretrained_cfg": {
            "num_classes": len(classes),
            "input_size": [3, image_size, image_size],
            "fixed_input_size": bool(known.get("fixed_input_size")),
            "pool_size": None,
            "mean": list(normalisation.mean),
            "std": list(normalisation.std),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            **heads,
        },
    }


def _card(
    peer: Peer,
    metrics: dict[str, Any],
    dataset: str,
    steps: int,
    taught_by: list[str],
    distilled: bool,
) -> ModelCard:
    how = "from the labels alone"
    if taught_by and distilled:
        how = f"by distillation from {', '.join(taught_by)}, which did not learn meanwhile"
    elif taught_by:
        how = f"together with {', '.join(taught_by)} by Deep Mutual Learning (CVPR 2018)"
    how += "" if peer.spec.start is None else ", starting from trained weights"
    return model_card(
        peer.name,
        f"A `{peer.spec.arch}` with {parameter_count(peer.module):,} parameters, trained on "
        f"`{dataset}`\n{how}.",
        TIMM_USAGE,
        metrics=metrics,
        dataset=dataset,
        steps=steps,
        library="timm",
        tags=["timm", *["deep-mutual-learning"] * bool(taught_by)],
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
        text: what it is.
        usage: how it is used.
        metrics: on the test split; None where they are not known.
        dataset: what it was trained on; None where that is not known.
        steps: optimizer steps it took; None where that is not known.
        library: that loads it.
        tags: beside that of its task.
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
