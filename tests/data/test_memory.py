"""Memory that images may use."""

from pathlib import Path

import psutil
import pytest

from dml_accel.core.errors import UsageError
from dml_accel.data import memory
from tests.data.folders import SIZE, png, read

PLACES = ("train/a/0.png", "train/b/0.png", "test/a/0.png", "test/b/0.png")


def test_images_that_do_not_fit_into_memory_are_refused_before_any_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in PLACES:
        (tmp_path / "set" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / place).write_bytes(png(1))
    needed = 4 * SIZE * SIZE * 7
    monkeypatch.setattr(memory, "_memory_left", lambda: needed)
    read(str(tmp_path / "set"))
    monkeypatch.setattr(memory, "_memory_left", lambda: needed - 1)
    with pytest.raises(UsageError, match="4 images of 16 x 16 pixels need 0.0 GiB of memory, and"):
        read(str(tmp_path / "set"))


def test_the_memory_that_is_left_respects_a_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (
        ("max", "1000000"),
        ("current", "900000"),
        ("stat", "anon 5\ninactive_file 200000\n"),
    ):
        (tmp_path / name).write_text(text)
    group = tuple(str(tmp_path / name) for name in ("max", "current", "stat"))
    monkeypatch.setattr(memory, "_GROUPS", (group,))
    assert memory._memory_left() == 300_000  # what files use is given up
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert memory._memory_left() == 100_000
    assert memory.machine_memory() == 333_333  # whatever is used of it


def test_a_machine_without_a_limit_has_what_the_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "max").write_text("max\n")  # as the system writes no limit
    monkeypatch.setattr(memory, "_GROUPS", ((str(tmp_path / "max"), "", ""),))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    total = psutil.virtual_memory().total
    assert memory.machine_memory() == total
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.machine_memory() == total // 2
