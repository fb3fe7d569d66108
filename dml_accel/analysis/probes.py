"""What the paper asks of trained networks: flat minima, entropy, calibration, diversity.

Numbers of one finished run, kept beside it in analysis.json. Every draw is keyed, so that the same
run gives the same numbers.

Shape letters: K peers, N images, C classes.
"""

import copy
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dml_accel.analysis.runs import Run
from dml_accel.core.config import Config, UsageError
from dml_accel.core.files import write_json
from dml_accel.core.rng import generator
from dml_accel.data import batches as data
from dml_accel.data import sources
from dml_accel.data.batches import ImageSet
from dml_accel.models import peer_folder as frozen
from dml_accel.mutual.metrics import ECE_BINS, finite

FILE = "analysis.json"
_FORMAT = 1
_ROWS = 256
NOISE = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05)  # standard deviations
_DRAWS = 3


def analysis(run: Run, images: int) -> dict[str, Any]:
    """Return the analysis of a run, from its folder where it holds the same.

    Args:
        run: a finished run, with the weights of its peers.
        images: how many training and test images to use, at least where there are so many: what
            the folder holds of more images is as good.

    Returns:
        ``images``: how many of each split; ``peers``: {name: {``noise``: [{``sigma``,
        ``train_loss``, ``test_loss``, ``test_top1``}], ``entropy``: quantiles of the posteriors'
        entropy in nats on test images, ``calibration``: [{``bin``, ``confidence``,
        ``accuracy``, ``share``}]}}; ``disagreement``: {name: {name: share of test images}}. Losses
        in nats.

    Raises:
        UsageError: a peer or the images cannot be read.
    """
    path = run.folder / FILE
    for peer in run.description["peers"]:
        if Path(peer["name"]).name != peer["name"]:
            raise UsageError(f"{run.folder / 'config.json'}: {peer['name']!r} is no peer's name")
    folders = {
        peer["name"]: frozen.read(run.folder / "peers" / peer["name"])
        for peer in run.description["peers"]
    }
    made_of = {name: folder.sha256 for name, folder in folders.items()}
    try:
        known = json.loads(path.read_text())
        same = (known["format"], known["sha256"]) == (_FORMAT, made_of)
        if same and known["at_most"] >= images:
            return dict(known)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there yet, or of something else: it is computed
    found = {
        "format": _FORMAT,
        "at_most": images,
        "sha256": made_of,
        **_analyse({name: frozen.build(folder) for name, folder in folders.items()}, run, images),
    }
    write_json(path, found)
    return found


def _analyse(nets: dict[str, nn.Module], run: Run, images: int) -> dict[str, Any]:
    config = run.config
    prepared = data.prepare(_source(_named_images(config)), config, torch.device("cpu"))
    if len(prepared.train) != run.description["images"]["train"]:
        raise UsageError(
            f"{run.folder} was trained on {run.description['images']['train']} images; "
            f"--dataset {config.dataset} has {len(prepared.train)} now"
        )
    train, test = (_some(split, images) for split in (prepared.train, prepared.test))
    logits = {name: _logits(net, test[0]) for name, net in nets.items()}
    return {
        "images": {"train": len(train[1]), "test": len(test[1])},
        "peers": {
            name: {
                "noise": [_noisy(net, name, sigma, train, test, config) for sigma in NOISE],
                "entropy": _entropy(logits[name]),
                "calibration": _calibration(logits[name], test[1]),
            }
            for name, net in nets.items()
        },
        "disagreement": {
            a: {b: _disagreement(logits[a], logits[b]) for b in logits} for a in logits
        },
    }


def _named_images(config: Config) -> Config:
    """Return the configuration with nothing but what names its images."""
    names = ("dataset", "image_column", "label_column", "train_split", "test_split", "image_size")
    return Config(**{name: getattr(config, name) for name in names})


@functools.lru_cache(maxsize=1)  # runs of one comparison share their images
def _source(config: Config) -> sources.Source:
    return sources.read(config, quiet=True)


def _some(images: ImageSet, most: int) -> tuple[Tensor, Tensor]:
    """Return images, not augmented, and labels, spread evenly over a split's stored order."""
    count = min(most, len(images))
    x, y = images.at(torch.arange(count) * len(images) // count)
    return x[y >= 0], y[y >= 0]


@torch.no_grad()
def _logits(net: nn.Module, x: Tensor) -> Tensor:
    dtype = next(net.parameters()).dtype
    return torch.cat([net(part.to(dtype)) for part in x.split(_ROWS)]).double()


def _noisy(
    net: nn.Module,
    name: str,
    sigma: float,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    config: Config,
) -> dict[str, Any]:
    """Measure a network whose weights have Gaussian noise; running statistics stay."""
    rows = []
    for draw in range(_DRAWS if sigma else 1):
        noisy = copy.deepcopy(net)
        generate = generator("weight noise", config.seed, name, sigma, draw)
        with torch.no_grad():
            for weight in noisy.parameters():
                drawn = torch.randn(weight.shape, generator=generate, dtype=weight.dtype)
                weight.add_(drawn, alpha=sigma)
        seen, unseen = _logits(noisy, train[0]), _logits(noisy, test[0])
        rows.append(
            [
                F.cross_entropy(seen, train[1]),
                F.cross_entropy(unseen, test[1]),
                (unseen.argmax(-1) == test[1]).double().mean(),
            ]
        )
    means = [finite(value) for value in torch.tensor(rows, dtype=torch.float64).mean(0).tolist()]
    names = ("train_loss", "test_loss", "test_top1")
    return {"sigma": sigma, **dict(zip(names, means, strict=True))}


def _entropy(logits_NC: Tensor) -> dict[str, float | None]:
    log_p = F.log_softmax(logits_NC, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    marks = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    values = torch.quantile(entropy, marks).tolist()
    named = {
        f"q{round(100 * mark)}": finite(value)
        for mark, value in zip(marks.tolist(), values, strict=True)
    }
    return {"mean": finite(entropy.mean().item()), **named}


def _calibration(logits_NC: Tensor, labels_N: Tensor) -> list[dict[str, float]]:
    """Return confidence, accuracy and share of the images of each bin that has any."""
    confidence, predicted = F.softmax(logits_NC, -1).max(-1)
    hit = (predicted == labels_N).double()
    bins = (confidence * ECE_BINS).ceil().long().sub(1).clamp(0, ECE_BINS - 1)
    found = []
    for place in range(ECE_BINS):
        inside = bins == place
        if inside.any():
            found.append(
                {
                    "bin": place,
                    "confidence": confidence[inside].mean().item(),
                    "accuracy": hit[inside].mean().item(),
                    "share": inside.double().mean().item(),
                }
            )
    return found


def _disagreement(a: Tensor, b: Tensor) -> float:
    return (a.argmax(-1) != b.argmax(-1)).double().mean().item()


def holds_weights(run: Run) -> bool:
    """Whether the folder of a run has the weights of all of its peers."""
    names: Sequence[str] = [peer["name"] for peer in run.description["peers"]]
    return all((run.folder / "peers" / name / "model.safetensors").is_file() for name in names)
