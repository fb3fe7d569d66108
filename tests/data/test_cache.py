"""The first pass over images: interrupted, in workers, with bad images; and the cache's limit."""

import dataclasses
import hashlib
import io
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dml_accel.core.errors import UsageError
from dml_accel.core.locks import Lock
from dml_accel.data import cache, decode, kept, parts
from dml_accel.data.class_folders import FolderListing
from dml_accel.data.listing import StoredFiles
from dml_accel.data.pixels import Geometry
from tests.helpers import launched, wait_until

SIZE, IMAGES, CLASSES = 16, 10, ("cat", "dog")
SQUARE = Geometry(SIZE, SIZE)
PART = 4  # images


@dataclasses.dataclass(frozen=True)
class Counted(FolderListing):
    """Notes which rows are read; may fail at one."""

    reads: list[int] = dataclasses.field(default_factory=list)
    fails_at: int = -1

    def content(self, row: int) -> bytes:
        if row == self.fails_at:
            raise KeyboardInterrupt
        self.reads.append(row)
        return super().content(row)


def image(value: int, grey: bool = False) -> bytes:
    """An image of noise, 20 x 18; grey has 16 bits."""
    noise = np.random.default_rng(value)
    shape, kind = ((18, 20), np.uint16) if grey else ((18, 20, 3), np.uint8)
    buffer = io.BytesIO()
    most = value if grey else 255
    Image.fromarray(noise.integers(0, most + 1, shape).astype(kind)).save(buffer, "PNG")
    return buffer.getvalue()


def listed(root: Path, fails_at: int = -1) -> Counted:
    """The images of a folder; those of even rows are cats."""
    paths = sorted(path.name for path in root.iterdir())
    files = StoredFiles.of((path, (root / path).stat()) for path in paths)
    labels = torch.arange(len(files)) % 2
    return Counted(
        split="train", labels=labels, key=(str(root),), root=root, images=files, fails_at=fails_at
    )


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of ten images, an empty cache, and parts of four images in pieces of two."""
    folder = tmp_path / "set"
    folder.mkdir()
    for row in range(IMAGES):
        (folder / f"{row}.png").write_bytes(image(row))
    monkeypatch.setenv("DML_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(parts, "PART_BYTES", PART * SIZE * SIZE * 3)
    monkeypatch.setattr(decode, "_PIECE", 2)
    return folder


def interrupted(root: Path, at: int = 7, **options: object) -> None:
    with pytest.raises(KeyboardInterrupt):
        decode.decoded(listed(root, fails_at=at), None, SQUARE, **options)


def assert_equal(one: cache.Decoded, other: cache.Decoded) -> None:
    for name, value in vars(one).items():
        theirs = getattr(other, name)
        same = torch.equal(value, theirs) if isinstance(value, torch.Tensor) else value == theirs
        assert same, name


def files_in(folder: Path, pattern: str) -> list[Path]:
    return sorted((folder.parent / "cache").glob(pattern))


# ---------------------------------------------------------------- parts


def test_decoding_goes_on_where_it_was_interrupted(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = decode.decode(listed(root), range(IMAGES), SQUARE)
    interrupted(root)
    assert "the next start goes on there" in capsys.readouterr().err
    again = listed(root)
    assert_equal(decode.decoded(again, None, SQUARE), whole)
    assert again.reads == list(range(PART, IMAGES))
    assert "4 of them are already" in capsys.readouterr().err
    assert len(files_in(root, "*.safetensors")) == 1 and not files_in(root, "*.parts")
    third = listed(root)
    assert_equal(decode.decoded(third, None, SQUARE), whole)
    assert third.reads == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def replace(path: Path) -> None:
    """Put a file in a part's place that differs in nothing but its number."""
    row = path.parent.parent.parent / "set" / "2.png"
    before = row.stat()
    shutil.copy2(row, row.with_suffix(".new"))
    row.with_suffix(".new").rename(row)
    os.utime(row, ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert row.stat().st_ino != before.st_ino


@pytest.mark.parametrize(
    ("spoil", "geometry", "is_used"),
    [
        (None, SQUARE, True),
        (flip, SQUARE, False),
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), SQUARE, False),
        (lambda path: path.write_bytes(b"junk"), SQUARE, False),
        (lambda path: path.unlink(), SQUARE, False),
        (replace, SQUARE, False),
        (None, Geometry(8, 8), False),
        (None, Geometry(SIZE, 17), False),
        (None, Geometry(SIZE, SIZE, "squash"), False),
    ],
    ids="whole flipped truncated foreign gone replaced size resize mode".split(),
)
def test_a_part_is_used_for_what_it_was_made_of_only(
    root: Path, spoil: Callable[[Path], None] | None, geometry: Geometry, is_used: bool
) -> None:
    interrupted(root)
    (part,) = files_in(root, "*.parts/*.safetensors")
    if spoil:
        spoil(part)
    again = listed(root)
    found = decode.decoded(again, None, geometry)
    assert again.reads == list(range(PART if is_used else 0, IMAGES))
    assert_equal(found, decode.decode(listed(root), range(IMAGES), geometry))


def test_grey_images_of_all_parts_get_one_depth(root: Path) -> None:
    for row, most in ((1, 900), (6, 4000), (8, 60)):  # of 10, 12 and 8 bits
        (root / f"{row}.png").write_bytes(image(most, grey=True))
    whole = decode.decode(listed(root), range(IMAGES), SQUARE)
    given = decode.decode(listed(root), range(IMAGES), SQUARE, grey_bits=12)
    assert whole.grey_bits == 12 and torch.equal(whole.images, given.images)
    interrupted(root)
    assert_equal(decode.decoded(listed(root), None, SQUARE), whole)


def test_bad_images_of_all_parts_are_named_together(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for row in (1, 9):
        (root / f"{row}.png").write_bytes(b"no image")
    interrupted(root)
    with pytest.raises(decode.DamagedImagesError) as error:
        decode.decoded(listed(root), None, SQUARE)
    assert [one.row for one in error.value.damage] == [1, 9]
    # What could be read is kept, for a start that does without the others.
    again = listed(root)
    found = decode.decoded(again, None, SQUARE, skips=True)
    assert found.unread.tolist() == [1, 9] == again.reads


def test_workers_decode_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "1.png").write_bytes(image(900, grey=True))
    (root / "6.png").write_bytes(image(4000, grey=True))
    (root / "5.png").write_bytes(b"no image")
    here = decode.decode(listed(root), range(IMAGES), SQUARE, skips=True)
    monkeypatch.setattr(decode, "FEWEST_FOR_WORKERS", 0)
    monkeypatch.setattr(decode, "cores", lambda: 2)
    again = listed(root)
    assert_equal(decode.decode(again, range(IMAGES), SQUARE, skips=True), here)
    assert again.reads == [1]  # once more, alone, for its depth; the others were read elsewhere


def test_a_full_disk_ends_the_parts_but_not_the_pass(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parts, "save_file", full)
    whole = decode.decode(listed(root), range(IMAGES), SQUARE)
    assert_equal(decode.decoded(listed(root), None, SQUARE), whole)
    assert capsys.readouterr().err.count("No space left") == 1


SLOWLY = """
import sys, time
from pathlib import Path
from dml_accel.data import decode, parts
from tests.data import test_cache

class Slow(test_cache.Counted):
    def content(self, row):
        time.sleep(0.04)
        return super().content(row)

parts.PART_BYTES, decode._PIECE, decode.FEWEST_FOR_WORKERS = 10 * 16 * 16 * 3, 5, 0
decode.cores = lambda: 2
listing = Slow(**vars(test_cache.listed(Path(sys.argv[1]))))
decode.decoded(listing, None, test_cache.SQUARE)
"""


def test_a_killed_process_leaves_parts_to_go_on_with(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for row in range(IMAGES, 100):
        (root / f"{row}.png").write_bytes(image(row))
    words = [sys.executable, "-c", SLOWLY, str(root)]
    with launched(*words) as process:
        wait_until(lambda: len(files_in(root, "*.parts/0*.safetensors")) >= 3, process)
        process.send_signal(signal.SIGKILL)
    done = len(files_in(root, "*.parts/0*.safetensors"))
    assert not files_in(root, "*.safetensors") and 3 <= done < 10
    monkeypatch.setattr(parts, "PART_BYTES", 10 * SIZE * SIZE * 3)
    again = listed(root)
    found = decode.decoded(again, None, SQUARE)
    assert again.reads == list(range(10 * done, 100))
    assert_equal(found, decode.decode(listed(root), range(100), SQUARE))


# ---------------------------------------------------------------- images that cannot be read


@pytest.mark.parametrize(
    ("bad", "rows", "stands_in"),
    [
        ([2], None, {2: 4}),
        ([8], None, {8: 0}),  # the next one of its class is the first
        ([2, 4], None, {2: 6, 4: 6}),
        ([0, 2, 4, 6], None, {0: 8, 2: 8, 4: 8, 6: 8}),
        ([2, 4], [1, 2, 3], {2: 6}),  # it is not among those that are decoded
    ],
)
def test_the_next_readable_image_of_its_class_stands_in_for_a_bad_one(
    root: Path, bad: list[int], rows: list[int] | None, stands_in: dict[int, int]
) -> None:
    whole = decode.decode(listed(root), range(IMAGES), SQUARE)
    for row in bad:
        (root / f"{row}.png").write_bytes(b"no image")
    chosen = None if rows is None else torch.tensor(rows)
    found = decode.decoded(listed(root), chosen, SQUARE, skips=True)
    assert found.unread.tolist() == [row for row in bad if rows is None or row in rows]
    for place, row in enumerate(rows or range(IMAGES)):
        assert torch.equal(found.images[place], whole.images[stands_in.get(row, row)])
    again = listed(root)
    assert_equal(decode.decoded(again, chosen, SQUARE, skips=True), found)
    assert again.reads == []
    with pytest.raises(decode.DamagedImagesError):  # what is kept is not for a run that refuses
        decode.decoded(listed(root), chosen, SQUARE)


def test_what_stands_in_has_the_depth_of_the_split(root: Path) -> None:
    (root / "2.png").write_bytes(b"no image")
    (root / "4.png").write_bytes(image(900, grey=True))  # of 10 bits, which stands in
    (root / "5.png").write_bytes(image(4000, grey=True))  # of 12
    found = decode.decode(listed(root), range(IMAGES), SQUARE, skips=True)
    assert found.grey_bits == 12 and torch.equal(found.images[2], found.images[4])


def test_a_class_without_any_readable_image_is_refused(root: Path) -> None:
    for row in range(1, IMAGES, 2):
        (root / f"{row}.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="no image of class 'dog' in split 'train' can be read"):
        decode.decoded(listed(root), None, SQUARE, skips=True, classes=CLASSES)


def test_an_image_that_can_be_reached_again_is_decoded(root: Path) -> None:
    (root / "4.png").rename(root.parent / "4.png")
    (root / "4.png").symlink_to("/proc/self/mem")  # a file that is there, and cannot be read
    listing = listed(root)
    found = decode.decoded(listing, None, SQUARE, skips=True)
    assert found.unread.tolist() == [4]
    known = hashlib.sha256(b"").digest()[:8]
    assert found.contents[4] != int(np.frombuffer(known, np.int64)[0])
    (root / "4.png").unlink()
    (root.parent / "4.png").rename(root / "4.png")
    found = decode.decoded(listing, None, SQUARE, skips=True)
    assert found.unread.tolist() == []


# ---------------------------------------------------------------- the limit


def test_sizes_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"0": 0, "5GB": 5 * 10**9, " 1.5 tb": 1.5e12, "2GiB": 2**31, "300": 300, "7kB": 7000}
    assert {text: kept.size_of(text, "x") for text in sizes} == sizes
    monkeypatch.delenv("DML_CACHE_LIMIT", raising=False)
    assert kept.limit() == 50 * 10**9
    for text in ("-1", "GB", "5 apples", "1e3", "\u0665GB"):
        monkeypatch.setenv("DML_CACHE_LIMIT", text)
        with pytest.raises(UsageError, match="DML_CACHE_LIMIT is .*; write a size, as 20GB"):
            kept.limit()


STORED = IMAGES * SIZE * SIZE * 3


def keep(folder: Path, name: str, used: float) -> str:
    """Keep a set of its own; return its name in the cache."""
    other = folder.parent / name
    shutil.copytree(folder, other)
    before = set(files_in(folder, "*.safetensors"))
    decode.decoded(listed(other), None, SQUARE, dataset=name)
    (new,) = set(files_in(folder, "*.safetensors")) - before
    os.utime(new.with_suffix(".json"), (used, used))
    return new.stem


def names_kept(folder: Path) -> set[str]:
    return {path.stem for path in files_in(folder, "*.safetensors")}


def test_the_least_recently_used_sets_make_room(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, third = (keep(root, f"set-{n}", 1000.0 + n) for n in range(3))
    decode.decoded(listed(root.parent / "set-0"), None, SQUARE)  # it is used again
    monkeypatch.setenv("DML_CACHE_LIMIT", str(int(3.5 * STORED)))
    fourth = keep(root, "set-3", time.time() + 9)
    assert names_kept(root) == {first, third, fourth}
    with kept.open_lock(root.parent / "cache" / f"{third}.lock", wait=False) as state:
        assert state is Lock.OURS  # another process uses it
        fifth = keep(root, "set-4", time.time() + 9)
    assert names_kept(root) == {third, fourth, fifth}
    assert {path.stem for path in files_in(root, "*.lock")} == names_kept(root)
    sets, _ = kept.kept(root.parent / "cache")
    assert (sets[0].name, sets[0].dataset) == (third, "set-2")
    assert sum(one.stored for one in sets) <= 3.5 * STORED


@pytest.mark.parametrize(
    ("limit", "said"),
    [("0", ""), ("1KB", "images are not cached: they are 0.00 GB, and DML_CACHE_LIMIT is 0.00 GB")],
)
def test_what_is_above_the_limit_is_not_kept(
    root: Path,
    limit: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DML_CACHE_LIMIT", limit)
    decode.decoded(listed(root), None, SQUARE)
    assert not files_in(root, "*.safetensors") and not files_in(root, "*.parts")
    assert ("not cached" in (err := capsys.readouterr().err)) is bool(said) and said in err


def test_what_is_kept_is_described(root: Path) -> None:
    folder = root.parent / "cache"
    complete = keep(root, "set-0", 1000.0)
    interrupted(root, dataset="/photos")
    images = {"images": torch.zeros(3, 8, 8, 3, dtype=torch.uint8)}
    save_file(images, folder / f"{1:016x}.safetensors", metadata={"sha256": "x"})
    (folder / f"{2:016x}.safetensors").write_bytes(b"junk")
    (folder / f".{3:016x}.safetensors.tmp").write_bytes(b"half")
    (folder / f"{4:016x}.copies.json").write_bytes(b"{}")
    (folder / "costs.json").write_bytes(b"{}")
    sets, others = kept.kept(folder)
    found = {one.name: (one.state, one.dataset, one.split, one.images, one.size) for one in sets}
    (part,) = files_in(root, "*.parts")
    assert found == {
        complete: ("complete", "set-0", "train", IMAGES, SIZE),
        part.stem: ("unfinished", "/photos", "train", IMAGES, SIZE),
        f"{1:016x}": ("old version", "", "", 3, 8),
        f"{2:016x}": ("damaged", "", "", 0, 0),
        f"{3:016x}": ("unfinished", "", "", 0, 0),
    }
    assert others == 4
    for name in found:
        assert kept.remove(folder, name)
    assert sorted(path.name for path in folder.iterdir()) == [f"{4:016x}.copies.json", "costs.json"]
