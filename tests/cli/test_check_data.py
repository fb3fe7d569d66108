"""The commands that look at data: check-data and cache."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dml_accel import cli
from dml_accel.cli import check_data
from dml_accel.core.locks import Lock
from dml_accel.data import checking, kept
from tests.data.folders import read


def draw(path: Path, value: int, size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Class folders with a large and a small class, several formats, and copies."""
    folder = tmp_path / "photos"
    for number in range(5):
        draw(folder / f"train/cat/{number}.png", number, (20 + number, 16))
    draw(folder / "train/dog/0.jpg", 10, (8, 32))
    draw(folder / "train/dog/1.png", 0, (20, 16))  # as train/cat/0.png
    draw(folder / "test/cat/0.png", 1, (21, 16))  # as train/cat/1.png
    draw(folder / "test/dog/0.png", 99)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DML_CACHE", str(tmp_path / "cache"))
    return folder


def checked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = cli.main(["check-data", *words])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 2])
def test_a_good_data_set_is_described(
    photos: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = checked(capsys, "--dataset", str(photos), "--workers", str(workers))
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0 and lines[-1] == "every image can be read"
    assert "train train 6 PNG RGB, 1 JPEG RGB 7 0 8-21-24 16-16-32" in lines
    assert "test test 2 PNG RGB 2 0 20-21-21 16-16-16" in lines
    dog, cat = lines.index("dog 2 1"), lines.index("cat 5 1")
    assert dog < cat  # the smallest class first
    assert "1 images of train are copies of others of train, byte for byte" in lines
    assert "1 of 2 images of test are copies of images of train, byte for byte" in lines
    assert not Path("bad-images.txt").exists()


def test_every_unreadable_image_is_listed_with_its_reason(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [photos / f"train/cat/{n}.png" for n in range(3, 12)] + [photos / "test/dog/0.png"]
    for path in bad:
        path.write_bytes(b"no image")
    code, out = checked(capsys, "--dataset", str(photos), "--workers", "2")
    assert code == 2 and "10 images cannot be read:" in out
    assert out.count("cannot identify image file") == 5 and "\n  ...\n" in out
    listed = [line.split("\t") for line in Path("bad-images.txt").read_text().splitlines()]
    assert {path for path, _ in listed} == {str(path) for path in bad}
    assert {reason for _, reason in listed} == {"cannot identify image file"}
    assert not list(photos.parent.glob("cache/*.safetensors"))
    code, _ = checked(capsys, "--dataset", str(photos), "--to", "other.txt")
    assert code == 2 and len(Path("other.txt").read_text().splitlines()) == len(bad)
    for path in bad:
        draw(path, 7)
    code, out = checked(capsys, "--dataset", str(photos))
    assert code == 0 and out.endswith("can be read\nbad-images.txt is of an earlier check\n")


def test_splits_and_fractions_are_those_of_training(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "test").rename(photos / "holdout")
    code, out = checked(capsys, "--dataset", str(photos), "--test-split", "holdout")
    assert code == 0 and "holdout" in out
    code, out = checked(capsys, "--dataset", str(photos / "train"), "--test-fraction", "0.4")
    counts = [line.split() for line in out.splitlines()]
    found = {row[0]: sum(map(int, row[1:])) for row in counts if row[:1] in (["cat"], ["dog"])}
    assert code == 0 and found == {"cat": 5, "dog": 2}


def test_what_cannot_be_checked_is_one_line(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        (["--dataset", "digits"], "--dataset digits is part of scikit-learn"),
        (["--dataset", str(photos), "--to", "no/such/file"], "--to no/such/file"),
        (["--dataset", str(photos), "--workers", "-1"], "--workers is -1; it must be at least 0"),
        (["--dataset", str(photos / "none")], "this folder does not exist"),
    ):
        assert cli.main(["check-data", *words]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1


def test_an_interruption_ends_it_soon(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    (photos / "train/cat/0.png").write_bytes(b"no image")
    monkeypatch.setattr(checking.Progress, "add", stop)
    assert cli.main(["check-data", "--dataset", str(photos), "--workers", "2"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(Path(check_data._BAD_IMAGES).read_text().splitlines()) == 1  # what was found


def test_an_image_takes_sixteen_bytes() -> None:
    assert checking._SEEN.itemsize == 16
    seen = np.zeros(3, checking._SEEN)
    seen["content"] = (7, 0, 0)  # two have no content, which are no copies of each other
    assert checking.Checked(seen).copies_within() == 0
    assert checking.Checked(seen).sides() == []


# ---------------------------------------------------------------- cache


def cache(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["cache", *words]) == 0
    return capsys.readouterr().out


def test_the_cache_is_shown_and_pruned(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = photos.parent / "cache"
    assert "no images are kept" in cache(capsys)
    read(str(photos))
    (folder / "costs.json").write_text("{}")
    capsys.readouterr()
    out = cache(capsys)
    rows = [line.split() for line in out.splitlines()]
    assert [row[1:5] for row in rows if row and row[0] == str(photos)] in (
        [["train", "complete", "7", "16"], ["test", "complete", "2", "16"]],
        [["test", "complete", "2", "16"], ["train", "complete", "7", "16"]],
    )
    assert "MB of 50,000.0 MB (DML_CACHE_LIMIT)" in out
    assert "removed 0 of 2 sets" in cache(capsys, "--prune")
    assert "removed 2 of 2 sets" in cache(capsys, "--prune", "--limit", "100")
    assert [path.name for path in folder.iterdir()] == ["costs.json"]


def test_everything_is_removed_but_what_is_in_use(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = photos.parent / "cache"
    read(str(photos))
    (folder / "costs.json").write_text("{}")
    used, _ = sorted(folder.glob("*.safetensors"))
    with kept.open_lock(used.with_suffix(".lock"), wait=False) as state:
        assert state is Lock.OURS
        out = cache(capsys, "--prune", "--all")
    assert "removed 1 of 2 sets" in out and "used by other processes" in out
    left = {used.with_suffix(ending) for ending in (".safetensors", ".json", ".lock")}
    assert set(folder.iterdir()) == left
    cache(capsys, "--prune", "--all")
    assert not list(folder.iterdir())
