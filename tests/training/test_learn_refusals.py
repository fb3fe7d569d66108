"""What ``learn`` refuses of images, optimizers and schedules of the caller's: one line each."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dml_accel import Config, UsageError, learn

FLAGS: dict[str, Any] = {"epochs": 2, "cpu": True}
IMAGES, LABELS = torch.randn(12, 6), torch.arange(12) % 3
GOOD = TensorDataset(IMAGES, LABELS)


class Second(Dataset[Any]):
    """A data set whose item 5 is something else."""

    def __init__(self, odd: Any) -> None:
        self.odd = odd

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return self.odd if index == 5 else (IMAGES[index], int(LABELS[index]))


def loader(data: Any = GOOD, **options: Any) -> "DataLoader[Any]":
    return DataLoader(data, **{"batch_size": 4} | options)


def generator() -> Iterator[tuple[Tensor, Tensor]]:
    yield IMAGES, LABELS


def foreign(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([*net.parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)


def closing(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(net.parameters())


# Images to train on, further arguments, and what is said.
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a generator": (generator(), {}, "train"),
    "uint8 of a loader": (
        loader(TensorDataset((IMAGES * 9).byte(), LABELS)),
        {},
        "uint8",
    ),
    "another batch size": (loader(), {"batch_size": 8}, "batch_size=8, but the batches of train"),
    "one-hot labels": (loader(TensorDataset(IMAGES, torch.eye(12))), {}, "needs an integer label"),
    "three parts": (loader(TensorDataset(IMAGES, LABELS, LABELS)), {}, "pair (images, labels)"),
    "a class too many, in a batch": (
        loader(TensorDataset(IMAGES, LABELS.clone().index_fill_(0, torch.tensor([5]), 7))),
        {},
        "batch 2 of epoch 1 of train",
    ),
    "a class too many, in a set": (Second((IMAGES[0], 7)), {"batch_size": 4}, "train[5]"),
    "a word for a label": (Second((IMAGES[0], "cat")), {"batch_size": 4}, "train[5] is 'cat'"),
    "another shape, in a set": (Second((IMAGES[0, :3], 1)), {"batch_size": 4}, "train[5]"),
    "augmentation": (GOOD, {"augment": "crop"}, "augment"),
    "mixup of a loader": (loader(), {"mixup": 0.2}, "mixup"),
    "class weights": (GOOD, {"class_weights": "balanced", "batch_size": 4}, "class_weights"),
    "a cohort": (GOOD, {"cohort": "resnet8*2"}, "learn is given networks"),
    "an unknown flag": (GOOD, {"lrr": 1}, "lrr"),
    "a flag twice": (GOOD, {"config": Config(lr=0.2)}, "lr is 0.2 in config and 0.05 as a keyword"),
    "no optimizer": (GOOD, {"optimizer": lambda net: None}, "must return a torch.optim.Optimizer"),
    "a part of the weights": (
        GOOD,
        {"optimizer": lambda net: torch.optim.SGD([net.bias], lr=0.1)},
        "lacks weight",
    ),
    "foreign weights": (GOOD, {"optimizer": foreign}, "has 1 parameters that are not of a"),
    "a closure": (GOOD, {"optimizer": closing}, "LBFGS, whose step needs a closure"),
    "two optimizers": (
        GOOD,
        {"optimizer": lambda net: torch.optim.SGD(net.parameters(), lr=0.1), "momentum": 0.5},
        "momentum",
    ),
    "no rate": (GOOD, {"schedule": lambda step: float("nan")}, "schedule(0) is nan; it must be"),
    "a rate below 0": (GOOD, {"schedule": lambda step: -1.0}, "schedule(0) is -1; it must be"),
    "a schedule that fails": (GOOD, {"schedule": lambda step: [][step]}, "schedule(0) fails"),
    "resume without a folder": (GOOD, {"resume": "auto"}, "--resume auto needs --output-dir"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(case: str) -> None:
    data, flags, text = REFUSED[case]
    usual: dict[str, Any] = {} if isinstance(data, DataLoader) else {"batch_size": 4}
    usual |= {} if "optimizer" in flags else {"lr": 0.05}
    config = flags.pop("config", None) if "config" in (flags := dict(flags)) else None
    nets = {"a": nn.Linear(6, 3), "b": nn.Linear(6, 3)}
    with pytest.raises(UsageError) as refused:
        for _ in learn(nets, data, GOOD, config, **FLAGS | {"workers": 0} | usual | flags):
            pass
    said = str(refused.value)
    assert text in said and "\n" not in said, said


def test_a_run_with_other_networks_or_another_schedule_does_not_resume(tmp_path: Path) -> None:
    def start(width: int = 6, **more: Callable[[int], float]) -> None:
        nets = {"a": nn.Linear(6, 3), "b": nn.Sequential(nn.Linear(6, width), nn.Linear(width, 3))}
        flags = FLAGS | {"lr": 0.05, "batch_size": 4, "output_dir": tmp_path, "resume": "auto"}
        for _ in learn(nets, (IMAGES, LABELS), (IMAGES, LABELS), **flags | more):
            pass

    start()
    with pytest.raises(UsageError, match="weights of b"):
        start(width=5)
    with pytest.raises(UsageError, match="schedule"):
        start(schedule=lambda step: 1.0)
