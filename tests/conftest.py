"""Shared fixtures: caches that leave nothing behind, real images, small runs."""

import dataclasses
import functools
import gc
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import jinja2
import pytest
import torch

from benchmarks.measuring import device
from dml_accel.analysis.methods import METHODS
from dml_accel.api import methods
from dml_accel.core import versions
from dml_accel.core.lessons import DIVERGENCES, TARGETS
from dml_accel.data import sources
from dml_accel.mutual.divergences import MAKERS
from dml_accel.mutual.losses import forget_lessons
from dml_accel.mutual.targets import OWN_TARGETS
from tests.helpers import Training, free_port, tiny_config

if device().type == "cpu":  # also where there is a GPU, and in the processes that tests start
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


# Files that take minutes come first: a worker that begins one at the end leaves the others idle.
# One worker runs all those that start several processes, because processes that wait for each other
# are slowed down most by other processes.
TOGETHER = (
    "test_children.py",
    "test_interruptions.py",
    "test_launchers.py",
    "test_two_hosts.py",
    "test_processes.py",
)
LONG = (*TOGETHER, "test_compile.py")


def pytest_configure(config: pytest.Config) -> None:
    # Else pytest-xdist gives out files by how many tests they have, and long ones have few.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_finish() -> None:
    # Each run ends with a garbage collection, a third of a second over all that is imported here.
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """With ``--dist loadfile``, some files are as one."""
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "together" if Path(file).name in TOGETHER else file

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Give a test the same random numbers whatever ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def private_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep decoded images and the hub's cache out of the user's home, offline."""
    home = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DML_CACHE", str(home / "images"))
        patch.setenv("HF_HOME", str(home / "hf"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("PET_MASTER_PORT", str(free_port()))  # for launchers that tests start
        # Both libraries read these variables when they are imported, which is before this line.
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        if find_spec("datasets"):
            patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
            patch.setattr("datasets.config.HF_DATASETS_CACHE", home / "datasets")
        yield


@pytest.fixture(autouse=True, scope="session")
def read_once() -> Iterator[None]:
    """Read once what hundreds of runs read, which is a third of the time of a small one.

    These are the digits, the versions of packages, and the template of the cards of peers.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_digits", functools.cache(sources._digits))
        patch.setattr(versions, "version", functools.cache(versions.version))
        patch.setattr(jinja2, "Template", functools.cache(jinja2.Template))
        yield


@pytest.fixture(scope="session")
def real_images() -> Path:
    """The folder of real CIFAR-100 images that DML_TEST_DATA names."""
    folder = os.environ.get("DML_TEST_DATA")
    if not folder:
        pytest.skip("DML_TEST_DATA does not name a folder of CIFAR-100 images")
    return Path(folder)


@pytest.fixture(scope="session")
def digits() -> sources.Source:
    """The digits at 16 x 16."""
    return sources.read(tiny_config().data)


@pytest.fixture
def registry() -> Iterator[None]:
    """Forget at the end what a test has registered."""
    names: tuple[dict[str, Any], ...] = (DIVERGENCES, MAKERS, TARGETS, OWN_TARGETS)
    tables = (*names, METHODS, methods._IMPLIED)
    before = [dict(one) for one in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)
    forget_lessons()


@pytest.fixture
def training(digits: sources.Source) -> Callable[..., Training]:
    """Build a small run from changes to ``tiny_config`` and, if given, few training images."""

    def build(images: int | None = None, **changes: object) -> Training:
        train = digits.train.select(torch.arange(images or len(digits.train)))
        return Training(tiny_config(**changes), dataclasses.replace(digits, train=train))

    return build
