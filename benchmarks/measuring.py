"""What the benchmarks share: clocks, ratios with intervals, cohorts, and the machine."""

import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.core.versions import commit, versions
from dml_accel.data.batches import ImageSet, Normalisation, PixelSet
from dml_accel.data.images import Data
from dml_accel.data.splits import Split
from dml_accel.distributed.device import device_versions
from dml_accel.distributed.placement import Placement
from dml_accel.models.spec import parse_cohort
from dml_accel.mutual.step import Cohort
from dml_accel.training.setup import Modules, build_networks, make_cohort

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


def device() -> torch.device:
    """Return where benchmarks and tests compute: what DML_TEST_DEVICE names, the CPU by default.

    Raises:
        UsageError: it names something else than ``cpu``, or than ``cuda`` where torch has a GPU.
    """
    name = os.environ.get("DML_TEST_DEVICE", "cpu")
    if name not in ("cpu", "cuda"):
        raise UsageError(f"DML_TEST_DEVICE is {name}; it must be cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("DML_TEST_DEVICE is cuda, but torch finds no GPU; unset it")
    return torch.device(name)


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that ``work`` takes, the GPU's part included."""
    synchronise()
    start = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    """Wait for the GPU, if this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


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
    from dml_accel.analysis.statistics import summarise  # scipy is not installed everywhere

    logs = [math.log(value / other) for value, other in zip(values, base, strict=True)]
    found = summarise(logs)
    assert found.mean is not None, "there is at least one block"
    ends = [None if end is None else math.exp(end) for end in (found.low, found.high)]
    return Ratio(math.exp(found.mean), *ends)


def noise(images: int = IMAGES) -> Split:
    """Return images of noise, as many as CIFAR-100 has: gathering pixels costs the same."""
    pixels = torch.randint(0, 256, (images, 32, 32, 3), dtype=torch.uint8)
    return Split(pixels, torch.randint(0, 100, (images,)))


def image_set(split: Split | None = None) -> ImageSet:
    """Return training images in the memory of the device (default: noise)."""
    split = split or noise()
    return PixelSet(
        split,
        Normalisation.of(split.images[:100]),
        augment=("crop-flip",),
        seed=0,
        device=device(),
        dtype=torch.float32,
    )


def noise_data() -> Data:
    """Return the splits of a run on noise with 100 classes."""
    train = image_set()
    classes = tuple(map(str, range(100)))
    return Data(train, None, image_set(noise(100)), classes, Normalisation.identity())


def networks(config: Config, classes: int = 100) -> Modules:
    """Build the networks of a configuration."""
    return build_networks(config, parse_cohort(config.cohort), classes)


def build_cohort(config: Config, placement: Placement, images: Data) -> Cohort:
    """Build the cohort that a run of this configuration trains in this process."""
    specs = parse_cohort(config.cohort)
    to_compile = [spec.name for spec in specs] if config.compute.compile == "on" else []
    modules = networks(config, len(images.classes))
    return make_cohort(config, specs, modules, images, placement, to_compile=to_compile)


def processor() -> str:
    """Return the name of the processor, if the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


def surroundings() -> dict[str, Any]:
    """Return what a result file says about the machine and versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "versions": versions() | device_versions(device()),
        "commit": commit(),
    }
