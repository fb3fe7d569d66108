"""One folder per trained peer, which timm loads as it stands: ``local-dir:<folder>``."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors.torch import save_file

from dml_accel.cohort import Peer, parameter_count
from dml_accel.data import Normalisation
from dml_accel.files import write_json


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
    config = timm_config(peer, classes, normalisation, image_size)
    write_json(folder / "config.json", config)
    _card(peer, metrics, dataset, steps, taught_by, distilled).save(folder / "README.md")


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
    result = EvalResult(
        task_type="image-classification",
        dataset_type=dataset,
        dataset_name=dataset,
        metric_type="accuracy",
        metric_value=metrics["top1"],
    )
    about = ModelCardData(
        library_name="timm",
        tags=["image-classification", "timm", *["deep-mutual-learning"] * bool(taught_by)],
        model_name=peer.name,
        eval_results=[result],
    )
    how = "from the labels alone"
    if taught_by and distilled:
        how = f"by distillation from {', '.join(taught_by)}, which did not learn meanwhile"
    elif taught_by:
        how = f"together with {', '.join(taught_by)} by Deep Mutual Learning (CVPR 2018)"
    how += "" if peer.spec.start is None else ", starting from trained weights"
    text = f"""---
{about.to_yaml()}
---

# {peer.name}

A `{peer.spec.arch}` with {parameter_count(peer.module):,} parameters, trained on `{dataset}`
{how}.

Top-1 accuracy on the test split after the last of {steps:,} steps: {100 * metrics["top1"]:.2f}%
({metrics["n"]:,} images).

```python
import timm
import dml_accel  # registers the *_cifar networks with timm

net = timm.create_model("local-dir:path/to/this/folder", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
```
"""
    return ModelCard(text)
