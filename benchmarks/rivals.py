"""What others do: the PyPI package pytorch-dml, loops that people write, timm's training step.

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
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from timm.data import create_loader
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
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
    """Images as torchvision's CIFAR-100 gives them: a PIL image each, then its transforms.

    Attributes:
        transform: of each image; timm's loader puts its own there.
    """

    def __init__(self, pixels: np.ndarray, labels: list[int]) -> None:
        self._pixels, self._labels = pixels, labels
        self.transform: Callable[[Image.Image], Any] = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(_MEAN, _STD),
            ]
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self._pixels[row])), self._labels[row]


def _loader(images: str | None, processes: int = 1) -> tuple[DataLoader, int]:
    """Return the loader that everybody writes, of one of some processes, and the classes."""
    source = read(configuration(images, {}))
    dataset = _Images(source.train.images.numpy(), source.train.labels.tolist())
    batch, workers = BATCH // processes, _WORKERS // processes
    loader = DataLoader(dataset, batch, shuffle=True, num_workers=workers, drop_last=True)
    return loader, len(source.classes)


def _in_memory(images: str | None, channels_last: bool) -> tuple[Callable[[], Batches], int]:
    """Return epochs of our own batches in memory, a share for each process, and the classes."""
    _, placement, found = prepared(images, {})
    layout = torch.channels_last if channels_last else torch.contiguous_format
    share = BATCH // placement.processes.world_size
    first = share * placement.processes.rank

    def epoch() -> Batches:
        for step in itertools.count():
            x, y = found.train.batch(step, BATCH, first, first + share)
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


def _epochs(
    images: str | None, tuned: bool, channels_last: bool = False, **_: Any
) -> tuple[Callable[[], Batches], int]:
    """Return epochs of what a loop reads, as everybody writes it or tuned, and the classes."""
    if tuned:
        return _in_memory(images, channels_last)
    loader, classes = _loader(images)
    return lambda: iter(loader), classes


def pytorch_dml(images: str | None, *, tuned: bool = False, **fast: Any) -> Steps:
    """pytorch-dml's trainer with a pair of its own ResNet-32, which costs 0.4% more than ours.

    Args:
        images: the folder.
        tuned: batches in memory and a fused optimizer, instead of what its README shows.
        fast: of its networks, as ``made_fast`` takes them.
    """
    from pydml import DMLConfig, DMLTrainer
    from pydml.models.cifar import resnet32

    epoch, classes = _epochs(images, tuned, **fast)
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


def plain_loop(images: str | None, *, tuned: bool = False, **fast: Any) -> Steps:
    """The loop of public ports: every pair's KL, transforms for each image, .item() each step.

    Args:
        images: the folder.
        tuned: batches in memory, a fused optimizer, and no number read back; in several processes
            DDP, each with its part of every batch.
        fast: of the networks, as ``made_fast`` takes them.
    """
    epoch, classes = _epochs(images, tuned, **fast)
    nets = [made_fast(net.to(device()), **fast) for net in _pair(classes)]
    if dist.is_initialized():
        nets = [DistributedDataParallel(net) for net in nets]
    return _mutual(nets, _optimizers(nets, fused=tuned or None), _Part(epoch), reads=not tuned)


def accelerated_loop(images: str | None) -> Steps:
    """The same loop as Accelerate's examples have it, in several processes: all is prepared."""
    accelerator = Accelerator(cpu=device().type == "cpu")
    loader, classes = _loader(images, accelerator.num_processes)
    nets = _pair(classes)
    count, *prepared_ = len(nets), *accelerator.prepare(*nets, *_optimizers(nets), loader)
    nets, optimizers, loader = prepared_[:count], prepared_[count:-1], prepared_[-1]
    batches = _Part(lambda: iter(loader))
    return _mutual(nets, optimizers, batches, reads=True, backward=accelerator.backward)


def _pair(classes: int) -> list[nn.Module]:
    return list(networks(configuration(None, {}), classes).values())


def _optimizers(nets: list[nn.Module], **options: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(net.parameters(), **_SGD, nesterov=True, **options) for net in nets]


def _mutual(
    nets: list[nn.Module],
    optimizers: list[torch.optim.Optimizer],
    batches: _Part,
    reads: bool,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> Steps:
    """Return steps in which all networks learn from labels and from each other.

    Args:
        nets: the networks.
        optimizers: of each.
        batches: of this process.
        reads: whether every loss is read back in every step.
        backward: takes a loss.
    """

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
                backward(loss)
                optimizers[i].step()
                if reads:
                    running[i] += loss.item()

    return steps


def timm_step(
    images: str | None, *, channels_last: bool = False, bf16: bool = False, ready: bool = False
) -> Steps:
    """One network, by the step of timm's train.py with its optimizer, loss and autocast.

    Args:
        images: the folder.
        channels_last: timm's flag.
        bf16: its ``--amp --amp-dtype bfloat16``.
        ready: whether every step gets the same batch; otherwise those of timm's own loader.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    batches, classes = _ready_batches(images) if ready else _timm_batches(images)
    config = configuration(None, {"cohort": ["resnet32"]})
    (net,) = networks(config, classes).values()
    net = net.to(device(), memory_format=layout)
    optimizer = create_optimizer_v2(net, "sgd", **_SGD)
    loss_of = nn.CrossEntropyLoss().to(device())

    def steps(count: int) -> None:
        net.train()
        for x, y in itertools.islice(batches, count):
            x, y = x.to(device()), y.to(device())
            if channels_last:
                x = x.contiguous(memory_format=layout)
            with torch.autocast(device().type, torch.bfloat16, enabled=bf16):
                loss = loss_of(net(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps


def _ready_batches(images: str | None) -> tuple[Batches, int]:
    # timm's step lays them out itself; in channels last, other networks would compute in it, too.
    _, _, found = prepared(images, {"memory_format": "contiguous"})
    return itertools.repeat(found.train.batch(0, BATCH, 0, BATCH)), len(found.classes)


def _timm_batches(images: str | None) -> tuple[Batches, int]:
    """Return the batches of timm's loader without end, and the classes."""
    source = read(configuration(images, {}))
    dataset = _Images(source.train.images.numpy(), source.train.labels.tolist())
    loader = create_loader(
        dataset,
        (3, 32, 32),
        BATCH,
        is_training=True,
        color_jitter=None,
        mean=_MEAN,
        std=_STD,
        num_workers=_WORKERS,
        pin_memory=False,
        device=device(),
    )
    return itertools.chain.from_iterable(itertools.repeat(loader)), len(source.classes)
