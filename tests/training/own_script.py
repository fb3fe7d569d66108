"""A user's script: an own module and an own ``Dataset`` with torchvision transforms.

    python -m tests.training.own_script FOLDER [KILL_AT]

Trains with checkpoints in FOLDER; kills itself, hard, after step KILL_AT.
"""

import os
import signal
import sys
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import dml_accel

DATA: Any = load_digits()
FLAGS: dict[str, Any] = {"epochs": 2, "save_every": "3", "eval_every": "1ep", "cpu": True}


class Digits(Dataset[tuple[Tensor, int]]):
    """Images of digits, cut out at random and turned."""

    def __init__(self, rows: range, augment: bool) -> None:
        self.rows = rows
        steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        random = [v2.RandomCrop(8, padding=1), v2.RandomRotation(10)]
        self.transform = v2.Compose([*steps, *(random if augment else [])])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        levels = (DATA.images[row] * 15).astype("uint8")[:, :, None].repeat(3, 2)
        return self.transform(levels), int(DATA.target[row])


class Net(nn.Module):
    """A network with batch norm and dropout, of which resuming must keep both exact."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(36 * width, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def nets() -> dict[str, Net]:
    """The same untrained networks each time."""
    torch.manual_seed(0)
    return {"narrow": Net(2), "wide": Net(4)}


def loader(workers: int = 2) -> "DataLoader[tuple[Tensor, int]]":
    """What is trained on: 5 whole batches of 8, and a partial one."""
    return DataLoader(Digits(range(44), True), batch_size=8, shuffle=True, num_workers=workers)


def train(modules: dict[str, Net], folder: str, kill_at: int = 0, **more: Any) -> list[Any]:
    """Train; return the records."""
    test = DataLoader(Digits(range(100, 130), False), batch_size=16)
    records = []
    for record in dml_accel.learn(
        modules,
        loader(),
        test,
        output_dir=folder,
        resume="auto",
        optimizer=lambda net: torch.optim.RMSprop(net.parameters(), lr=1e-3, momentum=0.5),
        schedule=lambda step: 0.9**step,
        **FLAGS | more,
    ):
        records.append(record)
        if kill_at and record.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    return records


if __name__ == "__main__":
    train(nets(), sys.argv[1], *map(int, sys.argv[2:]))
