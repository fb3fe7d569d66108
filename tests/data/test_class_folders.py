"""Class folders: which folder is a split, a class or an image, and what is said of the rest."""

import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from dml_accel.core.errors import UsageError
from dml_accel.data import catalogue, class_folders, class_layout, sources
from dml_accel.data.listing import StoredFile
from dml_accel.data.pixels import Geometry
from tests.data.folders import SIZE, png, read
from tests.helpers import tiny_config


def make(root: Path, *paths: str, **contents: int) -> Path:
    """Write images of one colour below a folder; by default each has another colour."""
    for number, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(contents.get(path, number)))
    return root


def counts(source: sources.Source) -> dict[str, list[int]]:
    """Images of each class in both splits."""
    assert source.fingerprint
    return {role: one.by_class for role, one in source.fingerprint.splits.items()}


def splits(*classes: str, names: tuple[str, str] = ("train", "test"), images: int = 2) -> list[str]:
    return [f"{s}/{c}/{i}.png" for s in names for c in classes for i in range(images)]


# ---------------------------------------------------------------- the place decides

PLACES: Mapping[str, tuple[list[str], dict[str, object], tuple[str, ...], list[int], list[int]]] = {
    # paths, flags, classes, and the images of each class in both splits
    "words in the names of classes": (
        splits("bus", "train", "test", "val", "train_station", "test_tube"),
        {},
        ("bus", "test", "test_tube", "train", "train_station", "val"),
        [2] * 6,
        [2] * 6,
    ),
    "words in the names of files": (
        ["train/a/test_1.png", "train/b/val.png", "test/a/train.png", "test/b/train_2.png"],
        {},
        ("a", "b"),
        [1, 1],
        [1, 1],
    ),
    "folders in a class": (
        ["train/a/in/1.png", "train/a/out/deep/1.png", "train/b/1.png", "test/a/x/1.png"],
        {},
        ("a", "b"),
        [2, 1],
        [1, 0],
    ),
    "as Tiny ImageNet": (
        ["train/n1/images/1.png", "train/n2/images/1.png", "val/n1/images/1.png", "val/n2/2.png"],
        {"test_split": "val"},
        ("n1", "n2"),
        [1, 1],
        [1, 1],
    ),
    "splits of other names": (
        splits("a", "b", names=("seen", "unseen")),
        {"train_split": "seen", "test_split": "unseen"},
        ("a", "b"),
        [2, 2],
        [2, 2],
    ),
    "splits below another folder": (
        splits("a", "b", names=("x/one", "x/two")),
        {"train_split": "x/one", "test_split": "x/two"},
        ("a", "b"),
        [2, 2],
        [2, 2],
    ),
    "numbers as names": (splits("10", "9", "1"), {}, ("1", "10", "9"), [2] * 3, [2] * 3),
    "spaces, brackets and letters": (
        splits("a [1]", "b*?", "c #%", "é"),
        {},
        ("a [1]", "b*?", "c #%", "é"),
        [2] * 4,
        [2] * 4,
    ),
    "one class in two spellings of Unicode": (
        ["train/e\u0301/1.png", "train/b/1.png", "test/\u00e9/1.png", "test/b/1.png"],
        {},
        ("b", "\u00e9"),
        [1, 1],
        [1, 1],
    ),
    "hidden files and those of systems": (
        [*splits("a", "b"), "train/.git/1.png", "train/a/._1.png", "train/__MACOSX/a/1.png"],
        {},
        ("a", "b"),
        [2, 2],
        [2, 2],
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_split_and_class_follow_from_the_place_of_a_folder(tmp_path: Path, case: str) -> None:
    paths, flags, classes, train, test = PLACES[case]
    found = read(str(make(tmp_path / "set", *paths)), **flags)
    assert found.classes == classes
    assert counts(found) == {"train": train, "test": test}


ROOTS = ["plain", "pets [v2]", "a*b?", "#1 100%", "ünï", "a:b", "x::y", "train", "-x", " ", "q'\"q"]


@pytest.mark.parametrize("name", [*ROOTS, os.fsdecode(b"caf\xe9")], ids=repr)
def test_any_path_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    root = make(tmp_path / name, *splits("a", "b"))
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(root)
    first = read(str(root)).fingerprint
    for path in (f"{root}/", ".", f"../{name}", f"{tmp_path}/link", f"{tmp_path}/link/../{name}//"):
        assert read(path).fingerprint == first
        config = catalogue.located(tiny_config(dataset=path))
        assert os.path.isabs(config.data.dataset) and Path(config.data.dataset).samefile(root)


def test_a_class_of_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    assert read(str(make(tmp_path, *splits(name, "b")))).classes == ("b", name)


# ---------------------------------------------------------------- links


def test_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    root = make(tmp_path / "set", *splits("a"), "train/b/0.png")
    make(tmp_path / "else", "1.png", "2.png", **{"1.png": 70, "2.png": 80})
    (root / "test/b").symlink_to(tmp_path / "else")
    (root / "train/b/9.png").symlink_to(tmp_path / "else/1.png")
    (root / "train/c").symlink_to(tmp_path / "else", target_is_directory=True)
    found = read(str(root))
    assert (found.classes, counts(found)) == (
        ("a", "b", "c"),
        {"train": [2, 2, 2], "test": [2, 2, 0]},
    )


@pytest.mark.parametrize("leads_to", [".", "..", "../..", "../../b"])
def test_a_link_in_a_circle_is_refused(tmp_path: Path, leads_to: str) -> None:
    root = make(tmp_path / "set", *splits("a", "b"))
    (root / "train/a/again").symlink_to(root / "train/a" / leads_to)
    if leads_to == "../../b":
        (root / "train/b/back").symlink_to(root / "train/a")
        (root / "b").symlink_to(root / "train/b")
    with pytest.raises(UsageError, match="is a link to a folder above it: remove it"):
        read(str(root))


def test_a_folder_beside_the_splits_need_not_be_readable(tmp_path: Path) -> None:
    root = make(tmp_path / "set", *splits("a", "b"), "latest/x/notes")
    (root / "latest/x/up").symlink_to(root)
    assert len(read(str(root)).train) == 4
    assert len(read(str(root), train_split="./train", test_split="test/").train) == 4


def test_folders_may_be_nested_as_deep_as_the_system_allows(tmp_path: Path) -> None:
    root = make(tmp_path / "set", *splits("a", "b"))
    here = os.getcwd()
    try:
        os.chdir(root / "train/a")
        for _ in range(1100):  # deeper than Python calls functions
            os.mkdir("x")
            os.chdir("x")
    finally:
        os.chdir(here)
    try:
        assert len(read(str(root)).train) == 4
    finally:
        os.removedirs(root / "train/a" / ("x/" * 1100))  # no function that calls itself could


def test_splits_that_share_a_folder_are_refused(tmp_path: Path) -> None:
    root = make(tmp_path / "set", *splits("a", "b", names=("train", "train/test")))
    (root / "test").symlink_to(root / "train")
    for name in ("test", "train/test", "./train"):
        with pytest.raises(UsageError, match="share the folder .* must not be training images"):
            read(str(root), test_split=name)


# ---------------------------------------------------------------- what is left out


def test_what_is_left_out_is_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make(tmp_path / "set", *splits("cat", "dog"), "train/loose.png", "extra/a/1.png")
    for number in range(3):
        fox = root / f"train/fox/{number}.heic"
        fox.parent.mkdir(exist_ok=True)
        fox.write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    (root / "train/cat/0.png").rename(root / "train/cat/no ending")
    (root / "train/cat/film.mp4").write_bytes(bytes(9))
    (root / "train/dog/gone.png").symlink_to(root / "nowhere")
    os.mkfifo(root / "train/dog/pipe.png")
    for name in ("train/cat/1.txt", "train/cat/1.json", "test/dog/0.txt", "labels.csv"):
        (root / name).write_text("0 0.5 0.5 1 1")
    found = read(str(root))
    assert (found.classes, counts(found)["train"]) == (("cat", "dog"), [2, 2])
    assert capsys.readouterr().err.splitlines()[:7] == [
        "warning: 1 file of train/cat cannot be read (.mp4)",
        "warning: 2 files of train/dog cannot be read (a broken link)",
        "warning: 3 files of train/fox cannot be read (.heic)",
        "warning: 1 file of train left out, in no class folder",
        "warning: no image that can be read in 'train/fox'",
        "passed over beside the images: 1 .json, 2 .txt",
        "folders beside the splits are not used: 'extra'",
    ]


def test_images_that_are_copies_of_training_images_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make(tmp_path / "set", *splits("a", "b"))
    (root / "test/b/copy.png").write_bytes((root / "train/a/1.png").read_bytes())
    read(str(root))
    assert "warning: 1 of 5 test images are copies of training images" in capsys.readouterr().err


# ---------------------------------------------------------------- what is refused

REFUSED: Mapping[str, tuple[list[str], dict[str, object], str]] = {
    "no splits": (
        ["cat/1.png", "dog/1.png"],
        {},
        r"has no folder 'train': if its folders \('cat', 'dog'\) are the classes, --test-fraction",
    ),
    "no test split": (
        splits("a", "b", names=("train", "val")),
        {},
        r"no split 'test' \(it has: train, val\); choose one with --test-split val, or hold out a "
        "fifth of each class with --test-fraction 0.2 --val-split val",
    ),
    "splits a folder below": (
        splits("a", "b", names=("data/train", "data/test")),
        {},
        "has its splits in .*/data: name that",
    ),
    "a fraction beside a test split": (
        splits("a", "b"),
        {"test_fraction": 0.2},
        "has a split 'test' already: drop --test-fraction 0.2",
    ),
    "a fraction of what may be splits": (
        splits("a", "b", names=("train", "val")),
        {"test_fraction": 0.2},
        "is 'train' a split, or a class like 'val'.* or add --val-split val to choose a peer by it",
    ),
    "no such validation split": (
        splits("a", "b"),
        {"val_split": "dev"},
        r"no split 'dev' \(it has: test, train\); choose one with --val-split, or write --val",
    ),
    "one folder to choose by and to report on": (
        splits("a", "b"),
        {"val_split": "test"},
        "the splits 'test' and 'test' share the folder .*test: validation images must not be test",
    ),
    "a validation split in another": (
        splits("a", "b", names=("train", "test")) + ["train/a/x/1.png"],
        {"val_split": "train/a"},
        "the splits 'train' and 'train/a' share the folder .*: validation images must not be train",
    ),
    "images without classes": (["1.png", "2.png"], {}, "no folders that name their classes"),
    "nothing": ([".hidden"], {}, "set is empty"),
    "another spelling": (
        splits("a", "b", names=("Train", "Test")),
        {},
        "has no folder 'train', but 'Train': name it with --train-split Train",
    ),
    "a class that is called train": (
        ["train/1.png", "bus/1.png"],
        {},
        r"has images, not class folders, in 'train': if its folders \('bus', 'train'\) are the",
    ),
    "one class": (splits("a"), {}, "has images of 1 class; at least 2 are needed"),
    "a column": (splits("a", "b"), {"label_column": "x"}, "--label-column has no effect with clas"),
    "one folder for both": (splits("a"), {"test_split": "train"}, "are both 'train'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_unclear_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    paths, flags, message = REFUSED[case]
    with pytest.raises(UsageError, match=message) as refusal:
        read(str(make(tmp_path / "set", *paths)), **flags)
    assert "\n" not in str(refusal.value)


def test_archives_are_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("train.zip", "test.zip"):
        (tmp_path / "set" / name).write_bytes(b"PK")
    with pytest.raises(UsageError, match="holds archives: unpack .*/test.zip, .*/train.zip, so"):
        read(str(tmp_path / "set"))
    with pytest.raises(UsageError, match="train.zip is an archive: unpack it, and name the folder"):
        read(str(tmp_path / "set/train.zip"))


# ---------------------------------------------------------------- a validation split

THREE = splits("a", "b", names=("train", "test")) + ["val/a/1.png", "valid/b/1.png"]
VALIDATION: Mapping[str, tuple[dict[str, object], str | None]] = {
    # flags, and the folder that is taken
    "by its name": ({}, "val"),
    "another": ({"val_split": "valid"}, "valid"),
    "none": ({"val_split": "none"}, None),
    "none beside a fraction": ({"val_fraction": 0.5}, None),
    "not the split to report on": ({"test_split": "val"}, "valid"),
    "not the split to train on": ({"train_split": "val"}, "valid"),
    "a fraction for testing": (
        {"test_fraction": 0.5, "val_split": "val", "test_split": "x", "train_split": "train"},
        "val",
    ),
}


@pytest.mark.parametrize("case", VALIDATION)
def test_a_folder_for_validation(tmp_path: Path, case: str) -> None:
    flags, expected = VALIDATION[case]
    paths = THREE if "test_fraction" not in flags else [p for p in THREE if p[:3] in ("tra", "val")]
    paths = [path for path in paths if "test_fraction" not in flags or "valid" not in path]
    config = tiny_config(dataset=str(make(tmp_path / "set", *paths)), **flags)
    listed = catalogue.list_splits(config.data, ("train", "val", "test"), quiet=True)
    assert listed.classes == ("a", "b")
    assert list(listed.splits) == ["train", "test", *(["val"] if expected else [])]
    if expected:
        (place,) = [listed.splits["val"].place(row) for row in range(1)]
        assert Path(place).relative_to(tmp_path / "set").parts[0] == expected
    tested = catalogue.list_splits(config.data, ("test",), quiet=True)
    assert list(tested.splits)[-1] == "test" and "val" not in tested.splits


# ---------------------------------------------------------------- a listing


def test_a_listing_is_small_and_tells_files_apart(tmp_path: Path) -> None:
    paths = splits("b", "a", "a-1", "a b", names=("train", "test"), images=12)
    root = make(tmp_path / "set", *paths)
    (root / "train/a/10.png").write_bytes(png(0) + b"x")
    listed = catalogue.list_splits(tiny_config(dataset=str(root)).data, ("train", "test"), True)
    train = listed.splits["train"]
    assert isinstance(train, class_folders.FolderListing)
    expected = sorted(path for path in paths if path.startswith("train"))
    assert [file.path for file in train.images] == expected
    for row, path in enumerate(expected):
        assert train.images[row] == StoredFile.of(path, os.stat(root / path))
        assert listed.classes[int(train.labels[row])] == Path(path).parts[1]
    some = train.files([7, 3])
    assert list(some) == [train.images[7], train.images[3]] == list(some[0:1]) + list(some[1:2])
    copied = pickle.loads(pickle.dumps(train))  # as worker processes get it
    assert list(copied.images) == list(train.images)
    held = train.images
    arrays = (held.ends, held.sizes, held.times, held.inodes)
    assert sum(one.nbytes for one in arrays) == 48 * len(held)

    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere/other"
    shutil.copytree(root, moved)
    config = tiny_config(dataset=str(moved))

    def identity(rows: list[int] | None = None) -> str:
        return (
            catalogue.list_splits(config.data, ("test", "train"), True)
            .splits["train"]
            .identity(rows)
        )

    assert identity() == train.identity() != listed.splits["test"].identity()
    assert identity([1, 2]) == train.identity(torch.tensor([1, 2])) != train.identity([2, 1])
    (moved / "train/a/1.png").write_bytes(png(9) + b"longer")
    assert identity() != train.identity()
    (moved / "train/a/1.png").write_bytes((root / "train/a/1.png").read_bytes())
    assert identity() == train.identity()
    (moved / "train/a/1.png").rename(moved / "train/a/1 .png")
    assert identity() != train.identity()


# ---------------------------------------------------------------- a test split from a fraction

NAMES = [f"{label}/{number}.png" for label in ("cat", "dog", "train") for number in range(60)]


def held_out(root: Path, **changes: object) -> set[str]:
    """The paths of the images that are held out for testing."""
    config = tiny_config(**{"dataset": str(root), "test_fraction": 0.2, **changes})
    layout = class_layout.find_layout(root, config.data, ("train", "test"))
    assert layout
    listings, _, _ = class_folders.read_folders(layout)
    sides = {role: {one.path for one in listing.images} for role, listing in listings.items()}
    assert not sides["train"] & sides["test"]
    return sides["test"]


def test_a_fraction_of_each_class_is_held_out_by_path_alone(tmp_path: Path) -> None:
    root = make(tmp_path / "one", *NAMES)
    held = held_out(root)
    for label in ("cat", "dog", "train"):  # a class may be called train
        assert 4 <= sum(path.startswith(label) for path in held) <= 21  # 12, within 3 deviations
    assert held_out(root, seed=7) == held
    other = make(tmp_path / "two", *reversed(NAMES))  # other images at the same paths
    assert held_out(other) == held
    assert held_out(root, test_fraction=0.4) > held


def test_images_that_are_added_move_no_other(tmp_path: Path) -> None:
    root = make(tmp_path / "set", *NAMES)
    held = held_out(root)
    added = [f"{label}/more/{number}.png" for label in ("cat", "eel") for number in range(90)]
    after = held_out(make(root, *added, **{path: 200 + i for i, path in enumerate(added)}))
    assert {path for path in after if path in NAMES} == held
    assert after > held


def test_copies_and_links_stay_on_one_side(tmp_path: Path) -> None:
    root = make(tmp_path / "set", *NAMES)
    held = held_out(root)
    for path in NAMES[:40]:
        (root / path.replace(".png", " (1).png")).write_bytes((root / path).read_bytes())
        (root / path.replace(".png", " link.png")).symlink_to(root / path)
    for _ in range(2):  # found, and kept
        after = held_out(root)
        assert {path for path in after if path in NAMES} == held
        for path in NAMES[:40]:
            for end in (" (1).png", " link.png"):
                assert (path.replace(".png", end) in after) == (path in held)


def test_a_class_of_two_images_has_one_on_each_side(tmp_path: Path) -> None:
    names = [f"{label}/{number}.png" for label in "abcdefgh" for number in range(2)]
    assert sorted(path[0] for path in held_out(make(tmp_path / "set", *names))) == [*"abcdefgh"]


def test_the_only_split_can_be_cut(tmp_path: Path) -> None:
    below = make(tmp_path / "one", *(f"train/{name}" for name in NAMES))
    found = read(str(below), test_fraction=0.2)
    assert found.classes == ("cat", "dog", "train")
    assert sum(counts(found)["train"]) + sum(counts(found)["test"]) == len(NAMES)
    config = tiny_config(dataset=str(below / "train"), test_split=".")
    every, _, _ = sources.read_test(config.data, Geometry(SIZE, SIZE))
    assert len(every) == len(NAMES)


def test_networks_can_be_evaluated_on_any_split(tmp_path: Path) -> None:
    root = make(tmp_path / "set", *splits("a", "b", images=3), "val/a/1.png")
    for split, count in (("train", 6), ("test", 6), ("val", 1)):
        config = tiny_config(dataset=str(root), test_split=split)
        images, classes, _ = sources.read_test(config.data, Geometry(SIZE, SIZE))
        assert (len(images), classes) == (count, ("a", "b"))
    unsplit = make(tmp_path / "unsplit", "a/1.png", "b/1.png")
    message = r"has no split 'test' \(it has: a, b\): choose another with --test-split \(. is all"
    with pytest.raises(UsageError, match=message):
        sources.read_test(tiny_config(dataset=str(unsplit)).data, Geometry(SIZE, SIZE))


def test_a_limit_reads_only_the_images_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make(tmp_path / "set", *splits("a", "b", images=40))
    whole = read(str(root), val_fraction=0.1)
    few = read(str(root), val_fraction=0.1, train_limit=10)
    assert few.train.images.shape[0] == 10 + 8 and len(few.train) == len(whole.train) == 80
    assert torch.equal(few.train.labels, whole.train.labels)
    rows = few.train.decoded
    assert rows is not None
    assert torch.equal(few.train.select(rows).images, whole.train.select(rows).images)
