"""What the paper examines in trained networks: flat minima, entropy, calibration, diversity.

The numbers of a run are kept in its folder, in analysis.json. Every draw is keyed, so the same run
gives the same numbers again.

Shape letters: N images, S pixels per side, C classes.
"""

import copy
import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dml_accel.analysis.runs import Run
from dml_accel.core.config import DataConfig
from dml_accel.core.errors import UsageError
from dml_accel.core.files import read_json, write_json
from dml_accel.core.rng import generator
from dml_accel.data import sources
from dml_accel.data.batches import ImageSet
from dml_accel.models.peer_folder import load_network, read_peer
from dml_accel.mutual.metrics import ECE_BINS, calibration_bin, finite
from dml_accel.training.setup import prepare_images

FILE = "analysis.json"
NOISE = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05)  # standard deviations
_FORMAT = 1
_BATCH_SIZE = 256
_DRAWS = 3  # of the noise at each standard deviation
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)

LabelledImages = tuple[Tensor, Tensor]  # images [N, 3, S, S], normalised, and labels [N]


def analyse(run: Run, images: int) -> dict[str, Any]:
    """Return the analysis of a run, from its folder if that holds one of as many images.

    Args:
        run: a finished run that has the weights of all peers.
        images: how many training and test images to use at most.

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
    folders = {name: read_peer(folder) for name, folder in run.peer_folders.items()}
    weights = {name: folder.sha256 for name, folder in folders.items()}
    try:
        saved = read_json(path)
        is_same = (saved["format"], saved["sha256"]) == (_FORMAT, weights)
        if is_same and saved["at_most"] >= images:  # more images are as good
            return saved
    except (UsageError, KeyError, TypeError):
        pass  # there is none, or it is of something else: it is computed again
    nets = {name: load_network(folder) for name, folder in folders.items()}
    made_from = {"format": _FORMAT, "at_most": images, "sha256": weights}
    analysis = made_from | _analyse(nets, run, images)
    write_json(path, analysis)
    return analysis


def _analyse(nets: dict[str, nn.Module], run: Run, images: int) -> dict[str, Any]:
    data, seed = run.config.data, run.config.seed
    source = _read_images(_all_labelled(data))
    images_then = run.description.get("data")
    if images_then and source.fingerprint:
        difference = source.fingerprint.difference(images_then)
    else:
        difference = ""
    if difference:
        raise UsageError(
            f"{run.folder} was trained on other images than --dataset {data.dataset} has now: "
            f"{difference}"
        )
    prepared = prepare_images(run.config, source, torch.device("cpu"))
    recorded = run.description["images"]["train"]
    if len(prepared.train) != recorded:
        raise UsageError(
            f"{run.folder} was trained on {recorded} images, but --dataset {data.dataset} now has "
            f"{len(prepared.train)}"
        )
    train, test = (_take(split, images) for split in (prepared.train, prepared.test))
    logits = {name: _logits(net, test[0]) for name, net in nets.items()}
    return {
        "images": {"train": len(train[1]), "test": len(test[1])},
        "peers": {
            name: {
                "noise": [_with_noise(net, (seed, name), sigma, train, test) for sigma in NOISE],
                "entropy": _entropy(logits[name]),
                "calibration": _calibration(logits[name], test[1]),
            }
            for name, net in nets.items()
        },
        "disagreement": {
            a: {b: _disagreement(logits[a], logits[b]) for b in logits} for a in logits
        },
    }


# ---------------------------------------------------------------- images


def _all_labelled(data: DataConfig) -> DataConfig:
    """Return only what the images of a data set depend on, which runs of a comparison share."""
    # How images are resized may follow from how they are augmented.
    return dataclasses.replace(data, augment=None, eval_resize=data.resize, labelled_fraction=1.0)


@functools.lru_cache(maxsize=1)  # for the next run of the comparison
def _read_images(data: DataConfig) -> sources.Source:
    return sources.read(data, quiet=True)


def _take(images: ImageSet, most: int) -> LabelledImages:
    """Return images that are spread evenly over a split, not augmented, and have labels."""
    count = min(most, len(images))
    x, y = images.at(torch.arange(count) * len(images) // count)
    return x[y >= 0], y[y >= 0]


@torch.no_grad()
def _logits(net: nn.Module, x: Tensor) -> Tensor:
    """Return logits [N, C] in double precision."""
    dtype = next(net.parameters()).dtype
    return torch.cat([net(part.to(dtype)) for part in x.split(_BATCH_SIZE)]).double()


# ---------------------------------------------------------------- numbers


def _with_noise(
    net: nn.Module,
    key: tuple[int, str],
    sigma: float,
    train: LabelledImages,
    test: LabelledImages,
) -> dict[str, Any]:
    """Return mean losses and accuracy of a network whose weights have Gaussian noise.

    The running statistics stay as they are.
    """
    rows = []
    for draw in range(_DRAWS if sigma else 1):
        noisy = copy.deepcopy(net)
        generate = generator("weight noise", *key, sigma, draw)
        with torch.no_grad():
            for weight in noisy.parameters():
                noise = torch.randn(weight.shape, generator=generate, dtype=weight.dtype)
                weight.add_(noise, alpha=sigma)
        train_logits, test_logits = _logits(noisy, train[0]), _logits(noisy, test[0])
        rows.append(
            [
                F.cross_entropy(train_logits, train[1]),
                F.cross_entropy(test_logits, test[1]),
                (test_logits.argmax(-1) == test[1]).double().mean(),
            ]
        )
    means = [finite(value) for value in torch.tensor(rows, dtype=torch.float64).mean(0).tolist()]
    names = ("train_loss", "test_loss", "test_top1")
    return {"sigma": sigma, **dict(zip(names, means, strict=True))}


def _entropy(logits_NC: Tensor) -> dict[str, float | None]:
    log_p = F.log_softmax(logits_NC, -1)
    entropy_N = -(log_p.exp() * log_p).sum(-1)
    values = torch.quantile(entropy_N, torch.tensor(_QUANTILES, dtype=torch.float64)).tolist()
    quantiles = {
        f"q{round(100 * quantile)}": finite(value)
        for quantile, value in zip(_QUANTILES, values, strict=True)
    }
    return {"mean": finite(entropy_N.mean().item()), **quantiles}


def _calibration(logits_NC: Tensor, labels_N: Tensor) -> list[dict[str, float]]:
    """Return mean confidence, accuracy and share of the images of each bin that is not empty."""
    confidence, predicted = F.softmax(logits_NC, -1).max(-1)
    hit = (predicted == labels_N).double()
    bins = calibration_bin(confidence)
    rows = []
    for place in range(ECE_BINS):
        inside = bins == place
        if inside.any():
            rows.append(
                {
                    "bin": place,
                    "confidence": confidence[inside].mean().item(),
                    "accuracy": hit[inside].mean().item(),
                    "share": inside.double().mean().item(),
                }
            )
    return rows


def _disagreement(a: Tensor, b: Tensor) -> float:
    """Return the share of images that two networks classify differently."""
    return (a.argmax(-1) != b.argmax(-1)).double().mean().item()
