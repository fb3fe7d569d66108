"""What the splits of a run are called."""

import pytest

from dml_accel.data.selection import split_names
from tests.helpers import tiny_config


@pytest.mark.parametrize(
    ("changes", "found", "names"),
    [
        ({}, None, ("train", None, "test")),
        ({"test_split": "val"}, None, ("train", None, "val")),
        ({"test_split": "val", "val_fraction": 0.1}, None, ("train", "val (0.1 of train)", "val")),
        ({"train_split": "a", "val_split": "b"}, "b", ("a", "b", "test")),
        ({}, "validation", ("train", "validation", "test")),  # that --val-split auto has found
        ({"test_fraction": 0.25}, None, ("train", None, "test (0.25 of the images)")),
    ],
    ids=str,
)
def test_splits_have_the_names_that_they_were_given(
    changes: dict, found: str | None, names: tuple[str | None, ...]
) -> None:
    assert split_names(tiny_config(dataset="x", **changes).data, found) == names
