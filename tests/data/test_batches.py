"""Batches: augmentation as in the paper, keyed per image and epoch; the validation split."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from dml_accel.core.errors import UsageError
from dml_accel.data.batches import (
    ImageFormat,
    ImageSet,
    Normalisation,
    PixelSet,
    TensorSet,
    slices,
)
from dml_accel.data.images import Data, check_batch_size, prepare, split_training
from dml_accel.data.selection import training_sizes
from dml_accel.data.sources import Source
from dml_accel.data.splits import Split
from tests.helpers import tiny_config

N, S, B = 103, 16, 10
PER_EPOCH = N // B
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def split() -> Split:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N, S, S, 3), generator=g, dtype=torch.uint8)
    return Split(images, torch.randint(0, 5, (N,), generator=g))


def image_set(split: Split, augment: str = "crop-flip", seed: int = 7) -> PixelSet:
    normalisation = Normalisation.of(split.images)
    return PixelSet(
        split, normalisation, augment=(augment,), seed=seed, device=CPU, dtype=torch.float64
    )


def prepared(source: Source, memory_format: torch.memory_format, **changes: object) -> Data:
    images = ImageFormat(16, torch.float64, memory_format, CPU)
    return prepare(source, tiny_config(**changes).data, 0, images)


def rows_of(images: ImageSet, batch: torch.Tensor, split: Split) -> list[int]:
    """Find which stored images an unaugmented batch holds."""
    everything = images.rows(0, len(split))[0].flatten(1)
    return [int((everything == x).all(1).nonzero()) for x in batch.flatten(1)]


def test_normalisation_is_the_training_images_mean_and_deviation(split: Split) -> None:
    scaled = split.images.double() / 255
    found = Normalisation.of(split.images)
    expected = torch.std_mean(scaled, dim=(0, 1, 2), correction=0)
    torch.testing.assert_close(torch.tensor(found.std).double(), expected[0])
    torch.testing.assert_close(torch.tensor(found.mean).double(), expected[1])


def test_a_constant_channel_stays_finite() -> None:
    images = torch.zeros(4, S, S, 3, dtype=torch.uint8)
    assert Normalisation.of(images).std == (1.0, 1.0, 1.0)


def test_evaluation_rows_are_the_stored_images_normalised(split: Split) -> None:
    images = image_set(split)
    found, labels = images.rows(90, 200)
    mean, std = (torch.tensor(v).double() for v in vars(Normalisation.of(split.images)).values())
    expected = ((split.images[90:].double() / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected)
    assert torch.equal(labels, split.labels[90:])


def test_crops_are_windows_of_the_reflect_padded_image(split: Split) -> None:
    # Every training image must be one of the (2 * 2 + 1)^2 windows, or of their mirror images.
    images = image_set(split)
    plain = images.rows(0, N)[0]
    padded = F.pad(plain, (2, 2, 2, 2), mode="reflect")
    offsets, flips = set(), 0
    for step in range(PER_EPOCH):
        for x, label in zip(*images.batch(step, B, 0, B), strict=True):
            found = [
                (row, top, left, flip)
                for row in (split.labels == label).nonzero()[:, 0].tolist()
                for top in range(5)
                for left in range(5)
                for flip in (False, True)
                if torch.equal(
                    x.flip(-1) if flip else x, padded[row, :, top : top + S, left : left + S]
                )
            ]
            assert len(found) == 1
            offsets.add(found[0][1:3])
            flips += found[0][3]
    assert len(offsets) > 20  # of 25: all offsets occur
    assert 30 < flips < 70  # of 100


@pytest.mark.parametrize(("augment", "crops", "flips"), [("crop", True, False), ("none", 0, 0)])
def test_crop_alone_never_mirrors_and_none_changes_nothing(
    split: Split, augment: str, crops: bool, flips: bool
) -> None:
    images = image_set(split, augment)
    unchanged = mirrored = 0
    plain = images.rows(0, N)[0]
    for step in range(PER_EPOCH):
        x, _ = images.batch(step, B, 0, B)
        for image in x:
            unchanged += bool((plain == image).flatten(1).all(1).any())
            mirrored += bool((plain == image.flip(-1)).flatten(1).all(1).any())
    assert (unchanged < 20) if crops else (unchanged == 100)
    assert not mirrored and not flips


def test_slices_of_a_batch_from_fresh_objects_make_up_the_whole(split: Split) -> None:
    step = PER_EPOCH + 3  # in the second epoch
    whole = image_set(split).batch(step, B, 0, B)
    for cuts in ([(0, 4), (4, 10)], [(0, 1), (1, 2), (2, 10)], [(0, 10), (10, 10)]):
        parts = [image_set(split).batch(step, B, lo, hi) for lo, hi in cuts]
        assert torch.equal(torch.cat([x for x, _ in parts]), whole[0])
        assert torch.equal(torch.cat([y for _, y in parts]), whole[1])


def test_augmentation_does_not_depend_on_the_batch_size(split: Split) -> None:
    small = torch.cat([image_set(split).batch(step, 5, 0, 5)[0] for step in range(20)])
    large = torch.cat([image_set(split).batch(step, 10, 0, 10)[0] for step in range(10)])
    assert torch.equal(small, large)


def test_an_epoch_repeats_no_image_and_the_next_has_another_order(split: Split) -> None:
    images = image_set(split, "none")
    epochs = [
        [
            row
            for step in range(PER_EPOCH)
            for row in rows_of(images, images.batch(start + step, B, 0, B)[0], split)
        ]
        for start in (0, PER_EPOCH)
    ]
    assert all(len(set(rows)) == PER_EPOCH * B for rows in epochs)
    assert epochs[0] != epochs[1]


def test_the_seed_decides_order_and_augmentation(split: Split) -> None:
    first, again, other = (image_set(split, seed=s).batch(0, B, 0, B)[0] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_draws_do_not_depend_on_torchs_global_generator(split: Split) -> None:
    torch.manual_seed(1)
    first = image_set(split).batch(0, B, 0, B)[0]
    state = torch.get_rng_state()
    torch.rand(100)
    assert torch.equal(image_set(split).batch(0, B, 0, B)[0], first)
    torch.set_rng_state(state)


# ---------------------------------------------------------------- the validation split


def test_the_validation_split_is_the_same_for_every_seed(digits: Source) -> None:
    cuts = [
        split_training(digits, tiny_config(val_fraction=0.2, seed=seed).data) for seed in (0, 1)
    ]
    (train, val), (other_train, other_val) = cuts
    assert torch.equal(val.images, other_val.images)
    assert torch.equal(train.images, other_train.images)
    assert len(val) == round(0.2 * len(digits.train))
    assert len(val) + len(train) == len(digits.train)


def test_a_training_limit_is_stratified_and_the_same_for_every_seed(digits: Source) -> None:
    (few, _), (again, _), (more, _) = (
        split_training(digits, tiny_config(train_limit=limit, seed=seed).data)
        for limit, seed in ((100, 0), (100, 1), (200, 0))
    )
    assert torch.equal(few.images, again.images) and len(few) == 100
    share = torch.bincount(digits.train.labels) / len(digits.train)
    assert (torch.bincount(few.labels) - 100 * share).abs().max() <= 1
    larger = {tuple(image) for image in more.images.flatten(1).tolist()}
    assert len(more) == 200
    assert {tuple(image) for image in few.images.flatten(1).tolist()} <= larger


def test_a_training_limit_does_not_change_the_validation_split(digits: Source) -> None:
    _, val = split_training(digits, tiny_config(val_fraction=0.2).data)
    train, same = split_training(digits, tiny_config(val_fraction=0.2, train_limit=50).data)
    assert torch.equal(val.images, same.images) and len(train) == 50


def test_the_validation_split_comes_from_the_training_images_only(digits: Source) -> None:
    train, val = split_training(digits, tiny_config(val_fraction=0.2).data)
    everything = torch.cat([train.images, val.images]).flatten(1).tolist()
    assert sorted(everything) == sorted(digits.train.images.flatten(1).tolist())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5000}, "--batch-size 5000 is more than the 1437 training images"),
        ({"train_limit": 1438}, "--train-limit 1438 is more than the 1437 training images"),
        ({"train_limit": 7}, "--batch-size 8 is more than the 7 training images"),
        ({"val_fraction": 1e-6}, "--val-fraction 1e-06 of 1437 images is 0"),
        ({"val_fraction": 0.999, "batch_size": 8}, "more than the 1 training images"),
    ],
)
def test_too_few_images_are_refused(digits: Source, changes: dict, message: str) -> None:
    config = tiny_config(**changes)
    with pytest.raises(UsageError, match=message):
        check_batch_size(digits, config.data, config.optim.batch_size)


def test_slices_differ_by_at_most_one_row() -> None:
    assert list(slices(10, 3)) == [(0, 3), (3, 6), (6, 10)]
    assert list(slices(2, 3)) == [(0, 0), (0, 1), (1, 2)]


# ---------------------------------------------------------------- memory


def test_channels_last_batches_hold_the_same_images(digits: Source) -> None:
    plain, last = (
        prepared(digits, layout).train for layout in (torch.contiguous_format, torch.channels_last)
    )
    for (a, _), (b, _) in (
        (plain.batch(7, 8, 2, 8), last.batch(7, 8, 2, 8)),
        (plain.rows(3, 9), last.rows(3, 9)),
    ):
        assert torch.equal(a, b)
        assert a.is_contiguous() and b.is_contiguous(memory_format=torch.channels_last)


def test_no_step_copies_to_the_device(digits: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    # An accelerator would wait for each copy: only an epoch's first batch may make them.
    images = prepared(digits, torch.contiguous_format, labelled_fraction=0.5).train
    images.batch(0, 8, 0, 8)
    monkeypatch.setattr(torch.Tensor, "to", _only_its_precision(torch.Tensor.to))
    images.batch(1, 8, 0, 8)
    images.label_weight(1, 8)


def _only_its_precision(to: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def checked(tensor: torch.Tensor, *words: object, **named: object) -> torch.Tensor:
        assert not named and all(isinstance(word, torch.dtype) for word in words), words
        return to(tensor, *words, **named)

    return checked


def test_a_batch_may_be_all_images_and_not_one_more(digits: Source) -> None:
    few = dataclasses.replace(digits, train=digits.train.select(torch.arange(20)))

    def checked(**changes: object) -> tuple[int, int]:
        config = tiny_config(**changes)
        check_batch_size(few, config.data, config.optim.batch_size)
        return training_sizes(len(few.train), config.data)

    assert checked(batch_size=20) == (20, 0)
    assert checked(batch_size=15, val_fraction=0.25) == (15, 5)
    assert checked(batch_size=12, train_limit=12) == (12, 0)
    for changes, text in (
        ({"batch_size": 21}, "--batch-size 21 is more than the 20 training images"),
        ({"batch_size": 16, "val_fraction": 0.25}, "--batch-size 16 is more than the 15"),
        ({"train_limit": 21}, "--train-limit 21 is more than the 20"),
    ):
        with pytest.raises(UsageError, match=text):
            checked(**changes)


def test_floating_images_are_shuffled_and_otherwise_left_as_they_are() -> None:
    generate = torch.Generator().manual_seed(0)
    split = Split(torch.randn(12, 5, 3, generator=generate), torch.arange(12) % 3)
    source = Source(split, split, ("a", "b", "c"))
    images = ImageFormat(5, torch.float64, torch.contiguous_format, CPU)
    data = prepare(source, tiny_config().data, 0, images)
    assert isinstance(data.train, TensorSet) and isinstance(data.test, TensorSet)
    assert data.normalisation == Normalisation.identity()
    images, labels = data.train.batch(0, 12, 0, 12)
    order = [int((split.images == image).flatten(1).all(1).nonzero()) for image in images]
    assert sorted(order) == list(range(12)) != order
    assert images.dtype == torch.float64 and torch.equal(labels, split.labels[order])
    assert torch.equal(data.test.rows(2, 5)[0], split.images[2:5].double())
