"""Data sets: local folders, the hub's protocol, inferred columns, and what is refused."""

import gzip
import re
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from dml_accel.core.errors import UsageError
from dml_accel.data import arrow, sources
from tests.data.folders import CLASSES, SIZE, Write, png, read, split
from tests.helpers import ROOT, free_port, load, run_program, tiny_config, train
from tests.hub import serve_hub

# ---------------------------------------------------------------- what is read


def test_parquet_in_the_hubs_schema(parquet: Write) -> None:
    found = read(parquet(train=split([0, 1, 2, 0]), test=split([2, 1])))
    assert found.classes == tuple(CLASSES)
    assert found.train.labels.tolist() == [0, 1, 2, 0]
    assert found.test.labels.tolist() == [2, 1]
    assert found.train.images.shape == (4, SIZE, SIZE, 3)
    assert found.train.images[2, 3, 4].tolist() == [20, 10, 7]


def test_class_folders_of_images(tmp_path: Path) -> None:
    for name in ("train", "test"):
        for value, label in enumerate(["b", "a"]):
            (tmp_path / name / label).mkdir(parents=True)
            for i in range(2):
                (tmp_path / name / label / f"{i}.png").write_bytes(png(50 * value))
    found = read(str(tmp_path))
    assert found.classes == ("a", "b")
    by_label = {
        label: int(image[0, 0, 0])
        for label, image in zip(found.train.labels.tolist(), found.train.images, strict=True)
    }
    assert by_label == {0: 50, 1: 0}


def test_a_class_without_training_images_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, labels in (("train", "ab"), ("test", "abc")):
        for label in labels:
            (tmp_path / name / label).mkdir(parents=True)
            (tmp_path / name / label / "0.png").write_bytes(png(0))
    assert read(str(tmp_path)).classes == ("a", "b", "c")
    said = capsys.readouterr().err
    assert "warning: 1 of 3 classes have no training images: 'c'" in said


def test_a_changed_image_is_decoded_again(tmp_path: Path) -> None:
    for name in ("train", "test"):
        for label in "ab":
            (tmp_path / name / label).mkdir(parents=True)
            (tmp_path / name / label / "0.png").write_bytes(png(0))
    assert read(str(tmp_path)).train.images.max() == 7
    (tmp_path / "train" / "a" / "0.png").write_bytes(png(200))
    assert read(str(tmp_path)).train.images.max() == 200


def test_digits_are_scikit_learns_and_the_last_360_are_the_test_split() -> None:
    found = sources.read(tiny_config(image_size=32).data)
    assert (len(found.train), len(found.test), len(found.classes)) == (1437, 360, 10)
    assert found.train.images.shape[1:] == (32, 32, 3)
    assert found.train.images.max() == 255
    theirs, small = load_digits(), sources.read(tiny_config(image_size=8).data)
    assert small.classes == tuple(str(name) for name in theirs.target_names)
    assert torch.cat([small.train.labels, small.test.labels]).tolist() == theirs.target.tolist()
    grey = torch.cat([small.train.images, small.test.images])[..., 0].numpy()
    assert np.array_equal(grey, np.rint(theirs.images * 255 / 16))


def test_a_scikit_learn_without_the_digits_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = ModuleSpec("sklearn", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(sources, "find_spec", lambda _: elsewhere)
    with pytest.raises(UsageError, match=r"digits\.csv\.gz does not exist; reinstall"):
        sources._digits_file()


def test_the_real_images_are_read(real_images: Path) -> None:
    found = read(str(real_images), image_size=32)
    assert (len(found.train), len(found.test), len(found.classes)) == (10_000, 5_000, 100)
    first = datasets.load_dataset("parquet", data_dir=str(real_images), split="train")[0]
    assert np.array_equal(np.asarray(first["img"]), found.train.images[0].numpy())
    assert first["fine_label"] == found.train.labels[0]


def test_columns_are_inferred(parquet: Write) -> None:
    # Two class columns: fine_label wins; --label-column says otherwise.
    folder = parquet(train=split([0, 1]), test=split([2, 1]))
    assert read(folder).classes == tuple(CLASSES)
    assert read(folder, label_column="coarse_label").classes == ("pet", "fish")


def test_the_values_of_a_named_integer_or_string_column_become_the_classes(
    parquet: Write,
) -> None:
    whole = (datasets.Value("int32"), [30, 4, 4])
    folder = parquet(
        train=split([0, 1, 2], n=words(["oak", "elm", "oak"]), age=whole),
        test=split([0], n=words(["oak"]), age=(datasets.Value("int32"), [30])),
    )
    assert read(folder).classes == tuple(CLASSES)
    found = read(folder, label_column="n")
    assert found.classes == ("elm", "oak")
    assert found.train.labels.tolist() == [1, 0, 1] and found.test.labels.tolist() == [1]
    found = read(folder, label_column="age")
    assert found.classes == ("4", "30")  # by value, and not by spelling
    assert found.train.labels.tolist() == [1, 0, 0] and found.test.labels.tolist() == [1]
    # The test split's file is the same, but not the place of its class.
    parquet(train=split([0, 1, 2], n=words(["oak", "elm", "ash"]), age=whole))
    assert read(folder, label_column="n").test.labels.tolist() == [2]


# ---------------------------------------------------------------- published data sets


def grey(label: int, row: int) -> np.ndarray:
    """A made-up garment, 28 x 28."""
    return ((np.arange(28)[:, None] * (label + 1) + np.arange(28) * row) % 256).astype(np.uint8)


def fashion(there: Path, rows: int = 40) -> Path:
    """Write files like those of Fashion-MNIST: 40 images, real ones where the package is."""
    real = Path("/usr/share/datasets/fashion-mnist")
    there.mkdir()
    for stem in ("train", "t10k"):
        images = np.stack([grey(row % 10, row) for row in range(rows)])
        labels = (np.arange(rows) % 10).astype(np.uint8)
        parts = {"images-idx3": bytes(16) + images.tobytes(), "labels-idx1": bytes(8)}
        parts["labels-idx1"] += labels.tobytes()
        for kind, content in parts.items():
            name = f"{stem}-{kind}-ubyte.gz"
            if (real / name).exists():
                head = 16 + rows * 784 if kind == "images-idx3" else 8 + rows
                with gzip.open(real / name) as file:
                    content = file.read(head)
            (there / name).write_bytes(gzip.compress(content))
    return there


def cifar10(folder: Path) -> None:
    """Write a set in the schema of the hub's CIFAR-10: img and label."""
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=names))
    for name in ("train", "test"):
        images = [{"bytes": png(6 * row, size=(32, 32)), "path": None} for row in range(40)]
        columns = {"img": images, "label": [row % 10 for row in range(40)]}
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features).to_parquet(
            folder / f"{name}-00000-of-00001.parquet"
        )


def class_folders(folder: Path) -> None:
    """Write photographs of several sizes and forms into folders that name their classes."""
    for name in ("train", "test"):
        for label, place in enumerate(("bee", "ant")):
            (folder / name / place).mkdir(parents=True)
            for row in range(8):
                picture = Image.new("RGB", (30 + row, 40), (90 * label, 20 * row, 50))
                picture.save(folder / name / place / f"{row}.{'jpg' if row % 2 else 'png'}")


@pytest.mark.parametrize(("write", "classes"), [(cifar10, 10), (class_folders, 2)])
def test_a_data_set_is_trained_on_as_it_is_published(
    tmp_path: Path, write: Callable[[Path], None], classes: int
) -> None:
    write(tmp_path / "set")
    words = "--cohort resnet8*2 --batch-size 8 --max-steps 1 --cpu --dataset".split()
    assert train(tmp_path / "run", *words, str(tmp_path / "set")) == 0
    description = load(tmp_path / "run" / "config.json")
    rows = 40 if classes == 10 else 16
    assert (description["classes"], description["images"]["test"]) == (classes, rows)
    peer = load(tmp_path / "run/peers/resnet8-1/config.json")
    assert peer["label_names"][:2] == {10: ["airplane", "automobile"], 2: ["ant", "bee"]}[classes]


def test_the_example_of_the_documentation_converts_fashion_mnist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = fashion(tmp_path / "package")
    page = (ROOT / "docs/training.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", page, re.S) if "fashion" in b]
    monkeypatch.chdir(tmp_path)
    exec(block.replace("/usr/share/datasets/fashion-mnist", str(there)), {})
    found = read("fashion-mnist", image_size=28)
    assert found.classes[0] == "T-shirt" and len(found.classes) == 10
    for stem, part in (("train", found.train), ("t10k", found.test)):
        images = gzip.decompress((there / f"{stem}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((there / f"{stem}-labels-idx1-ubyte.gz").read_bytes())[8:]
        levels = np.frombuffer(images, np.uint8).reshape(40, 28, 28)
        assert part.labels.tolist() == list(labels)
        for channel in range(3):
            assert np.array_equal(part.images[..., channel].numpy(), levels)


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").exists(),
    reason="the Debian package dataset-fashion-mnist is not installed",
)
def test_the_example_of_the_documentation_reads_the_files_of_the_package(tmp_path: Path) -> None:
    labels = gzip.decompress((fashion(tmp_path / "x") / "train-labels-idx1-ubyte.gz").read_bytes())
    assert list(labels[8:18]) == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]  # as its authors list them


# ---------------------------------------------------------------- what is refused


def numbers(values: list[float]) -> tuple[datasets.Value, list[float]]:
    return datasets.Value("float64"), values


def words(values: Sequence[str | None]) -> tuple[datasets.Value, list[str | None]]:
    return datasets.Value("string"), list(values)


REFUSED = {
    "one split for both": (
        lambda: {"train": split([0]), "test": split([1])},
        {"test_split": "train"},
        "--train-split and --test-split are both 'train': test images must not be training images",
    ),
    "no such split": (
        lambda: {"train": split([0]), "valid": split([1])},
        {},
        r"no split 'test' \(it has: train, validation\); choose one with --test-split",
    ),
    "no such label column": (
        lambda: {"train": split([0]), "test": split([1])},
        {"label_column": "labels"},
        r"--label-column labels: this column does not exist; .*fine_label, coarse_label",
    ),
    "labels that are not classes": (
        lambda: {"train": split([0], n=numbers([0.5])), "test": split([0], n=numbers([0.5]))},
        {"label_column": "n"},
        r"--label-column n: this column holds Value\(.*\), not classes",
    ),
    "a class that is not trained on": (
        lambda: {"train": split([0, 1], n=words("ab")), "test": split([0, 1], n=words("ac"))},
        {"label_column": "n"},
        r"row 1 of split 'test' has n = 'c', a class that the training split does not have",
    ),
    "a missing value": (
        lambda: {
            "train": split([0, 1, 1], n=words(["a", None, "b"])),
            "test": split([0], n=words("a")),
        },
        {"label_column": "n"},
        r"row 1 of split 'train' has no label in column 'n'; give it one",
    ),
    "images that are not images": (
        lambda: {"train": split([0]), "test": split([1])},
        {"image_column": "fine_label"},
        r"--image-column fine_label: this column holds ClassLabel\(.*\), not images",
    ),
    "two image columns": (
        lambda: {
            name: split([0], more=(datasets.Image(), [{"bytes": png(1), "path": None}]))
            for name in ("train", "test")
        },
        {},
        r"2 columns hold images \(img, more; .*--image-column",
    ),
    "a missing label": (
        lambda: {"train": split([0, 1, None]), "test": split([1])},
        {},
        r"row 2 of split 'train' has no label in column 'fine_label'; give it one",
    ),
    "an unlabelled test split": (
        lambda: {"train": split([0, 1]), "test": split([2, -1])},
        {},
        r"row 1 of split 'test' has fine_label = -1",
    ),
    "a missing image": (
        lambda: {"train": split([0, 1], [png(1), None]), "test": split([1])},
        {},
        r"image 1 of split 'train' cannot be read: the row is empty",
    ),
    "an empty image": (
        lambda: {"train": split([0, 1], [png(1), b""]), "test": split([1])},
        {},
        r"image 1 of split 'train' cannot be read: ",
    ),
    "a truncated image": (
        lambda: {"train": split([0]), "test": split([1, 1], [png(1), png(1)[:60]])},
        {},
        r"image 1 of split 'test' cannot be read: ",
    ),
    "text for an image": (
        lambda: {"train": split([0], [b"hello"]), "test": split([1])},
        {},
        r"image 0 of split 'train' cannot be read: cannot identify image file; repair or remov",
    ),
    "an empty split": (
        lambda: {"train": split([0]), "test": split([0]).select([])},
        {},
        r"split 'test' has no images|cannot be read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(parquet: Write, case: str) -> None:
    write, changes, message = REFUSED[case]
    with pytest.raises(UsageError, match=message) as refusal:
        read(parquet(**write()), **changes)
    assert "\n" not in str(refusal.value)


def test_a_corrupt_file_of_a_class_folder_is_named(tmp_path: Path) -> None:
    for name in ("train", "test"):
        for label in "ab":
            (tmp_path / name / label).mkdir(parents=True)
            (tmp_path / name / label / "0.png").write_bytes(png(0))
    (tmp_path / "train" / "b" / "broken.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(UsageError, match=r"/train/b/broken.png cannot be read: .*; repair or"):
        read(str(tmp_path))


# ---------------------------------------------------------------- what does not exist


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("./nowhere", "this folder does not exist"),
        ("/a/b/c", "this folder does not exist"),
        ("x" * 300, "cannot be a folder"),
        ("~nobody-of-that-name/x", "cannot be a folder"),
        ("", "'' is not a folder"),
        (
            "no-such/set",
            "the hub cannot be reached, the data set is not cached here, and there is no local",
        ),
    ],
)
def test_a_data_set_that_does_not_exist_is_refused(dataset: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(dataset)


@pytest.mark.parametrize("change", [{"label_column": "x"}, {"test_split": "valid"}])
def test_flags_that_have_no_effect_on_digits_are_refused(change: dict) -> None:
    with pytest.raises(UsageError, match="has no effect with --dataset digits"):
        read("digits", **change)


def test_a_file_or_an_empty_folder_is_not_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is empty"):
        read(str(tmp_path))
    (tmp_path / "x.png").write_bytes(png(0))
    with pytest.raises(UsageError, match="is not a folder"):
        read(str(tmp_path / "x.png"))


# ---------------------------------------------------------------- the hub


@pytest.fixture
def online(tmp_path: Path) -> dict[str, str]:
    """Variables with which the hub is not switched off, and with caches of their own."""
    caches = {"HF_HOME": str(tmp_path / "hf"), "DML_CACHE": str(tmp_path / "images")}
    return {"HF_HUB_OFFLINE": "0", **caches}


def read_in_a_process(variables: dict[str, str], *datasets: str) -> list[tuple[str, float]]:
    """Read data sets in a fresh process, because the hub's address is read at import.

    Returns:
        For each what was read, or why it was not, and the seconds.
    """
    script = (
        "import sys, time\n"
        "from dml_accel.core.config import Config\n"
        "from dml_accel.core.errors import UsageError\n"
        "from dml_accel.data import sources\n"
        "for name in sys.argv[1:]:\n"
        "    start = time.monotonic()\n"
        "    try:\n"
        "        found = sources.read(Config(dataset=name, image_size=16).data)\n"
        "        print(len(found.train), found.train.labels.tolist(), *found.classes)\n"
        "    except UsageError as error:\n"
        "        print(error)\n"
        "    print(time.monotonic() - start)\n"
    )
    done = run_program(sys.executable, "-W", "error", "-c", script, *datasets, **variables)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return list(zip(lines[::2], map(float, lines[1::2]), strict=True))


def test_a_data_set_of_the_hub_is_downloaded_once_and_then_read_offline(
    parquet: Write, online: dict[str, str]
) -> None:
    folder = parquet(train=split([0, 1, 2]), test=split([2]))
    with serve_hub("some-one/some-set", Path(folder)) as address:
        variables = online | {"HF_ENDPOINT": address}
        (text, _), (other, _) = read_in_a_process(variables, "some-one/some-set", "some-one/other")
        assert text == "3 [0, 1, 2] cat dog eel"
        assert other.startswith("--dataset some-one/other: not a local folder, and not a data set")
    ((text, _),) = read_in_a_process(variables, "some-one/some-set")  # nobody answers any more
    assert text == "3 [0, 1, 2] cat dog eel"


def test_a_bare_name_is_asked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        id = "owner/digits-of-all-kinds"

    opened = []
    monkeypatch.setattr(arrow, "hub_answers", lambda: True)
    monkeypatch.setattr(arrow, "_load", lambda name, *_: opened.append(name) or {})
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: Found())
    with pytest.raises(UsageError, match="no split 'train'"):
        read("digits-of-all-kinds")
    assert opened == [Found.id]

    def missing(*_: object, **__: object) -> None:
        raise OSError("404")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", missing)
    with pytest.raises(UsageError, match="no folder .*/of-no-kind, and the hub has no data set of"):
        read("of-no-kind")
    assert len(opened) == 1


def test_an_unreachable_hub_is_reported_at_once(online: dict[str, str]) -> None:
    variables = online | {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    ((text, seconds),) = read_in_a_process(variables, "uoft-cs/cifar100")
    assert text.startswith(
        "--dataset uoft-cs/cifar100: the hub cannot be reached, the data set is not cached"
    )
    assert "--dataset digits" in text
    assert seconds < 15  # the library's own retries take more than 20
