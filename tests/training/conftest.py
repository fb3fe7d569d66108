"""A run that nothing interrupts, and one that was killed."""

import shutil
from pathlib import Path

import pytest

from dml_accel.training import loop
from tests.helpers import saved_steps
from tests.training.interrupting import CHOOSING, killed, train


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    assert train(folder) == 0
    return folder


@pytest.fixture(scope="session")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps averages and best weights, and stops early."""
    folder = tmp_path_factory.mktemp("chosen")
    assert train(folder, *CHOOSING) == 0
    return folder


@pytest.fixture(scope="session")
def killed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its ninth step, with checkpoints of the third and sixth."""
    folder = tmp_path_factory.mktemp("killed")
    killed(folder, loop, "train_step", 9)
    assert saved_steps(folder) == [3, 6]
    return folder


@pytest.fixture
def interrupted(killed_once: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return shutil.copytree(killed_once, tmp_path, dirs_exist_ok=True)
