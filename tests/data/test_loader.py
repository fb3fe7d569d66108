"""Both feeds give a run the same bytes, whatever the recipe and however many workers read."""

import contextlib
import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dml_accel.core.errors import UsageError
from dml_accel.data import feeds, images, sources, survey
from dml_accel.data.batches import ImageFormat
from dml_accel.data.images import Data, Reading
from dml_accel.data.workers import Results, WorkerLostError
from tests.helpers import tiny_config

SIZE, BATCH = 16, 4
FORMAT = ImageFormat(SIZE, torch.float32, torch.contiguous_format, torch.device("cpu"))
GREY, DAMAGED = "train/a/05.png", ("train/a/02.jpg", "test/b/01.jpg", "train/b/07.jpg")


def picture(seed: int) -> Image.Image:
    """Smooth noise whose sides depend on the seed."""
    draw = np.random.default_rng(seed)
    small = draw.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    sides = (int(draw.integers(20, 40)), int(draw.integers(20, 40)))
    return Image.fromarray(small).resize(sides, Image.Resampling.BICUBIC)


def photographs(root: Path, val: bool = False) -> Path:
    """Two classes of JPEGs of varying sizes; some turned by EXIF, and one of 16-bit grey."""
    for side, count in (("train", 10), ("test", 3), *([("val", 2)] if val else [])):
        for label in "ab":
            (root / side / label).mkdir(parents=True)
            for number in range(count):
                exif = Image.Exif()
                exif[0x0112] = 6 if number % 3 == 1 else 1
                seed = hash((number, len(side), ord(label))) % 2**31
                picture(seed).save(root / side / label / f"{number:02}.jpg", exif=exif)
    (root / GREY).with_suffix(".jpg").unlink()
    levels = np.random.default_rng(0).integers(0, 4096, (30, 25)).astype(np.uint16)
    Image.fromarray(levels).save(root / GREY)
    return root


def damage(root: Path, *names: str) -> None:
    """Cut files off, so that they cannot be read."""
    for name in names:
        (root / name).write_bytes((root / name).read_bytes()[:150])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def with_val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("with-val"), val=True)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = photographs(tmp_path_factory.mktemp("damaged"))
    damage(root, *DAMAGED)
    return root


def prepared(root: Path, feed: str, workers: int = 0, on: str = "auto", **changes: object) -> Data:
    """The images of a run, by one of the feeds."""
    settings = {"dataset": str(root), "image_size": SIZE, "feed": feed, "workers": workers}
    config = tiny_config(**(settings | changes))
    source = sources.read(config.data, True, None, config.compute)
    return images.prepare(source, config.data, 7, FORMAT, Reading(workers, on))


Found = list[torch.Tensor]


def shown(data: Data, parts: int = 1, steps: int = 6) -> Found:
    """All that a run is shown: normalisation, batches of more than an epoch, evaluations."""
    per_step = [(BATCH * i // parts, BATCH * (i + 1) // parts) for i in range(parts)]
    found = [torch.tensor([data.normalisation.mean, data.normalisation.std])]
    requests = [(step, *part) for step in range(steps) for part in per_step]
    data.train.begin(BATCH, requests, parts)
    try:
        for step in range(steps):
            batches = [data.train.batch(step, BATCH, *part) for part in per_step]
            found += [torch.cat(one) for one in zip(*batches, strict=True)]
    finally:
        data.train.close()
    for split in data.evaluated:
        for x, y in split.in_order([(0, 1), (1, len(split))]):
            found += [x[y >= 0], y]
    return found


def assert_same(one: Found, other: Found) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


RECIPES: dict[str, dict[str, object]] = {
    "crop-flip": {},
    "randaugment": {"augment": ("crop-flip", "randaugment")},
    "erasing": {"augment": ("flip", "erasing[p=1]")},
    "random-resized-crop": {"augment": ("random-resized-crop", "flip")},
    "mixed": {"mixup": 1.0, "cutmix": 1.0},
    "val fraction": {"val_fraction": 0.3, "augment": ("random-resized-crop",)},
    "train limit": {"train_limit": 10, "val_fraction": 0.2},
    "squash": {"crop_mode": "squash"},
    "resize": {"eval_resize": 20},
    "given mean and deviation": {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)},
}


@pytest.mark.parametrize("name", RECIPES)
def test_both_feeds_give_the_same_bytes(photos: Path, name: str) -> None:
    found = [shown(prepared(photos, feed, **RECIPES[name])) for feed in ("memory", "loader")]
    assert_same(*found)
    assert found[0][1].std() > 0.1  # not blank


def test_a_split_for_validation_is_the_same_from_both_feeds(with_val: Path) -> None:
    data = [prepared(with_val, feed) for feed in ("memory", "loader")]
    assert [len(one.val or ()) for one in data] == [4, 4]
    assert_same(*map(shown, data))


def test_squares_of_the_right_size_are_the_same_from_both_feeds(tmp_path: Path) -> None:
    for side in ("train", "test"):
        for label in "ab":
            (tmp_path / side / label).mkdir(parents=True)
            for number in range(4):
                square = picture(number + 50).resize((SIZE, SIZE))
                square.save(tmp_path / side / label / f"{number}.png")
    words = {"augment": ("random-resized-crop", "flip")}
    assert_same(*(shown(prepared(tmp_path, feed, **words)) for feed in ("memory", "loader")))


@pytest.mark.parametrize("augment", [("crop-flip",), ("random-resized-crop",)])
def test_both_feeds_skip_the_same_images(damaged: Path, augment: tuple[str, ...]) -> None:
    words = {"bad_images": "skip", "val_fraction": 0.3, "augment": augment}
    data = [prepared(damaged, feed, **words) for feed in ("memory", "loader")]
    found = [shown(one) for one in data]
    assert_same(*found)
    bad = sum(int((labels < 0).sum()) for labels in found[0][1:] if labels.dtype == torch.int64)
    assert bad == 2  # one of the test images, and one of those for validation; none is trained on
    assert {one.place for one in data[1].damage} == {str(damaged / name) for name in DAMAGED}
    with pytest.raises(UsageError, match="cannot be read"):
        prepared(damaged, "memory", augment=augment)


def test_any_number_of_workers_and_parts_gives_the_same_batches(photos: Path) -> None:
    words = {"augment": ("random-resized-crop", "randaugment"), "mixup": 0.5}
    whole = shown(prepared(photos, "loader", **words))
    assert_same(whole, shown(prepared(photos, "loader", 1, **words), parts=2))
    assert_same(whole, shown(prepared(photos, "loader", 3, **words), parts=4))
    # Without being told before, too.
    batch = prepared(photos, "loader", **words).train.batch(2, BATCH, 0, BATCH)
    assert_same(whole[5:7], list(batch))


def test_images_on_the_host_are_the_same(photos: Path) -> None:
    assert_same(shown(prepared(photos, "memory")), shown(prepared(photos, "memory", on="host")))


def test_large_sets_are_measured_on_some_images_once(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "MEASURED", 5)
    monkeypatch.setattr(survey, "SMALL_IMAGES", 8)
    (photos / GREY).touch()
    few = [prepared(photos, feed).normalisation for feed in ("memory", "loader")]
    assert few[0] == few[1]
    monkeypatch.setattr(survey, "_measure", None)  # what was measured is kept
    assert prepared(photos, "loader").normalisation == few[0]
    monkeypatch.setattr(survey, "MEASURED", 10_000)
    assert prepared(photos, "memory").normalisation != few[0]


def test_the_feed_follows_from_the_memory_of_the_machine(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for memory in (2**40, 1000):
        monkeypatch.setattr(feeds, "machine_memory", lambda memory=memory: memory)
        config = tiny_config(dataset=str(photos), image_size=SIZE, workers=0)
        source = sources.read(config.data, True, None, config.compute)
        found.append(source.feed[0])
        assert "MiB of" in source.feed[1]
        assert source.feed[1] in sources.describe(config.data, source)
    assert found == ["memory", "loader"]


def test_the_loader_is_refused_where_there_are_no_files() -> None:
    config = tiny_config(feed="loader")
    with pytest.raises(UsageError, match="--feed loader has no effect with --dataset digits"):
        sources.read(config.data, True, None, config.compute)


# ---------------------------------------------------------------- workers


def _pid(_: int) -> int:
    return os.getpid()


def _requests() -> Iterator[int]:
    yield from range(1000)


def test_a_killed_worker_is_named_and_takes_the_others_along() -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    with Results(_pid, _requests(), workers=2) as results:
        pids = {next(results) for _ in range(4)}
        assert len(pids) == 2 and signal.getsignal(signal.SIGCHLD) is handler
        os.kill(min(pids), signal.SIGKILL)
        with pytest.raises(WorkerLostError, match="was killed.*fewer --workers"):
            list(results)
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(5)
    assert not any(map(psutil.pid_exists, pids))


def test_workers_do_not_stop_with_a_terminal() -> None:
    with Results(_pid, _requests(), workers=1) as results:
        pid = next(results)
        for one in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, one)
        assert [next(results) for _ in range(20)] == [pid] * 20


def test_little_shared_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = psutil.disk_usage("/")
    monkeypatch.setattr(psutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(UsageError, match="--workers 2 need .* of shared memory.*--shm-size"):
        Results(_pid, _requests(), workers=2, result_bytes=2**20)


def test_an_image_that_turns_bad_is_known_before_its_batch(tmp_path: Path) -> None:
    root = photographs(tmp_path / "photos")
    data = prepared(root, "loader")
    order = list(range(5))
    data.train.begin(BATCH, [(step, 0, BATCH) for step in order])
    assert not data.train.meets_damage
    for path in (root / "train").rglob("*.*"):
        path.write_bytes(io.BytesIO(b"no image").read())
    data.train.batch(0, BATCH, 0, BATCH)  # was read before
    assert data.train.meets_damage and data.train.damage
    with pytest.raises(UsageError, match="cannot be read"):
        data.train.batch(1, BATCH, 0, BATCH)
