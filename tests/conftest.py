"""Shared fixtures: small networks, real images, and caches that leave nothing behind."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
import torch

from dml_accel.core.config import Config
from dml_accel.data import batches as data
from dml_accel.data import sources
from dml_accel.data.batches import Data
from dml_accel.distributed.allocation import allocate, everywhere
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.processes import Processes
from dml_accel.models import build as building
from dml_accel.models import peer_folder as frozen
from dml_accel.models import spec as cohort
from dml_accel.models.peer_folder import PeerFolder
from dml_accel.models.spec import Peer
from dml_accel.mutual import links
from dml_accel.mutual.step import Step
from dml_accel.mutual.teaching import Teaching


@pytest.fixture(autouse=True, scope="session")
def private_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep decoded images and the hub's cache out of the user's home, offline."""
    home = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DML_CACHE", str(home / "images"))
        patch.setenv("HF_HOME", str(home / "hf"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
        patch.setenv("PET_MASTER_PORT", str(29510 + int(worker)))  # torchrun's, of each worker
        # Both libraries read these variables when they are imported, which is before this line.
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        yield


@pytest.fixture(scope="session")
def real_images() -> Path:
    """The folder of real CIFAR-100 images that DML_TEST_DATA names."""
    folder = os.environ.get("DML_TEST_DATA")
    if not folder:
        pytest.skip("DML_TEST_DATA names no folder of CIFAR-100 images")
    return Path(folder)


def real_dataset() -> str:
    """What --dataset names: real CIFAR-100 images where there are some, else digits."""
    return os.environ.get("DML_TEST_DATA") or "digits"


def tiny_config(**changes: object) -> Config:
    """A run of seconds on digits, in double precision so that equality means something."""
    settings = {
        "cohort": ("resnet8*2",),
        "dataset": "digits",
        "image_size": 16,
        "batch_size": 8,
        "lr": 0.05,
        "max_steps": 3,
        "cpu": True,
        "float64": True,
    }
    return Config(**(settings | changes))


@pytest.fixture(scope="session")
def digits() -> sources.Source:
    """The digits at 16 x 16."""
    return sources.read(tiny_config())


COSTS = {"resnet8": 1.0, "wrn_16_2": 2.0, "resnet20": 3.0}


class Training:
    """The parts of one run, built as a run builds them, for tests that look inside."""

    def __init__(self, config: Config, source: sources.Source) -> None:
        self.config = config
        processes, specs = Processes(config), cohort.parse(config.cohort)
        ranks = everywhere([spec.name for spec in specs], processes.world_size)
        if config.placement == "split":
            costs = {spec.name: COSTS[spec.name.rpartition("-")[0]] for spec in specs}
            ranks = allocate(costs, processes.world_size)
        self.placement = Placement(config, processes, ranks)
        self.data: Data = data.prepare(source, config, self.placement.device)
        self.peers = [self._peer(spec) for spec in specs if spec.name in self.placement.mine]
        names = [spec.name for spec in specs]
        self.frozen = frozen.prepare(self._folders(config), self.data, config, self.placement)
        known = [one.name for one in self.frozen]
        self.teaching = Teaching(config, names, known, links.read(config.links, names, known))

    def _folders(self, config: Config) -> dict[str, PeerFolder]:
        return frozen.read_all(config.frozen_peers, self.data.classes, config.image_size)

    def step(self, number: int, lr: float) -> Step:
        """What one optimizer step works with."""
        peers = sorted(self.peers, key=lambda peer: peer.name)
        return Step(
            peers,
            self.frozen,
            self.data.train,
            number,
            lr,
            self.config,
            self.placement,
            self.teaching,
        )

    def _peer(self, spec: cohort.PeerSpec) -> Peer:
        module = building.build(spec, self.config, len(self.data.classes))
        net = self.placement.prepare(module, spec.name, self.config.compile == "on")
        optimizer = cohort.optimizer(module, self.config)
        return Peer(spec, module, net, optimizer, self.placement.scaler())

    def states(self) -> dict[str, dict[str, torch.Tensor]]:
        """Parameters, buffers and momentum of every peer, by name."""
        return {
            peer.name: {
                **{name: t.clone() for name, t in peer.module.state_dict().items()},
                **{
                    f"momentum.{index}": state["momentum_buffer"].clone()
                    for index, state in peer.optimizer.state_dict()["state"].items()
                },
            }
            for peer in self.peers
        }


@pytest.fixture
def training(digits: sources.Source) -> Callable[..., Training]:
    """Build a small run from changes to ``tiny_config`` and, if given, few training images."""

    def build(images: int | None = None, **changes: object) -> Training:
        train = digits.train.select(torch.arange(images or len(digits.train)))
        return Training(tiny_config(**changes), dataclasses.replace(digits, train=train))

    return build


def assert_same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Every tensor equal, bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
