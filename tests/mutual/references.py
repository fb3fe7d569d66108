"""What tests against the slow reference share: networks to train with it, and the comparison."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dml_accel.core.config import Config
from dml_accel.mutual import reference
from dml_accel.mutual.links import read_links
from dml_accel.mutual.losses import mutual_loss
from tests.helpers import Training

Build = Callable[..., Training]
PAIR = ("resnet8", "wrn_16_2")
TRIO = ("resnet8*2", "wrn_16_2")

# ---------------------------------------------------------------- the term beside the cross-entropy

K, B, C = 3, 3, 5  # of the fixtures ``logits`` and ``labels``
Terms = Callable[..., Tensor]


def fast(logits: Tensor, labels: Tensor, **method: Any) -> Tensor:
    """The term of every peer on every row, [K, B]."""
    return mutual_loss(logits, labels, **method).kl


def slow(logits: Tensor, labels: Tensor, **method: Any) -> Tensor:
    """The same by the reference, row by row."""
    found = [
        reference.loss(k, list(logits[:, [row]]), labels[[row]], ce_weight=0.0, **method)
        for k in range(len(logits))
        for row in range(len(labels))
    ]
    return torch.stack(found).view(len(logits), -1)


both = pytest.mark.parametrize("terms", [fast, slow])


def gradient(terms: Terms, logits: Tensor, *words: Any, **method: Any) -> Tensor:
    """The gradient of the sum of all terms, [K, B, C]."""
    z = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(terms(z, *words, **method).sum(), z)
    return found


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether two values or gradients are not those of one loss."""
    return bool((one - other).abs().max() > 1e-3)


# ---------------------------------------------------------------- whole steps


def nets_in_turn(training: Training) -> list[torch.nn.Module]:
    """Copies of the networks, in the order of the command line."""
    modules = {peer.name: peer.module for peer in training.peers}
    return [copy.deepcopy(modules[name]) for name in training.cohort.teaching.turns]


def assert_as_reference(
    fast: Training, nets: list[torch.nn.Module], found: torch.Tensor, expected: list[float]
) -> None:
    """Every peer's loss and state equal those of the reference, which trained ``nets``."""
    by_name = dict(zip(fast.cohort.teaching.turns, zip(nets, expected, strict=True), strict=True))
    assert found[:, 0].tolist() == pytest.approx(
        [by_name[name][1] for name in sorted(by_name)], rel=1e-9
    )
    for peer in fast.peers:
        state, right = peer.module.state_dict(), by_name[peer.name][0].state_dict()
        for name, value in right.items():
            torch.testing.assert_close(state[name], value, rtol=1e-7, atol=1e-9)


def batch_of(
    training: Training, index: int, lo: int, hi: int, class_weights: list[float] | None = None
) -> reference.Batch:
    """Rows of a batch as the reference takes them: mixed and smoothed labels are posteriors."""
    data, images = training.config.data, training.data.train
    size = training.config.optim.batch_size
    x, labels = images.batch(index, size, lo, hi)
    mixed = images.mixed(index, size, lo, hi)
    if mixed is None and not data.label_smoothing:
        return x, labels
    partners, share = mixed or (labels, 1.0)
    classes = len(training.data.classes)
    return x, reference.soft_labels(
        labels, classes, partners, share, data.label_smoothing, class_weights
    )


def loss_options(config: Config) -> dict[str, object]:
    """The loss's arguments that a configuration sets, but for links and the sum of several KLs."""
    method = config.method
    names = ("kl_weight", "ce_weight", "temperature", "target", "divergence", "standardize", "gate")
    return {name: getattr(method, name) for name in names} | {
        "divergence_args": method.facts.values(method.divergence_args),
        "kl_on_labelled": method.kl_images == "labelled",
    }


def link_rows(training: Training) -> list[list[float]] | None:
    """The links as the reference wants them: in the order of the command line, frozen last."""
    turns = training.cohort.teaching.turns
    frozen = [teacher.name for teacher in training.cohort.teachers]
    weights = read_links(training.config.method.links, turns, frozen)
    if weights is None:
        return None
    return [[weights[k].get(teacher, 0.0) for teacher in [*turns, *frozen]] for k in turns]
