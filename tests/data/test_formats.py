"""Every format in which a data set may lie on the disk, with a few images of each."""

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import datasets
import pytest

from dml_accel.core.errors import UsageError
from dml_accel.data import catalogue
from dml_accel.data.catalogue import Listed
from tests.data.folders import Write, png, split
from tests.helpers import tiny_config

ROLES = ("train", "val", "test")


def listed(folder: Path | str, roles: tuple[str, ...] = ROLES, **changes: object) -> Listed:
    """List a data set; changes are flags."""
    return catalogue.list_splits(tiny_config(dataset=str(folder), **changes).data, roles, False)


def sizes(found: Listed) -> dict[str, int]:
    return {role: len(one.labels) for role, one in found.splits.items()}


# ---------------------------------------------------------------- one set in every format

LABELS = ["dog", "cat", "dog", "eel"]  # of images 0, 1, ...
NAMES = ("train", "val", "test")


def features(label: datasets.Value | datasets.ClassLabel) -> datasets.Features:
    return datasets.Features(image=datasets.Image(), label=label)


def table(start: int) -> datasets.Dataset:
    images = [{"bytes": png(start + row), "path": None} for row in range(4)]
    columns = {"image": images, "label": LABELS}
    return datasets.Dataset.from_dict(columns, features(datasets.Value("string")))


def parquet_shards(root: Path) -> None:
    for place, name in enumerate(NAMES):
        for shard in range(2):
            part = table(10 * place).select(range(2 * shard, 2 * shard + 2))
            part.to_parquet(root / f"{name}-0000{shard}-of-00002.parquet")


def saved(root: Path) -> None:
    named = {name: table(10 * place) for place, name in enumerate(NAMES)}
    datasets.DatasetDict(named).save_to_disk(root)


def class_folders(root: Path) -> None:
    for place, name in enumerate(NAMES):
        for row, label in enumerate(LABELS):
            file = root / name / label / "deeper" / f"{row}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(10 * place + row))


def files_named(root: Path, ending: str) -> None:
    for place, name in enumerate(NAMES):
        (root / name / "sub").mkdir(parents=True)
        rows = []
        for row, label in enumerate(LABELS):
            (root / name / "sub" / f"{row}.png").write_bytes(png(10 * place + row))
            rows.append({"file_name": f"sub/{row}.png", "label": label})
        file = root / name / f"metadata.{ending}"
        if ending == "jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif ending == "csv":
            lines = [f"{row['file_name']},{row['label']}\n" for row in rows]
            file.write_text("".join(["file_name,label\n", *lines]))
        else:
            datasets.Dataset.from_list(rows).to_parquet(file)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def shards(root: Path, pattern: str, ending: str = "cls") -> None:
    for place, name in enumerate(NAMES):
        for shard in range(2):
            path = root / pattern.format(name, shard)
            path.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(path, "w") as tar:
                for row in range(2 * shard, 2 * shard + 2):
                    add(tar, f"{row:04}.png", png(10 * place + row))
                    label = LABELS[row]
                    text = json.dumps({"label": label}) if ending == "json" else label
                    add(tar, f"{row:04}.{ending}", text.encode())


FORMATS: Mapping[str, Callable[[Path], None]] = {
    "parquet shards": parquet_shards,
    "save_to_disk": saved,
    "class folders": class_folders,
    "metadata.csv": lambda root: files_named(root, "csv"),
    "metadata.jsonl": lambda root: files_named(root, "jsonl"),
    "metadata.parquet": lambda root: files_named(root, "parquet"),
    "numbered tar files": lambda root: shards(root, "{}-{:03}.tar"),
    "folders of tar files": lambda root: shards(root, "{}/{:05}.tar", "json"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_set_is_the_same_in_every_format(tmp_path: Path, name: str) -> None:
    root = tmp_path / "a set"
    root.mkdir()
    FORMATS[name](root)
    found = listed(root)
    assert found.classes == ("cat", "dog", "eel")
    assert sizes(found) == {"train": 4, "test": 4, "val": 4}
    for role, place in (("train", 0), ("val", 10), ("test", 20)):
        listing = found.splits[role]
        by_content = {png(place + row): LABELS[row] for row in range(4)}
        for row in range(4):
            assert by_content[listing.content(row)] == found.classes[int(listing.labels[row])]
        copied = pickle.loads(pickle.dumps(listing))  # as worker processes get it
        assert copied.content(3) == listing.content(3)
    # A folder that the library calls validation can be named as it lies on the disk.
    assert sizes(listed(root, test_split="val")) == {"train": 4, "test": 4}
    assert sizes(listed(root, val_split="none")) == {"train": 4, "test": 4}
    shutil.copytree(root, tmp_path / "moved", symlinks=True)
    again = listed(tmp_path / "moved")
    for role in ROLES:
        assert again.splits[role].identity() == found.splits[role].identity()
    assert found.splits["train"].identity() != found.splits["train"].identity([0, 1])
    for other in NAMES[1:]:  # what is left is a single split
        for path in root.glob(f"{other}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (root / "dataset_dict.json").unlink(missing_ok=True)
    if name == "save_to_disk":
        root /= "train"
    cut = listed(root, test_fraction=0.3)
    assert sum(sizes(cut).values()) == 4 and "val" not in cut.splits
    sides = [{one.content(row) for row in range(len(one.labels))} for one in cut.splits.values()]
    assert not sides[0] & sides[1] and all(sides)


# ---------------------------------------------------------------- tables


def test_a_table_is_cut_by_its_rows_or_file_names_alone(parquet: Write) -> None:
    labels = [0, 1, 2] * 40
    images = [png(row) for row in range(123)]
    folder = parquet(train=split(labels, images[:120]))
    found = listed(folder, test_fraction=0.2, seed=1)
    tested = [one for one in range(3) if (found.splits["test"].labels == one).sum()]
    assert tested == [0, 1, 2] and 10 <= sizes(found)["test"] <= 40
    assert listed(folder, test_fraction=0.2, seed=2).splits["test"].identity() == (
        found.splits["test"].identity()
    )
    held = {found.splits["test"].content(row) for row in range(sizes(found)["test"])}
    kept = {found.splits["train"].content(row) for row in range(sizes(found)["train"])}
    assert not held & kept and len(held | kept) == 120
    parquet(train=split([*labels, 0, 1, 2], images))  # rows that are added move no other
    more = listed(folder, test_fraction=0.2)
    after = {more.splits["test"].content(row) for row in range(sizes(more)["test"])}
    assert held <= after


def test_any_folder_of_tables_can_be_a_split(tmp_path: Path) -> None:
    for name in ("seen", "un seen"):
        (tmp_path / name).mkdir()
        split([0, 1]).to_parquet(tmp_path / name / "a.parquet")
    found = listed(tmp_path, train_split="seen", test_split="un seen")
    assert sizes(found) == {"train": 2, "test": 2}


REFUSED: Mapping[str, tuple[dict[str, object], str]] = {
    "a fraction beside a test split": ({"test_fraction": 0.2}, "has a split 'test' already: drop"),
    "a fraction beside others": (
        {"test_fraction": 0.2, "test_split": "x"},
        r"has other splits beside 'train' \(validation, test\).*--val-split none",
    ),
    "no test split": (
        {"test_split": "x"},
        r"no split 'x' \(it has: train, validation, test\); choose one with --test-split validat",
    ),
    "no validation split": ({"val_split": "x"}, "no split 'x' .*; choose one with --val-split"),
    "one for two": (
        {"val_split": "valid", "test_split": "val"},
        "--test-split and --val-split are both 'validation'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_splits_of_tables_that_are_unclear_are_refused(parquet: Write, case: str) -> None:
    flags, message = REFUSED[case]
    folder = parquet(train=split([0, 1]), val=split([0]), test=split([2]))
    with pytest.raises(UsageError, match=message) as refusal:
        listed(folder, **flags)
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------- tar files


def test_labels_of_tar_files_that_are_numbers_are_in_their_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "test"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for row, label in enumerate((10, 9, 2)):
                add(tar, f"x/{row}.webp", png(row))
                add(tar, f"x/{row}.cls", b"%d\n" % label)
                add(tar, f"x/{row}.txt", b"a caption")
            add(tar, "x/9.cls", b"1")
    for again in range(2):  # read, and kept
        found = listed(tmp_path)
        assert found.classes == ("2", "9", "10")
        assert found.splits["train"].labels.tolist() == [2, 1, 0]
        said = capsys.readouterr().err
        assert "passed over in the tar files: 6 .txt, 2 samples without an image" in said
        assert ("reading 1 tar files of split 'train' into" in said) == (not again)
    assert "train.tar/x/1.webp" in found.splits["train"].place(1)


def broken(root: Path, cut: int | None = None, **members: bytes) -> Path:
    for name in ("train", "test"):
        with tarfile.open(root / f"{name}.tar", "w") as tar:
            for key, content in members.items():
                add(tar, key.replace("_", "."), content)
    if cut:
        content = (root / "train.tar").read_bytes()
        (root / "train.tar").write_bytes(content[:cut])
    return root


BROKEN: Mapping[str, tuple[dict[str, object], str]] = {
    "cut in a member": (
        {"a_png": png(1), "a_cls": b"1", "cut": 600},
        r"train.tar cannot be read at or after a.png: .*; repair or remove it",
    ),
    "cut in a header": (
        {"a_png": png(1), "a_cls": b"1", "cut": 1100},
        r"train.tar cannot be read at or after a.png: .*; repair or remove it",
    ),
    "no label": (
        {"a_png": png(1), "a_txt": b"1"},
        r"test.tar/a.png has no label \(png, ",
    ),
    "two images": ({"a_png": png(1), "a_jpg": b"1"}, r"2 images \(png, jpg\): name one of these"),
    "no json": ({"a_png": png(1), "a_json": b"{"}, r"test.tar/a.json is no JSON: "),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_members_of_tar_files_are_named(tmp_path: Path, case: str) -> None:
    arguments, message = BROKEN[case]
    with pytest.raises(UsageError, match=message) as refusal:
        listed(broken(tmp_path, **arguments))
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------- metadata files


def test_one_metadata_file_may_name_the_images_of_all_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["label,file_name\n"]
    for name in ("learn", "report"):
        (tmp_path / name).mkdir()
        for row, label in enumerate((3, 20, 3)):
            (tmp_path / name / f"{row}.png").write_bytes(png(row))
            lines.append(f"{label},{name}/{row}.png\n")
    (tmp_path / "learn/extra.png").write_bytes(png(9))
    (tmp_path / "metadata.csv").write_text("".join(lines))
    found = listed(tmp_path, train_split="learn", test_split="report")
    assert found.classes == ("3", "20") and sizes(found) == {"train": 3, "test": 3}
    assert found.splits["test"].labels.tolist() == [0, 1, 0]
    said = capsys.readouterr().err
    assert f"1 image file of {tmp_path} left out: no metadata file names them" in said
    whole = listed(tmp_path, test_fraction=0.5)  # no folder is a split
    assert sum(sizes(whole).values()) == 6


def test_a_metadata_file_names_no_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    for name in ("train", "test"):
        (tmp_path / "set" / name).mkdir(parents=True)
        rows = [{"file_name": "../../secret.png", "label": one} for one in "ab"]
        rows[1]["file_name"] = "gone.png"
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "set" / name / "metadata.jsonl").write_text(text)
    listing = listed(tmp_path / "set").splits["train"]
    with pytest.raises(ValueError, match="the row names a file outside the data set"):
        listing.content(0)
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        listing.content(1)
