"""What a run stands on: images are recorded, and compared when it is resumed or evaluated."""

import shutil
from pathlib import Path

import datasets
import pytest

from dml_accel import cli
from tests.data.folders import png, split
from tests.helpers import load, train

FLAGS = "--cohort resnet8 --image-size 16 --batch-size 4 --cpu".split()


def photos(root: Path, shift: int = 0) -> Path:
    """Two classes of four images in both splits."""
    for side in ("train", "test"):
        for place, label in enumerate(("cat", "dog")):
            (root / side / label).mkdir(parents=True)
            for number in range(4):
                level = 60 * place + 10 * number + shift + 5 * (side == "test")
                (root / side / label / f"{number}.png").write_bytes(png(level))
    return root


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, ``photos``, and a run of two steps on them, ``run``."""
    root = tmp_path_factory.mktemp("kept")
    photos(root / "photos")
    words = [*FLAGS, "--dataset", str(root / "photos"), "--epochs", "1"]
    assert train(root / "run", *words) == 0
    return root


@pytest.fixture
def run(kept: Path, tmp_path: Path) -> Path:
    shutil.copytree(kept / "photos", tmp_path / "photos")
    shutil.copytree(kept / "run", tmp_path / "run")
    return tmp_path


def resumed(root: Path, dataset: Path | str, *words: str) -> int:
    flags = [*FLAGS, "--dataset", str(dataset), "--resume", "auto", *(words or ("--epochs", "2"))]
    return train(root / "run", *flags)


def test_the_images_are_recorded_with_the_absolute_path(kept: Path) -> None:
    description = load(kept / "run/config.json")
    assert description["config"]["dataset"] == str(kept / "photos")
    data = description["data"]
    assert data["classes"] == ["cat", "dog"]
    assert data["splits"]["train"]["by_class"] == [4, 4]
    (state,) = (kept / "run/checkpoints").glob("*/state.json")
    assert load(state)["data"] == data


def test_equal_images_at_another_place_are_accepted(run: Path) -> None:
    (run / "photos").rename(run / "moved")
    (run / "link").symlink_to(run / "moved")
    assert resumed(run, f"{run}/link/") == 0
    assert load(run / "run/results.json")["steps"] == 4


def rename(root: Path) -> None:
    for side in ("train", "test"):
        (root / side / "cat").rename(root / side / "zebra")


def exchange(root: Path) -> None:
    (root / "train/cat").rename(root / "train/x")
    (root / "train/dog").rename(root / "train/cat")
    (root / "train/x").rename(root / "train/dog")


CHANGES = {
    "a class was renamed": (rename, "the classes were 'cat', now 'zebra'"),
    "classes were exchanged": (exchange, "other images, or another order, in the train split"),
    "an image was moved": (
        lambda root: (root / "train/cat/0.png").rename(root / "train/dog/9.png"),
        "train images by class: cat 4, now 3; dog 4, now 5",
    ),
    "an image was added to the test split": (
        lambda root: (root / "test/cat/9.png").write_bytes(png(77)),
        "the test split had 8 images, now 9",
    ),
    "pixels were changed": (
        lambda root: (root / "test/dog/0.png").write_bytes(png(200)),
        "other images, or another order, in the test split",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changed_images_are_refused_with_the_difference(
    run: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = CHANGES[case]
    change(run / "photos")
    for flags in (("--epochs", "2"), ("--epochs", "1")):  # to resume, and with nothing to do
        assert resumed(run, run / "photos", *flags) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "was started on other images than --dataset" in error and words in error


def test_an_evaluation_is_of_the_images_that_are_named(
    kept: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = ["evaluate", str(run / "run"), "--cpu"]
    assert cli.main(evaluate) == 0
    (folder,) = (run / "run/evaluations").iterdir()
    before = (folder / "evaluation.json").read_bytes()
    # Other images in a folder of the same name, reached by a relative path.
    (run / "else").mkdir()
    photos(run / "else/photos", shift=100)
    monkeypatch.chdir(run / "else")
    capsys.readouterr()
    assert cli.main([*evaluate, "--dataset", "photos"]) == 2
    assert f"{folder} holds the evaluation on other images" in capsys.readouterr().err
    assert (folder / "evaluation.json").read_bytes() == before
    assert cli.main([*evaluate, "--dataset", "photos", "--to", str(run / "to")]) == 0
    assert load(run / "to/evaluation.json")["dataset"] == str(run / "else/photos")
    assert load(run / "to/evaluation.json")["images"] != load(folder / "evaluation.json")["images"]
    # The run's own images are those of its training, or it is said that they are not.
    images = kept / "photos"
    try:
        (images / "test/cat/0.png").write_bytes(png(250))
        assert cli.main(evaluate) == 2
        assert "have changed since" in capsys.readouterr().err
        assert (folder / "evaluation.json").read_bytes() == before
    finally:
        (images / "test/cat/0.png").write_bytes(png(5))


def test_a_test_split_may_lack_classes(tmp_path: Path) -> None:
    for name, kinds in (("train", ["a", "b", "c", "a"]), ("test", ["b", "a"])):
        column = (datasets.Value("string"), kinds)
        images = [png(30 * row + 5) for row in range(len(kinds))]
        table = split([0] * len(kinds), images, kind=column)
        (tmp_path / "set").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / f"set/{name}.parquet")
    words = [*FLAGS, "--label-column", "kind", "--dataset", str(tmp_path / "set")]
    assert train(tmp_path / "run", *words, "--max-steps", "1") == 0
    assert cli.main(["evaluate", str(tmp_path / "run"), "--cpu"]) == 0


def test_evaluation_and_resume_use_the_test_split_that_was_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(12):
            level = 10 * number + 3 * (label == "dog")
            (tmp_path / "photos" / label / f"{number}.png").write_bytes(png(level))
    words = [*FLAGS, "--test-fraction", "0.3", "--dataset", str(tmp_path / "photos")]
    assert train(tmp_path / "run", *words, "--max-steps", "1") == 0
    assert train(tmp_path / "run", *words, "--max-steps", "2", "--resume", "auto") == 0
    assert cli.main(["evaluate", str(tmp_path / "run"), "--cpu"]) == 0
    (record,) = (tmp_path / "run/evaluations").glob("*/evaluation.json")
    data = load(tmp_path / "run/config.json")["data"]["splits"]
    # The same images at another place, of which the run's own settings select the same split.
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert cli.main(["evaluate", str(tmp_path / "run"), "--cpu"]) == 2
    assert "photos, the data set of" in capsys.readouterr().err
    where = ["--dataset", str(tmp_path / "moved"), "--to", str(tmp_path / "to")]
    assert cli.main(["evaluate", str(tmp_path / "run"), "--cpu", *where]) == 0
    assert load(tmp_path / "to/evaluation.json")["images"] == data["test"]
    assert load(record)["images"] == data["test"]
    assert data["train"]["images"] + data["test"]["images"] == 24
