"""Where the two feeds could differ: originals, grey of 16 bits, stand-ins; and room for workers."""

from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dml_accel.core.errors import UsageError
from dml_accel.data import images, pictures, sources, survey
from dml_accel.data.workers import Flight, plan_flight
from tests.data.test_loader import SIZE, assert_same, damage, photographs, prepared, shown
from tests.helpers import tiny_config


def squares(root: Path, deep: str = "") -> Path:
    """Two classes of squares of the size that networks are given; some of 16-bit grey."""
    draw = np.random.default_rng(1)
    for side in ("train", "test"):
        for label in "ab":
            (root / side / label).mkdir(parents=True)
            for number in range(6):
                path = root / side / label / f"{number}.png"
                if side in deep and number < 3:
                    most = 10 ** (number + 2)  # 100, 1,000 and 10,000: each has a depth of its own
                    levels = draw.integers(0, most, (SIZE, SIZE)).astype(np.uint16)
                else:
                    levels = draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
                Image.fromarray(levels).save(path)
    return root


@pytest.mark.parametrize(
    ("deep", "changes"),
    [
        ("", {"augment": ("random-resized-crop", "flip")}),
        ("", {"augment": ("random-resized-crop", "flip"), "eval_resize": 20}),
        ("test", {"augment": ("crop-flip",)}),
        ("train test", {"augment": ("crop-flip",)}),
        ("train", {"augment": ("none",), "val_fraction": 0.25}),
    ],
    ids=str,
)
def test_squares_and_grey_are_the_same_by_both_feeds(
    tmp_path: Path, deep: str, changes: dict[str, object]
) -> None:
    root = squares(tmp_path / "squares", deep)
    memory, loader = (shown(prepared(root, feed, **changes)) for feed in ("memory", "loader"))
    assert_same(memory, loader)


def test_grey_that_few_images_have_is_the_same_by_both_feeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of many images some are measured: those of 16 bits may or may not be among them.
    monkeypatch.setattr(survey, "MEASURED", 5)
    monkeypatch.setattr(survey, "SMALL_IMAGES", 8)
    for number, deep in enumerate(("train", "")):
        root = squares(tmp_path / str(number), deep)
        if not deep:
            levels = np.full((SIZE, SIZE), 4000, np.uint16)
            Image.fromarray(levels).save(root / "train/a/0.png")
        kept = [prepared(root, feed, augment=("flip",)) for feed in ("memory", "loader")]
        assert_same(*map(shown, kept))


@pytest.mark.parametrize("feed", ["memory", "loader"])
def test_no_held_out_image_is_trained_on_in_the_place_of_a_bad_one(
    tmp_path: Path, feed: str
) -> None:
    root = photographs(tmp_path / "photos")
    settings = {"dataset": str(root), "image_size": SIZE, "feed": feed, "workers": 0}
    config = tiny_config(**settings, val_fraction=0.4, bad_images="skip", augment=("none",))
    train, val = images.split_training(
        sources.read(config.data, True, None, config.compute), config.data
    )
    assert val is not None
    listed = sources.list_images(config.data, True)
    assert listed is not None
    rows, held = images.training_rows(listed.splits["train"].labels, config.data)
    assert held is not None
    # The image after it in its class is held out.
    bad = next(row for row in rows.tolist() if row + 1 in held.tolist())
    damage(root, listed.splits["train"].place(bad).removeprefix(f"{root}/"))
    found = sources.read(config.data, True, None, config.compute)
    train, val = images.split_training(found, config.data)
    assert val is not None
    place = rows.tolist().index(bad)
    if feed == "memory":
        shown_there, others = train.held[place], val.held
        trained = torch.cat([train.held[:place], train.held[place + 1 :]])
    else:
        made = [one.images for one in (train, val)]
        assert all(isinstance(one, pictures.Pictures) for one in made)
        levels = [
            torch.stack([torch.from_numpy(np.array(one.read(n).levels)) for n in range(len(one))])
            for one in made
        ]
        shown_there, others = levels[0][place], levels[1]
        trained = torch.cat([levels[0][:place], levels[0][place + 1 :]])
    assert any(torch.equal(shown_there, one) for one in trained)
    assert not any(torch.equal(shown_there, one) for one in others)


def test_workers_are_given_less_at_a_time_where_shared_memory_is_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = psutil.disk_usage("/")

    def has(free: int) -> None:
        monkeypatch.setattr(psutil, "disk_usage", lambda _: usage._replace(free=free))

    has(2**40)
    assert plan_flight(64, 100, 2) == Flight(32, 2)
    assert plan_flight(256, 100, 8) == Flight(8, 8)  # two reads of 32 pieces, by 8 workers
    has(4 * 8 * 100 * 3 * 4)  # one part in four is ours: room for 4 images, three times a worker
    assert plan_flight(256, 100, 8) == Flight(4, 2)
    has(8 * 100)
    with pytest.raises(UsageError, match="--workers 8 need .* MiB of shared memory"):
        plan_flight(256, 100, 8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images_on": "host", "feed": "loader"}, "--images-on host has no effect with --feed"),
        ({"images_on": "device", "augment": ("randaugment",)}, "--images-on device cannot be had"),
    ],
    ids=str,
)
def test_what_a_feed_does_not_have_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        tiny_config(**changes)
