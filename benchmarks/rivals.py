"""What others measure: the PyPI package pytorch-dml, and the loop of public ports of the method.

pytorch-dml (import name ``pydml``) is the nearest package. It is measured twice: as its README
uses it, and as fast as its trainer can be made from outside. Its trainer takes any loader, network
and optimizer, so that this is batches augmented in memory (our own, 10 us an image instead of
hundreds), networks in channels_last, a fused optimizer, and networks compiled and in bf16; its own
helper for mixed precision calls a method that its trainer does not have. What its trainer does
itself stays: the loss of all pairs, and numbers read back in every step.
"""

import itertools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.measuring import BATCH, device, networks
from benchmarks.workloads import Steps, configuration, made_fast, prepared, read

_WORKERS = 2
_MEAN, _STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # pytorch-dml's
_SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
Batches = Iterator[tuple[Tensor, Tensor]]


def has_pytorch_dml() -> bool:
    """Whether the package is installed."""
    return find_spec("pydml") is not None


class _Images(Dataset):
    """Images as torchvision's CIFAR-100 gives them: a PIL image each, then its transforms."""

    def __init__(self, pixels: np.ndarray, labels: list[int]) -> None:
        self._pixels, self._labels = pixels, labels
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(_MEAN, _STD),
            ]
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._pixels[row])), self._labels[row]


def _per_image(images: str | None) -> tuple[Callable[[], Batches], int]:
    """Return epochs of the loader that everybody writes, and the classes."""
    source = read(configuration(images, {}))
    dataset = _Images(source.train.images.numpy(), source.train.labels.tolist())
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=_WORKERS, drop_last=True)
    return lambda: iter(loader), len(source.classes)


def _in_memory(images: str | None, channels_last: bool) -> tuple[Callable[[], Batches], int]:
    """Return epochs of our own batches in memory, and the classes."""
    _, _, found = prepared(images, {})
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def epoch() -> Batches:
        for step in itertools.count():
            x, y = found.train.batch(step, BATCH, 0, BATCH)
            yield x.contiguous(memory_format=layout), y

    return epoch, len(found.classes)


class _Part:
    """The next batches of an endless stream: a block's work, as a loader of that length.

    An epoch continues from block to block, so that no block pays for the start of workers.
    """

    def __init__(self, epoch: Callable[[], Batches]) -> None:
        self._epoch, self._batches, self._count = epoch, epoch(), 0

    def of(self, count: int) -> "_Part":
        """Return this with another length."""
        self._count = count
        return self

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Batches:
        for _ in range(self._count):
            batch = next(self._batches, None)
            if batch is None:
                self._batches = self._epoch()
                batch = next(self._batches)
            yield batch


def pytorch_dml(images: str | None, *, tuned: bool = False, **fast: Any) -> Steps:
    """pytorch-dml's trainer with a pair of its own ResNet-32, which costs 0.4% more than ours.

    Args:
        images: the folder.
        tuned: batches in memory and a fused optimizer, instead of what its README shows.
        fast: of its networks, as ``made_fast`` takes them.
    """
    from pydml import DMLConfig, DMLTrainer
    from pydml.models.cifar import resnet32

    epoch, classes = (
        _in_memory(images, fast.get("channels_last", False)) if tuned else _per_image(images)
    )
    nets = [made_fast(resnet32(num_classes=classes).to(device()), **fast) for _ in range(2)]
    optimizers = [torch.optim.SGD(net.parameters(), **_SGD, fused=tuned or None) for net in nets]
    trainer = DMLTrainer(
        nets, config=DMLConfig(temperature=3.0), device=str(device()), optimizers=optimizers
    )
    if fast.get("compiled"):
        # Its trainer keeps the graph of all backward passes but the last, which compiled ones
        # refuse unless they may not reuse its memory.
        torch._functorch.config.donated_buffer = False
    batches = _Part(epoch)
    return lambda count: trainer.fit(batches.of(count), epochs=1, verbose=False)


def plain_loop(images: str | None) -> Steps:
    """The loop of public ports: every pair's KL, transforms for each image, .item() each step."""
    epoch, classes = _per_image(images)
    config, batches = configuration(images, {}), _Part(epoch)
    nets = [net.to(device()) for net in networks(config, classes).values()]
    optimizers = [torch.optim.SGD(net.parameters(), **_SGD, nesterov=True) for net in nets]

    def steps(count: int) -> None:
        running = [0.0] * len(nets)
        for x, y in batches.of(count):
            x, y = x.to(device()), y.to(device())
            outputs = [net(x) for net in nets]
            for i, output in enumerate(outputs):
                kl = sum(
                    F.kl_div(
                        F.log_softmax(output, 1),
                        F.softmax(other.detach(), 1),
                        reduction="batchmean",
                    )
                    for j, other in enumerate(outputs)
                    if j != i
                )
                loss = F.cross_entropy(output, y) + kl / (len(nets) - 1)
                optimizers[i].zero_grad()
                loss.backward()
                optimizers[i].step()
                running[i] += loss.item()

    return steps
