"""A fixture that writes folders of parquet files."""

from pathlib import Path

import datasets
import pytest

from tests.data.folders import Write


@pytest.fixture
def parquet(tmp_path: Path) -> Write:
    """Write a folder of parquet files in the hub's schema; return its path."""

    def write(**splits: datasets.Dataset) -> str:
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        for name, content in splits.items():
            content.to_parquet(folder / f"{name}-00000-of-00001.parquet")
        return str(folder)

    return write
