"""Finished runs that the tests of reports share."""

from pathlib import Path

import pytest

from dml_accel import cli
from tests.helpers import DIGITS, train

STEPS = "--max-steps 6 --eval-every 2".split()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two methods over two seeds, and a single network alone."""
    folder = tmp_path_factory.mktemp("report")
    pair = ["--cohort", "resnet8*2", "--seeds", "2", "--output-dir", str(folder / "pair")]
    assert cli.main(["compare", *DIGITS, *STEPS, *pair]) == 0
    assert train(folder / "alone", *DIGITS, *STEPS, "--cohort", "resnet8") == 0
    return folder
