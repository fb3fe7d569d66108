"""Decoding: pixel formats, the cache of decoded images, untrusted files."""

import io
import os
import pickle
import resource
import shutil
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from dml_accel.core.errors import UsageError
from dml_accel.core.host import cache_dir
from dml_accel.data import cache, decode
from tests.data.folders import SIZE, Write, png, read, split


def test_sixteen_bits_are_scaled_and_unknown_ranges_refused(parquet: Write) -> None:
    def grey(value: float, kind: type, form: str) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.full((SIZE, SIZE), value, kind)).save(buffer, form)
        return buffer.getvalue()

    images = [grey(257 * value, np.uint16, "PNG") for value in (3, 200)]
    found = read(parquet(train=split([0, 1], images), test=split([1])))
    assert found.train.images[:, 0, 0].tolist() == [[3] * 3, [200] * 3]
    folder = parquet(train=split([0], [grey(0.5, np.float32, "TIFF")]), test=split([1]))
    with pytest.raises(UsageError, match="image 0 of split 'train' .*pixels of mode F is unknown"):
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
    assert (image.int() - 90).abs().max() <= 16  # the palette has no such grey


# ---------------------------------------------------------------- the cache


def cached_files() -> list[Path]:
    return sorted(cache_dir().glob("*.safetensors"))


def test_images_are_decoded_once(parquet: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = parquet(train=split([0, 1]), test=split([2, 1]))
    first = read(folder)
    monkeypatch.setattr(decode, "decode", None)  # a second decoding would fail
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


def test_images_are_read_even_if_they_cannot_be_cached(
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


def test_a_full_disk_prevents_caching_but_not_the_run(
    parquet: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    assert len(read(parquet(train=split([0, 1, 1]), test=split([2]))).train) == 3
    assert "images are not cached: [Errno 28] No space" in capsys.readouterr().err
    assert not list(cache_dir().glob("*.tmp"))


def test_tables_kept_in_memory_are_not_mistaken_for_each_other(
    parquet: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 10**9)
    found = read(parquet(train=split([0, 1, 2]), test=split([2])))
    assert (len(found.train), len(found.test)) == (3, 1)


def test_the_cache_has_no_pickle_and_no_leftovers(parquet: Write) -> None:
    read(parquet(train=split([0, 1]), test=split([2, 1])))
    names = {path.suffix for path in cache_dir().iterdir()}
    assert names <= {".safetensors", ".lock", ".json"}


# ---------------------------------------------------------------- untrusted files


def forged(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises many."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_700, 20_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_without_decoding_it(parquet: Write, side: int) -> None:
    folder = parquet(train=split([0, 1], [png(1), forged(side, side)]), test=split([1]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match="image 1 of split 'train' cannot be read") as refusal:
        read(folder)
    assert "\n" not in str(refusal.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_row_cannot_name_a_file_outside_the_data_set(parquet: Write, tmp_path: Path) -> None:
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
        with pytest.raises(
            UsageError, match="cannot be read: the row names a file outside the data"
        ):
            read(folder)


@pytest.mark.parametrize("content", [b"", b"PAR1", pickle.dumps([1]), b"PAR1" + bytes(50)], ids=str)
def test_a_file_that_is_not_parquet_is_refused_in_one_line(parquet: Write, content: bytes) -> None:
    folder = parquet(train=split([0]), test=split([1]))
    (Path(folder) / "train-00000-of-00001.parquet").write_bytes(content)
    with pytest.raises(UsageError, match=f"--dataset {folder}") as refusal:
        read(folder)
    assert "\n" not in str(refusal.value)


def test_a_truncated_parquet_file_is_refused_in_one_line(parquet: Write) -> None:
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
def test_columns_of_wrong_types_are_refused_in_one_line(parquet: Write, column: list) -> None:
    folder = parquet(train=split([0]), test=split([1]))
    target = f"{folder}/train-00000-of-00001.parquet"
    described = pyarrow.parquet.read_schema(target).metadata
    table = pyarrow.table({"img": column, "fine_label": ["x", "y"], "coarse_label": [0.5, 1.5]})
    pyarrow.parquet.write_table(table.replace_schema_metadata(described), target)
    with pytest.raises(UsageError) as refusal:
        read(folder)
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------- caches of other files


def fill(root: Path, values: dict[str, int]) -> None:
    for place, value in values.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(png(value))
        os.utime(root / place, ns=(10**18, 10**18))


BEFORE = {"train/a/0.png": 10, "train/b/0.png": 20, "test/a/0.png": 30, "test/b/0.png": 40}


@pytest.mark.parametrize("by", ["writing", "renaming", "exchanging"])
def test_a_cache_is_not_used_for_other_files_of_the_same_name_size_and_time(
    tmp_path: Path, by: str
) -> None:
    root = tmp_path / "set"
    fill(root, BEFORE)
    sizes = {path: (root / path).stat().st_size for path in BEFORE}
    assert read(str(root)).train.images[:, 0, 0, 0].tolist() == [10, 20]
    after = {"train/a/0.png": 20, "train/b/0.png": 10}
    if by == "writing":
        fill(root, after)
    elif by == "renaming":
        fill(tmp_path / "new", after)
        for path in after:
            (tmp_path / "new" / path).rename(root / path)
    else:
        (root / "train/a").rename(root / "train/c")
        (root / "train/b").rename(root / "train/a")
        (root / "train/c").rename(root / "train/b")
    assert {path: (root / path).stat().st_size for path in BEFORE} == sizes
    assert read(str(root)).train.images[:, 0, 0, 0].tolist() == [20, 10]
    assert read(str(root)).train.images[:, 0, 0, 0].tolist() == [20, 10]


def test_equal_files_are_not_decoded_again_whatever_the_file_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "set"
    fill(root, BEFORE)
    first = read(str(root))
    shutil.copytree(root, tmp_path / "copy")
    shutil.rmtree(root)
    (tmp_path / "copy").rename(root)  # the same names, sizes and times, but other inodes
    for path in BEFORE:
        os.utime(root / path, ns=(10**18, 10**18))
    monkeypatch.setattr(decode, "decode", None)  # decoding would fail
    assert read(str(root)).fingerprint == first.fingerprint


def test_tables_of_a_folder_are_made_again_for_other_files_of_the_same_name_size_and_time(
    parquet: Write,
) -> None:
    folder = parquet(train=split([0, 1], [png(10), png(20)]), test=split([1]))
    file = Path(folder) / "train-00000-of-00001.parquet"
    os.utime(file, ns=(10**18, 10**18))
    size = file.stat().st_size
    assert read(folder).train.images[:, 0, 0, 0].tolist() == [10, 20]
    parquet(train=split([0, 1], [png(20), png(10)]))
    os.utime(file, ns=(10**18, 10**18))
    assert file.stat().st_size == size
    assert read(folder).train.images[:, 0, 0, 0].tolist() == [20, 10]


def test_tables_behind_links_are_compared_as_well(tmp_path: Path) -> None:
    def save(shift: int) -> None:
        for name, labels in (("train", [0, 1]), ("test", [1])):
            images = [png(10 * label + shift) for label in labels]
            split(labels, images).save_to_disk(tmp_path / "disk" / name)

    save(10)
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for name in ("train", "test"):
        (folder / name).symlink_to(tmp_path / "disk" / name)
    assert read(str(folder)).train.images[:, 0, 0, 0].tolist() == [10, 20]
    shutil.rmtree(tmp_path / "disk")
    save(50)
    assert read(str(folder)).train.images[:, 0, 0, 0].tolist() == [50, 60]


def test_two_folders_of_one_name_are_not_taken_for_each_other(
    parquet: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Path(parquet(train=split([0, 1]), test=split([2]))).rename(tmp_path / "one")
    two = Path(parquet(train=split([1, 0]), test=split([2]))).rename(tmp_path / "two")
    for there, folder in (("x1", one), ("x2", two)):
        (tmp_path / there).mkdir()
        folder.rename(tmp_path / there / "pictures")
    for there, labels in (("x1", [0, 1]), ("x2", [1, 0]), ("x1", [0, 1])):
        monkeypatch.chdir(tmp_path / there)
        assert read("pictures").train.labels.tolist() == labels
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="there is no folder .*/pictures, and the hub cannot be"):
        read("pictures")
