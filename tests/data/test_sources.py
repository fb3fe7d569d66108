"""Where images come from: local folders, the hub's protocol, the cache, and what is refused."""

import gzip
import io
import json
import os
import pickle
import re
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from dml_accel import cli
from dml_accel.core.config import UsageError
from dml_accel.data import decode as decoding
from dml_accel.data import sources
from tests.conftest import tiny_config
from tests.hub import serve_hub

CLASSES = ["cat", "dog", "eel"]
SIZE = 16


def png(value: int, mode: str = "RGB", size: tuple[int, int] = (SIZE, SIZE)) -> bytes:
    buffer = io.BytesIO()
    colour = value if mode in ("L", "P") else (value, value // 2, 7)
    Image.new(mode, size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def split(
    labels: list[int | None], images: list[bytes | None] | None = None, **extra: object
) -> datasets.Dataset:
    images = images or [png(10 * i) for i in range(len(labels))]
    features = {
        "img": datasets.Image(),
        "fine_label": datasets.ClassLabel(names=CLASSES),
        "coarse_label": datasets.ClassLabel(names=["pet", "fish"]),
    }
    columns = {
        "img": [image and {"bytes": image, "path": None} for image in images],
        "fine_label": labels,
        "coarse_label": [0] * len(labels),
    }
    features |= {name: kind for name, (kind, _) in extra.items()}
    columns |= {name: values for name, (_, values) in extra.items()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


Write = Callable[..., str]


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


def read(dataset: str, **changes: object) -> sources.Source:
    return sources.read(tiny_config(dataset=dataset, **changes))


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


def test_a_class_that_is_never_trained_on_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, labels in (("train", "ab"), ("test", "abc")):
        for label in labels:
            (tmp_path / name / label).mkdir(parents=True)
            (tmp_path / name / label / "0.png").write_bytes(png(0))
    assert read(str(tmp_path)).classes == ("a", "b", "c")
    said = capsys.readouterr().err
    assert "warning: 1 of 3 classes have no image to train on: 'c'" in said


def test_a_changed_image_is_not_answered_from_a_cache(tmp_path: Path) -> None:
    for name in ("train", "test"):
        for label in "ab":
            (tmp_path / name / label).mkdir(parents=True)
            (tmp_path / name / label / "0.png").write_bytes(png(0))
    assert read(str(tmp_path)).train.images.max() == 7
    (tmp_path / "train" / "a" / "0.png").write_bytes(png(200))
    assert read(str(tmp_path)).train.images.max() == 200


def test_digits_are_scikit_learns_with_the_last_360_for_test() -> None:
    found = sources.read(tiny_config(image_size=32))
    assert (len(found.train), len(found.test), len(found.classes)) == (1437, 360, 10)
    assert found.train.images.shape[1:] == (32, 32, 3)
    assert found.train.images.max() == 255


def test_the_real_images_are_read(real_images: Path) -> None:
    found = read(str(real_images), image_size=32)
    assert (len(found.train), len(found.test), len(found.classes)) == (10_000, 5_000, 100)
    first = datasets.load_dataset("parquet", data_dir=str(real_images), split="train")[0]
    assert np.array_equal(np.asarray(first["img"]), found.train.images[0].numpy())
    assert first["fine_label"] == found.train.labels[0]


def test_sixteen_bits_are_scaled_and_unknown_ranges_refused(parquet: Write) -> None:
    def grey(value: float, kind: type, form: str) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.full((SIZE, SIZE), value, kind)).save(buffer, form)
        return buffer.getvalue()

    images = [grey(257 * value, np.uint16, "PNG") for value in (3, 200)]
    found = read(parquet(train=split([0, 1], images), test=split([1])))
    assert found.train.images[:, 0, 0].tolist() == [[3] * 3, [200] * 3]
    folder = parquet(train=split([0], [grey(0.5, np.float32, "TIFF")]), test=split([1]))
    with pytest.raises(UsageError, match="image 0 of split 'train' .*mode F have no known range"):
        read(folder)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_other_colours_and_sizes_become_rgb_squares(parquet: Write, mode: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), (90, 90, 90)).convert(mode).save(
        buffer, "TIFF" if mode == "CMYK" else "PNG"
    )
    folder = parquet(train=split([0], [buffer.getvalue()]), test=split([1]))
    image = read(folder).train.images[0]
    assert image.shape == (SIZE, SIZE, 3)
    assert (image.int() - 90).abs().max() <= 12  # the palette has no such grey


def test_columns_are_inferred(parquet: Write) -> None:
    # Two class columns: fine_label wins; --label-column says otherwise.
    folder = parquet(train=split([0, 1]), test=split([2, 1]))
    assert read(folder).classes == tuple(CLASSES)
    assert read(folder, label_column="coarse_label").classes == ("pet", "fish")


def test_a_column_of_words_or_numbers_is_taken_for_classes_where_it_is_named(
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


# ---------------------------------------------------------------- sets as they are found


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
def test_a_set_trains_as_it_is_found(
    tmp_path: Path, write: Callable[[Path], None], classes: int
) -> None:
    write(tmp_path / "set")
    words = "--cohort resnet8*2 --batch-size 8 --max-steps 1 --cpu --output-dir".split()
    words += [str(tmp_path / "run"), "--dataset", str(tmp_path / "set")]
    assert cli.main(["train", *words]) == 0
    description = json.loads((tmp_path / "run" / "config.json").read_text())
    rows = 40 if classes == 10 else 16
    assert (description["classes"], description["images"]["test"]) == (classes, rows)
    peer = json.loads((tmp_path / "run/peers/resnet8-1/config.json").read_text())
    assert peer["label_names"][:2] == {10: ["airplane", "automobile"], 2: ["ant", "bee"]}[classes]


def test_fashion_mnist_is_read_by_way_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = fashion(tmp_path / "package")
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", readme, re.S) if "fashion" in b]
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
def test_the_packages_own_files_are_what_the_readme_reads(tmp_path: Path) -> None:
    labels = gzip.decompress((fashion(tmp_path / "x") / "train-labels-idx1-ubyte.gz").read_bytes())
    assert list(labels[8:18]) == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]  # as its authors list them


# ---------------------------------------------------------------- the cache


def cached_files() -> list[Path]:
    return sorted(decoding.cache_dir().glob("*.safetensors"))


def test_images_are_decoded_once(parquet: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = parquet(train=split([0, 1]), test=split([2, 1]))
    first = read(folder)
    monkeypatch.setattr(decoding, "decode", None)  # a second decoding would fail
    again = read(folder)
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.test.labels, again.test.labels)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign"])
def test_a_damaged_cache_is_decoded_again(
    parquet: Write, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = parquet(train=split([0, 1]), test=split([2, 1]))
    before = set(cached_files())
    first = read(folder)
    for path in set(cached_files()) - before:
        content = bytearray(path.read_bytes())
        if damage == "flipped":
            content[-1] ^= 1
        path.write_bytes(
            {"truncated": content[:-5], "flipped": content, "foreign": b"junk"}[damage]
        )
    again = read(folder)
    assert "is damaged" in capsys.readouterr().err
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.train.labels, again.train.labels)


def test_without_a_place_for_the_cache_the_images_are_still_read(
    parquet: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DML_CACHE", str(tmp_path / "file" / "below"))
    found = read(parquet(train=split([0, 1]), test=split([2, 1])))
    assert len(found.train) == 2
    assert "images are not cached" in capsys.readouterr().err


def test_a_full_disk_costs_the_cache_and_not_the_run(
    parquet: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoding, "save_file", full)
    assert len(read(parquet(train=split([0, 1, 1]), test=split([2]))).train) == 3
    assert "images are not cached: [Errno 28] No space" in capsys.readouterr().err
    assert not list(decoding.cache_dir().glob("*.tmp"))


def test_tables_kept_in_memory_are_not_mistaken_for_each_other(
    parquet: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 10**9)
    found = read(parquet(train=split([0, 1, 2]), test=split([2])))
    assert (len(found.train), len(found.test)) == (3, 1)


def test_the_cache_holds_no_pickle_and_no_leftovers(parquet: Write) -> None:
    read(parquet(train=split([0, 1]), test=split([2, 1])))
    names = {path.suffix for path in decoding.cache_dir().iterdir()}
    assert names == {".safetensors", ".lock"}


# ---------------------------------------------------------------- what is refused


def numbers(values: list[float]) -> tuple[datasets.Value, list[float]]:
    return datasets.Value("float64"), values


def words(values: Sequence[str | None]) -> tuple[datasets.Value, list[str | None]]:
    return datasets.Value("string"), list(values)


REFUSED = {
    "one split for both": (
        lambda: {"train": split([0]), "test": split([1])},
        {"test_split": "train"},
        "--train-split and --test-split are both 'train': what is reported must not be what was",
    ),
    "no such split": (
        lambda: {"train": split([0]), "valid": split([1])},
        {},
        r"no split 'test' \(it has: train, validation\); choose with --test-split",
    ),
    "no such label column": (
        lambda: {"train": split([0]), "test": split([1])},
        {"label_column": "labels"},
        r"--label-column labels: this column does not exist; .*fine_label, coarse_label",
    ),
    "labels that are not classes": (
        lambda: {"train": split([0], n=numbers([0.5])), "test": split([0], n=numbers([0.5]))},
        {"label_column": "n"},
        r"--label-column n: this column holds no classes but Value",
    ),
    "a class that is not trained on": (
        lambda: {"train": split([0, 1], n=words("ab")), "test": split([0, 1], n=words("ac"))},
        {"label_column": "n"},
        r"row 1 of split 'test' has n = 'c', which the split that is trained on does not have",
    ),
    "a missing value": (
        lambda: {
            "train": split([0, 1, 1], n=words(["a", None, "b"])),
            "test": split([0], n=words("a")),
        },
        {"label_column": "n"},
        r"row 1 of split 'train' has n = None",
    ),
    "images that are not images": (
        lambda: {"train": split([0]), "test": split([1])},
        {"image_column": "fine_label"},
        r"--image-column fine_label: this column holds no images",
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
        r"row 2 of split 'train' has fine_label = nan; with 3 classes labels run from 0 to 2",
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
    with pytest.raises(UsageError, match=r"image \d of split 'train' \(.*/train/b/broken.png\)"):
        read(str(tmp_path))


# ---------------------------------------------------------------- what strangers send


def forged(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises many."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_700, 20_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_and_not_opened(parquet: Write, side: int) -> None:
    folder = parquet(train=split([0, 1], [png(1), forged(side, side)]), test=split([1]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match="image 1 of split 'train' cannot be read") as refusal:
        read(folder)
    assert "\n" not in str(refusal.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_row_cannot_name_a_file_outside_the_set(parquet: Write, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(9))
    folder = parquet(train=split([0]), test=split([1]))
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    for path in (str(secret), f"{folder}/../secret.png"):
        table = pyarrow.table(
            {
                "img": pyarrow.array([{"bytes": None, "path": path}], image),
                "fine_label": pyarrow.array([0], pyarrow.int64()),
                "coarse_label": pyarrow.array([0], pyarrow.int64()),
            }
        )
        described = pyarrow.parquet.read_schema(f"{folder}/train-00000-of-00001.parquet").metadata
        target = f"{folder}/train-00000-of-00001.parquet"
        pyarrow.parquet.write_table(table.replace_schema_metadata(described), target)
        with pytest.raises(UsageError, match="cannot be read: the file that the row names is out"):
            read(folder)


@pytest.mark.parametrize("content", [b"", b"PAR1", pickle.dumps([1]), b"PAR1" + bytes(50)], ids=str)
def test_a_parquet_file_that_is_none_is_one_line(parquet: Write, content: bytes) -> None:
    folder = parquet(train=split([0]), test=split([1]))
    (Path(folder) / "train-00000-of-00001.parquet").write_bytes(content)
    with pytest.raises(UsageError, match=f"--dataset {folder}") as refusal:
        read(folder)
    assert "\n" not in str(refusal.value)


def test_a_truncated_parquet_file_is_one_line(parquet: Write) -> None:
    folder = parquet(train=split([0] * 50), test=split([1]))
    path = Path(folder) / "train-00000-of-00001.parquet"
    whole = path.read_bytes()
    for part in range(1, 10):
        path.write_bytes(whole[: len(whole) * part // 10])
        with pytest.raises(UsageError, match=f"--dataset {folder}") as refusal:
            read(folder)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "column",
    [
        [1, 2],
        ["a.png", "b.png"],
        [{"bytes": "text", "path": None}] * 2,
        [{"bytes": 3, "path": None}] * 2,
        [[png(1)], [png(2)]],
        [{"path": "x"}] * 2,
    ],
    ids=lambda column: str(column)[:30],
)
def test_columns_of_wrong_types_are_one_line(parquet: Write, column: list) -> None:
    folder = parquet(train=split([0]), test=split([1]))
    target = f"{folder}/train-00000-of-00001.parquet"
    described = pyarrow.parquet.read_schema(target).metadata
    table = pyarrow.table({"img": column, "fine_label": ["x", "y"], "coarse_label": [0.5, 1.5]})
    pyarrow.parquet.write_table(table.replace_schema_metadata(described), target)
    with pytest.raises(UsageError) as refusal:
        read(folder)
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------- what is not there


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("./nowhere", "there is no such folder"),
        ("/a/b/c", "there is no such folder"),
        ("x" * 300, "cannot be a folder"),
        ("~nobody-of-that-name/x", "cannot be a folder"),
        ("", "'' is no folder"),
        ("no-such/set", "the hub cannot be reached, nothing of it is cached here, and no local"),
    ],
)
def test_a_set_that_is_not_there(dataset: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(dataset)


@pytest.mark.parametrize("change", [{"label_column": "x"}, {"test_split": "valid"}])
def test_flags_without_meaning_for_digits_are_refused(change: dict) -> None:
    with pytest.raises(UsageError, match="does not apply to digits"):
        read("digits", **change)


def test_a_file_or_an_empty_folder_is_no_set(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read(str(tmp_path))
    (tmp_path / "x.png").write_bytes(png(0))
    with pytest.raises(UsageError, match="is no folder"):
        read(str(tmp_path / "x.png"))


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub_environment(tmp_path: Path) -> dict[str, str]:
    """An environment in which the hub is not switched off, with caches of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    return environment | {"HF_HOME": str(tmp_path / "hf"), "DML_CACHE": str(tmp_path / "images")}


def read_in_a_process(dataset: str, environment: dict[str, str]) -> tuple[str, float]:
    """Read the set in a fresh process (the hub's address is read at import)."""
    script = (
        "import sys, time\n"
        "from dml_accel.data import decode as decoding, sources\n"
        "from dml_accel.core.config import Config, UsageError\n"
        "start = time.monotonic()\n"
        "try:\n"
        "    found = sources.read(Config(dataset=sys.argv[1], image_size=16))\n"
        "    print(len(found.train), found.train.labels.tolist(), *found.classes)\n"
        "except UsageError as error:\n"
        "    print(error)\n"
        "print(time.monotonic() - start)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, dataset],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    text, seconds = done.stdout.splitlines()
    return text, float(seconds)


def test_a_set_from_the_hub_is_downloaded_and_later_read_offline(
    parquet: Write, hub_environment: dict[str, str]
) -> None:
    folder = parquet(train=split([0, 1, 2]), test=split([2]))
    with serve_hub("some-one/some-set", Path(folder)) as address:
        environment = hub_environment | {"HF_ENDPOINT": address}
        text, _ = read_in_a_process("some-one/some-set", environment)
        assert text == "3 [0, 1, 2] cat dog eel"
        text, _ = read_in_a_process("some-one/other", environment)
        assert text.startswith("--dataset some-one/other: neither a folder here nor a data set")
    text, _ = read_in_a_process("some-one/some-set", environment)  # nobody answers any more
    assert text == "3 [0, 1, 2] cat dog eel"


def test_a_hub_out_of_reach_is_said_at_once(hub_environment: dict[str, str]) -> None:
    environment = hub_environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    text, seconds = read_in_a_process("uoft-cs/cifar100", environment)
    assert text.startswith("--dataset uoft-cs/cifar100: the hub cannot be reached, nothing of it")
    assert "--dataset digits" in text
    assert seconds < 15  # the library's own retries take more than 20
