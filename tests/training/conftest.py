"""A run that nothing interrupts, and one that was killed."""

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


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A run that was killed in its ninth step, with checkpoints of the third and sixth."""
    killed(tmp_path, loop, "train_step", 9)
    assert saved_steps(tmp_path) == [3, 6]
    return tmp_path
