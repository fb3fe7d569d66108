"""``learn``: your own networks and images, with the steps of a run."""

import copy
import itertools
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

import dml_accel
from dml_accel import Config, EvaluationRecord, StepRecord, UsageError, learn
from dml_accel.data.batches import labelled_rows
from dml_accel.data.splits import Split
from dml_accel.data.sources import Source
from dml_accel.models.optim import make_optimizer
from dml_accel.mutual import reference
from tests.helpers import Training

ROWS, CLASSES = 24, 3


def net(width: int, inputs: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 3))


def features(rows: int = ROWS, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generate = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 2, 5, generator=generate, dtype=torch.float64)
    return images, torch.randint(0, CLASSES, (rows,), generator=generate)


def settings(**changes: object) -> Config:
    given = {"batch_size": 8, "lr": 0.05, "epochs": 2, "cpu": True, "float64": True}
    return Config(**(given | changes))


def steps(records: list) -> list[StepRecord]:
    return [record for record in records if isinstance(record, StepRecord)]


@pytest.mark.parametrize("target", ["peers", "mean-logit"])
def test_the_steps_are_the_references(target: str) -> None:
    nets = {"small": net(4).double(), "large": net(9).double()}
    twins = [copy.deepcopy(nets[name]) for name in sorted(nets)]
    config = settings(target=target, temperature=2.0)
    optimizers = [make_optimizer(twin, config.optim) for twin in twins]
    images, labels = features()
    order = []

    class Watched(nn.Module):
        """Remembers which images it was shown in training."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                order.append([int((images == one).all((1, 2)).nonzero()) for one in x])
            return self.inner(x)

    watched = {"small": Watched(nets["small"]), "large": nets["large"]}
    records = learn(watched, (images, labels), features(5, seed=2), config)
    order.clear()  # what it was shown before the first step, to see whether it can learn
    records = list(records)
    assert [record.epoch for record in steps(records)] == [0, 0, 0, 1, 1, 1]
    # Every image once an epoch, in another order the second time.
    first, second = (list(itertools.chain(*order[at : at + 3])) for at in (0, 3))
    assert sorted(first) == sorted(second) == list(range(ROWS)) and first != second
    for record, rows in zip(steps(records), order, strict=True):
        expected = reference.step(
            twins, optimizers, [(images[rows], labels[rows])], target=target, temperature=2.0
        )
        assert record.losses_KP[:, 0].tolist() == pytest.approx(expected, rel=1e-9)
    for name, twin in zip(sorted(nets), twins, strict=True):
        for mine, right in zip(nets[name].parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-12)


def test_the_last_record_has_the_accuracies_of_the_networks() -> None:
    nets = {"a": net(4), "b": net(9)}
    images, labels = features(40, seed=2)
    records = list(learn(nets, features(), (images, labels), settings(val_fraction=0.25)))
    last = records[-1]
    assert isinstance(last, EvaluationRecord) and last.val and last.val["ensemble"]["n"] == 6
    with torch.no_grad():
        logits = {name: module(images) for name, module in nets.items()}
    for name, found in logits.items():
        assert last.test["peers"][name]["top1"] == (found.argmax(1) == labels).sum().item() / 40
    mean = sum(found.softmax(1) for found in logits.values()) / 2
    assert last.test["ensemble"]["top1"] == (mean.argmax(1) == labels).sum().item() / 40


def test_uint8_images_are_augmented_as_in_a_run(
    training: Callable[..., Training], digits: Source
) -> None:
    # The networks and images of a run, given to both: the same augmented batches, step by step.
    fast = training(images=64, cohort=("resnet8*2",), lr_step=100)
    nets = {peer.name: copy.deepcopy(peer.module) for peer in fast.peers}
    train = (digits.train.images[:64], digits.train.labels[:64])
    test = (digits.test.images[:8], digits.test.labels[:8])
    config = settings(augment="crop", epochs=1, max_steps=3)
    found = steps(list(learn(nets, train, test, config)))
    for record, expected in zip(found, fast.take(3), strict=True):
        assert torch.equal(record.losses_KP, expected)
    for peer in fast.peers:
        assert torch.equal(nets[peer.name].fc.weight, peer.module.fc.weight)


def test_images_whose_labels_are_not_used_do_not_matter_without_kl() -> None:
    images, labels = features()
    config = settings(labelled_fraction=0.5, kl_weight=0.0, epochs=1)
    used = labelled_rows(Split(images, labels), 0.5, config.seed)
    assert used is not None and len(used) == 12
    other = images + 1
    other[used] = images[used]
    nets = [net(4)]
    nets += [copy.deepcopy(nets[0]), copy.deepcopy(nets[0])]
    for module, shown, share in zip(nets, (images, other, other), (0.5, 0.5, 1.0), strict=True):
        given = config.changed(labelled_fraction=share)
        list(learn({"a": module}, (shown, labels), features(5), given))
    assert torch.equal(nets[0][1].weight, nets[1][1].weight)
    assert not torch.equal(nets[0][1].weight, nets[2][1].weight)


def test_what_does_not_fit_is_refused_at_once() -> None:
    good = {"a": net(4), "b": net(9)}
    data, test = features(), features(5)
    pictures = torch.zeros(ROWS, 8, 8, 3, dtype=torch.uint8)
    twins = {"a": good["a"], "b": copy.deepcopy(good["a"])}
    for modules, train, report, changes, message in (
        ({}, data, test, {}, "modules is empty"),
        (list(good.values()), data, test, {}, "modules is a list; it must map names to networks"),
        (twins, data, test, {}, "a and b start with the same weights"),
        (good, data, (test[0][:, :1], test[1]), {}, r"test has images \[5, 1, 5\] of"),
        (good, (data[0], data[1][:3]), test, {}, r"images \[24, 2, 5\] and labels \[3\]"),
        (good, (data[0], data[1].float()), test, {}, "each image needs a label of torch.int64"),
        (good, (data[0], data[1] - 1), test, {}, "train has labels from -1 to 1; .* 3 classes"),
        (good, data, (test[0], test[1] + 1), {}, "test has labels from 1 to 3"),
        (good, (pictures[..., :1], data[1]), test, {}, r"give uint8 images \[N, H, H, 3\], or"),
        (
            good,
            (pictures, data[1]),
            (pictures, data[1]),
            {},
            r"a cannot take images \[1, 3, 8, 8\]",
        ),
        (good | {"c": nn.Flatten()}, data, test, {}, "c has no parameters to train"),
        (good | {"c": nn.Linear(5, 3)}, data, test, {}, r"must return logits \[1, classes\]"),
        (good, data, test, {"augment": "crop"}, "floating images are used as they are"),
        (good, data, test, {"batch_size": 25}, "--batch-size 25 is more than the 24"),
        (good, data, test, {"output_dir": "x"}, "learn writes no files"),
        (good, data, test, {"log_with": ("tensorboard",)}, "learn writes no files"),
        (good, data, test, {"placement": "split"}, "every network in every process"),
    ):
        with pytest.raises(UsageError, match=message):
            learn(modules, train, report, settings(**changes))


def test_importing_the_package_imports_no_more_than_its_networks() -> None:
    script = (
        "import sys, dml_accel\n"
        "assert 'accelerate' not in sys.modules and 'dml_accel.training.learn' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'lern'"):
        _ = dml_accel.lern
