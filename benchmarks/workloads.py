"""What one process measures: our training, its networks alone, its losses, matrix products.

Each function prepares something and returns it as a function of a number of steps; benchmarks/
rivals.py has those of others.

Shape letters: K peers, B rows of a batch, C classes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring import BATCH, build_cohort, device
from dml_accel.core.config import Config
from dml_accel.core.host import keep_memory
from dml_accel.data import sources
from dml_accel.data.batches import ImageSet
from dml_accel.data.images import Data
from dml_accel.data.sources import Source
from dml_accel.data.splits import Split
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.plan import allocate
from dml_accel.distributed.processes import Processes
from dml_accel.models.spec import parse_cohort
from dml_accel.mutual.links import read_links
from dml_accel.mutual.teaching import Teaching
from dml_accel.training.loop import fit
from dml_accel.training.setup import prepare_images

Steps = Callable[[int], None]
_MADE_IMAGES = 10_000
_SIDE = 2048  # of the matrices
# Neither an evaluation nor a checkpoint falls into a block, and nobody waits in vain for a process
# that waits for its turn.
_UNDISTURBED = {"eval_every": "1000000", "save_every": "1000000", "timeout": 600.0}


def configuration(images: str | None, changes: dict[str, Any]) -> Config:
    """Return a run of a ResNet-32 pair, with changes; ``cohort`` may be a list."""
    settings: dict[str, Any] = {
        "cohort": ["resnet32*2"],
        "dataset": images or "made",
        "image_size": 32,
        "batch_size": BATCH,
        "cpu": device().type == "cpu",
        **_UNDISTURBED,
        **changes,
    }
    return Config(**settings)


def read(config: Config, classes: int | None = None) -> Source:
    """Return the images of ``--images``, or as many of noise.

    Args:
        config: names the folder.
        classes: how many there are said to be, if not those of the images.
    """
    if config.data.dataset == "made":
        made = torch.Generator().manual_seed(0)
        shape = (_MADE_IMAGES, config.data.image_size, config.data.image_size, 3)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=made)
        split = Split(pixels, torch.randint(0, 100, (_MADE_IMAGES,), generator=made))
        source = Source(split, split, tuple(map(str, range(100))))
    else:
        source = sources.read(config.data, quiet=True)
    if classes is None:
        return source
    return dataclasses.replace(source, classes=tuple(map(str, range(classes))))


def _placed(config: Config) -> Placement:
    """Return the placement of equal peers: each in a process of its own if there are several."""
    processes = Processes(config.numerics, config.compute)
    costs = {spec.name: 1.0 for spec in parse_cohort(config.cohort)}
    return Placement(processes, allocate(costs, processes.world_size), config.numerics.batch_norm)


def prepared(
    images: str | None, changes: dict[str, Any], classes: int | None = None
) -> tuple[Config, Placement, Data]:
    """Return what a run works with: configuration, placement and images."""
    config = configuration(images, changes)
    placement = _placed(config)
    return config, placement, prepare_images(config, read(config, classes), placement.device)


class _Ready:
    """A set of images that gives its first batch again and again."""

    def __init__(self, images: ImageSet) -> None:
        self._images, self._batch = images, images.batch(0, BATCH, 0, BATCH)

    def __len__(self) -> int:
        return len(self._images)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._images, name)

    def batch(self, step: int, batch_size: int, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Return the rows of the first batch."""
        images, labels = self._batch
        return images[lo:hi], labels[lo:hi]


def training(
    images: str | None, *, classes: int | None = None, ready: bool = False, **changes: Any
) -> Steps:
    """Our training, whole steps with their input, by the loop that a run goes through.

    Args:
        images: the folder.
        classes: of the networks, if not those of the images.
        ready: whether every step gets the same batch, which is there already.
        changes: of the configuration.
    """
    config, placement, data = prepared(images, changes, classes)
    if ready:
        data = dataclasses.replace(data, train=cast(ImageSet, _Ready(data.train)))
    if not config.compute.return_memory:
        keep_memory()
    records = fit(build_cohort(config, placement, data), data, config.run)

    def steps(count: int) -> None:
        for _ in range(count):
            next(records)

    return steps


class HalfPrecision(nn.Module):
    """A network that computes in bf16 and returns single precision."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, S, S] to logits [B, C]."""
        with torch.autocast(images.device.type, torch.bfloat16):
            logits: Tensor = self.net(images)
        return logits.float()


def made_fast(
    net: nn.Module, channels_last: bool = False, bf16: bool = False, compiled: bool = False
) -> nn.Module:
    """Return a network as torch alone makes it fast; its parameters are the same ones."""
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    net = HalfPrecision(net) if bf16 else net
    if compiled:
        net.compile()  # in place: it stays a module
    return net


def networks_alone(
    images: str | None, *, channels_last: bool = False, bf16: bool = False, compiled: bool = False
) -> Steps:
    """The pair's own forward, cross-entropy, backward and optimizer steps on a ready batch."""
    layout = "channels_last" if channels_last else "contiguous"
    config, placement, data = prepared(images, {"memory_format": layout})
    x, y = data.train.batch(0, BATCH, 0, BATCH)
    peers = build_cohort(config, placement, data).peers
    nets = [made_fast(peer.module, channels_last, bf16, compiled) for peer in peers]

    def steps(count: int) -> None:
        for _ in range(count):
            for peer in peers:
                peer.optimizer.zero_grad()
            losses = [F.cross_entropy(net(x), y) for net in nets]
            for loss in losses:
                loss.backward()
            for peer in peers:
                peer.optimizer.step()

    return steps


def losses_alone(
    images: str | None, *, peers: int, classes: int, flags: dict[str, Any] | None = None
) -> Steps:
    """Targets and losses of K peers on ready logits [K, B, C], forward and backward.

    Args:
        images: nothing is read.
        peers: K.
        classes: C.
        flags: of the method.
    """
    config = configuration(None, {"cohort": [f"resnet8*{peers}"], **(flags or {})})
    placement = _placed(config)
    links = read_links(config.method.links, placement.names, [])
    teaching = Teaching(config.method, placement.names, (), links)
    weight = config.method.kl_weight
    logits = torch.randn(peers, BATCH, classes, requires_grad=True, device=placement.device)
    y = torch.randint(0, classes, (BATCH,), device=placement.device)

    def steps(count: int) -> None:
        for _ in range(count):
            logits.grad = None
            targets = teaching.targets(logits, y, BATCH, placement)
            losses = teaching.losses(logits, y, targets, kl_weight=weight, label_weight=None)
            losses.total.sum().div(BATCH).backward()

    return steps


def matrix_products(images: str | None, *, bf16: bool = False) -> Steps:
    """Products of two square matrices, the machine's rate of arithmetic."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    a, b = (torch.randn(_SIDE, _SIDE, device=device()).to(dtype) for _ in range(2))
    product = torch.empty_like(a)

    def steps(count: int) -> None:
        for _ in range(count):
            torch.mm(a, b, out=product)

    return steps


MACS_OF_A_PRODUCT = _SIDE**3
