"""One process of a training of one's own modules: a Dataset and a DataLoader, in double precision.

python tests/forked.py 2 tests/training/learn_apart.py FOLDER
"""

import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import dml_accel

FLAGS: dict[str, Any] = {"epochs": 2, "lr": 0.05, "float64": True, "cpu": True}


class Noisy(Dataset[tuple[Tensor, int]]):
    """Images with noise from the states of torch, numpy and Python."""

    def __init__(self, rows: int) -> None:
        generate = torch.Generator().manual_seed(rows)
        self.images = torch.randn(rows, 3, 4, 4, generator=generate)
        self.labels = torch.randint(0, 3, (rows,), generator=generate)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.rand(3, 4, 4) + np.random.rand() + random.random()
        return self.images[index] + 0.1 * noise, int(self.labels[index])


def train() -> dict[str, Tensor]:
    """Train a pair on each kind of data; return their weights and last metrics."""
    found: dict[str, Tensor] = {}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "set": (Noisy(22), {"batch_size": 7, "workers": 0}),
        "loader": (DataLoader(Noisy(22), batch_size=7, shuffle=True), {}),
    }
    for kind, (data, flags) in kinds.items():
        torch.manual_seed(0)
        nets: dict[str, nn.Module] = {
            "a": nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)
            ),
            "b": nn.Sequential(nn.Flatten(), nn.Linear(48, 3)),
        }
        record = None
        for record in dml_accel.learn(nets, data, Noisy(11), **FLAGS, **flags):  # noqa: B007
            pass
        assert isinstance(record, dml_accel.EvaluationRecord)
        found[f"{kind}.nll"] = torch.tensor(record.test["ensemble"]["nll"])
        for name, net in nets.items():
            state = net.state_dict()
            found |= {f"{kind}.{name}.{key}": value.clone() for key, value in state.items()}
    return found


if __name__ == "__main__":
    save_file(train(), Path(sys.argv[1]) / f"{os.environ['RANK']}.safetensors")
