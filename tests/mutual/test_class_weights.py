"""Class weights in every update schedule, step by step against the slow reference."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from dml_accel.data.batches import slices
from dml_accel.data.sources import Source
from dml_accel.data.splits import Split
from dml_accel.models.optim import make_optimizer
from dml_accel.mutual import reference
from tests.helpers import Training, assert_same_state, tiny_config
from tests.mutual.references import (
    assert_as_reference,
    batch_of,
    loss_options,
    nets_in_turn,
)

STEPS = {
    "simultaneous": reference.step,
    "sequential": reference.sequential_step,
    "official": reference.official_step,
}


@pytest.fixture
def unbalanced(digits: Source) -> Source:
    """Digits with other labels: of ten classes, six have images, 40% one of them."""
    few = digits.train.select(torch.arange(200))
    return dataclasses.replace(digits, train=Split(few.images, few.labels**2 // 16))


def training(source: Source, **changes: object) -> Training:
    settings = {"cohort": ("resnet8*2",), "class_weights": "balanced"}
    return Training(tiny_config(**(settings | changes)), source)


def weights_of(source: Source, fast: Training) -> list[float]:
    """The weights of the labels that the run may use, by scikit-learn."""
    labels = fast.data.train.rows(0, len(fast.data.train))[1].numpy()
    present = np.unique(labels[labels >= 0])
    found = compute_class_weight("balanced", classes=present, y=labels[labels >= 0])
    by_class = dict(zip(present.tolist(), found.tolist(), strict=True))
    return [by_class.get(label, 0.0) for label in range(len(source.classes))]


@pytest.mark.parametrize(
    ("update", "changes"),
    [
        ("simultaneous", {"low_memory": True, "train_limit": 80}),
        ("simultaneous", {"grad_accum": 2, "mixup": 1.0, "label_smoothing": 0.1}),
        ("simultaneous", {"labelled_fraction": 0.5, "val_fraction": 0.2}),
        ("sequential", {"labelled_fraction": 0.5}),
        ("official", {"cutmix": 1.0, "label_smoothing": 0.1}),
    ],
    ids=str,
)
def test_every_schedule_equals_the_reference(
    unbalanced: Source, update: str, changes: dict
) -> None:
    fast = training(unbalanced, update=update, **changes)
    weights, optim = weights_of(unbalanced, fast), fast.config.optim
    assert weights.count(0) == 4 and max(weights) > 3 * weights[0] > 0
    nets = nets_in_turn(fast)
    optimizers = [make_optimizer(net, optim) for net in nets]
    (found,) = fast.take(1)
    if update == "official":
        batch = [batch_of(fast, turn, 0, 8, weights) for turn in range(len(nets))]
    else:
        parts = slices(8, optim.grad_accum)
        batch = [batch_of(fast, 0, lo, hi, weights) for lo, hi in parts]
    options = loss_options(fast.config) | {"class_weights": weights}
    given = batch[0] if update == "sequential" else batch
    expected = STEPS[update](nets, optimizers, given, **options)
    assert_as_reference(fast, nets, found, expected)


def test_equal_classes_have_equal_weights(digits: Source) -> None:
    # Ten images of each class: every weight is 1, and x 1 changes no bit.
    rows = [(digits.train.labels == label).nonzero()[:10, 0] for label in range(10)]
    source = dataclasses.replace(digits, train=digits.train.select(torch.cat(rows)))
    weighted, plain = training(source), training(source, class_weights="none")
    assert plain.cohort.class_weights is None
    assert weighted.cohort.class_weights.tolist() == [1] * 10
    for one in (weighted, plain):
        one.take(1)
    for name, state in plain.states().items():
        assert_same_state(weighted.states()[name], state)
