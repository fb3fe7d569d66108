"""What the benchmarks share: clocks, ratios with intervals, peers, what a result says."""

import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dml_accel.analysis.intervals import summarise
from dml_accel.core.config import Config
from dml_accel.core.versions import commit, versions
from dml_accel.data import decode as decoding
from dml_accel.data.batches import ImageSet, Normalisation
from dml_accel.distributed.placement import Placement
from dml_accel.models import build as building
from dml_accel.models import spec as cohort
from dml_accel.models.spec import Peer

HERE = Path(__file__).parent
IMAGES = 50_000  # CIFAR-100's training split
BATCH = 64
# glibc returns large blocks to the system at once and faults them in again at the next step;
# with these thresholds it keeps them.
MEMORY_KEPT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Ratio:
    """A geometric mean of ratios with its 95% interval; without one below two blocks."""

    mean: float
    low: float | None = None
    high: float | None = None

    def times(self, factor: float) -> "Ratio":
        """Return it in another unit."""
        low, high = (None if end is None else end * factor for end in (self.low, self.high))
        return Ratio(self.mean * factor, low, high)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"

    def as_change(self) -> str:
        """Return it as a percentage above or below 1."""
        mean, *ends = (
            "" if value is None else f"{100 * (value - 1):+.1f}%"
            for value in (self.mean, self.low, self.high)
        )
        return f"{mean} ({ends[0]} to {ends[1]})" if all(ends) else mean


def ratio(values: Sequence[float], base: Sequence[float]) -> Ratio:
    """Return how many times ``base`` ``values`` are, block by block.

    The interval is Student's t over the logarithms of the blocks' ratios.
    """
    logs = [math.log(value / other) for value, other in zip(values, base, strict=True)]
    found = summarise(logs)
    assert found.mean is not None, "there is at least one block"
    ends = [None if end is None else math.exp(end) for end in (found.low, found.high)]
    return Ratio(math.exp(found.mean), *ends)


def image_set() -> ImageSet:
    """Return as many images as CIFAR-100 has, of noise: gathering pixels costs the same."""
    pixels = torch.randint(0, 256, (IMAGES, 32, 32, 3), dtype=torch.uint8)
    split = decoding.Split(pixels, torch.randint(0, 100, (IMAGES,)))
    return ImageSet(
        split,
        Normalisation.of(pixels[:100]),
        augment="crop-flip",
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def build_peers(config: Config, placement: Placement, classes: int = 100) -> list[Peer]:
    """Build the peers that a run of this configuration trains in this process."""
    peers = []
    for spec in cohort.parse(config.cohort):
        if spec.name in placement.mine:
            module = building.build(spec, config, classes)
            net = placement.prepare(module, spec.name, config.compile == "on")
            optimizer = cohort.optimizer(module, config)
            peers.append(Peer(spec, module, net, optimizer, placement.scaler()))
    return peers


def processor() -> str:
    """Return the processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


def surroundings() -> dict[str, Any]:
    """Return what a result file says of machine and versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "versions": versions(),
        "commit": commit(),
    }
