"""--augment: its words, and what they do as functions of an image and a key."""

import itertools
import random

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from dml_accel.core.errors import UsageError
from dml_accel.core.rng import key
from dml_accel.data.augment import ImageTransform, erase, erasing_boxes, parse_augment
from dml_accel.data.batches import Normalisation, PixelSet
from dml_accel.data.splits import Split

N, S, B = 40, 16, 8
CPU = torch.device("cpu")
IMAGE_BY_IMAGE = ("random-resized-crop", "randaugment", "trivialaugment", "color-jitter")


@pytest.fixture(scope="module")
def split() -> Split:
    g = torch.Generator().manual_seed(0)
    return Split(
        torch.randint(0, 256, (N, S, S, 3), generator=g, dtype=torch.uint8), torch.arange(N) % 7
    )


def image_set(split: Split, *words: str, **options: object) -> PixelSet:
    options = {"seed": 3, "device": CPU, "dtype": torch.float32} | options
    return PixelSet(split, Normalisation.of(split.images), augment=words, **options)


# ---------------------------------------------------------------- words


def test_words_come_in_the_order_of_application_with_their_arguments() -> None:
    words = ("erasing[p=0.5]", "randaugment[num_ops=1, magnitude=7]", "crop-flip")
    assert list(parse_augment(words).items()) == [
        ("crop", {}),
        ("flip", {}),
        ("randaugment", {"num_ops": 1, "magnitude": 7}),
        ("erasing", {"p": 0.5}),
    ]
    assert parse_augment(["none"]) == {}
    inner = "random-resized-crop[scale=(0.2,1),ratio=[1,1],interpolation=bicubic]"
    assert parse_augment([inner]) == {
        "random-resized-crop": {"scale": (0.2, 1), "ratio": (1, 1), "interpolation": "bicubic"}
    }


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("randaugmet", "unknown word 'randaugmet'; nearest: randaugment; the words are none, crop"),
        ("crop]", "cannot be parsed"),
        ("crop[4]", "write arguments as"),
        ("crop[padding=4]", "crop takes no padding; it takes no arguments"),
        (
            "randaugment[ops=2]",
            "takes no ops; it takes num_ops, magnitude, num_magnitude_bins, int",
        ),
        ("erasing[p=0.1,p=0.2]", "p is there twice"),
        ("flip crop-flip", "flip is there twice"),
        ("crop-flip random-resized-crop", "exclude each other"),
        ("none flip", "none stands alone"),
        ("erasing[p=2]", "p is 2; it must be a number from 0 to 1"),
        ("erasing[p=1e999]", "it must be a number from 0 to 1"),
        ("erasing[scale=(0.5,0.2)]", "it must be two shares of the area"),
        ("erasing[ratio=0.5]", "it must be two positive numbers"),
        ("random-resized-crop[interpolation=lanczos]", "it must be nearest, bilinear or bicubic"),
        ("randaugment[num_ops=0]", "num_ops is 0; it must be a whole number from 1 to 14"),
        ("randaugment[magnitude=31]", "magnitude is 31; it must be below the 31"),
        ("randaugment[num_magnitude_bins=9]", "magnitude is 9; it must be below the 9"),
        ("trivialaugment[num_magnitude_bins=True]", "num_magnitude_bins is True"),
        ("color-jitter[brightness=red]", "brightness is red; it must be a number"),
        ("color-jitter[brightness=-1]", "torchvision refuses color-jitter[brightness=-1]: If"),
        ("color-jitter[hue=0.7]", "torchvision refuses color-jitter[hue=0.7]"),
        ("randaugment[interpolation=bicubic]", "torchvision refuses randaugment[interpolation="),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(words: str, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_augment(words.split())
    assert str(caught.value).startswith("--augment") and text in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- image by image


@pytest.mark.parametrize("word", IMAGE_BY_IMAGE)
def test_an_image_depends_on_its_key_alone(word: str) -> None:
    pixels = torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8)
    transform = ImageTransform([word], S)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    first = [transform(pixels, number) for number in range(8)]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))
    torch.rand(3)
    random.random()
    again = ImageTransform([word], S).batch([pixels] * 8, range(7, -1, -1))
    assert torch.equal(torch.stack(first), again.flip(0))
    assert again.dtype == torch.uint8
    assert again.shape[1:] == ((3, S, S) if word == "random-resized-crop" else (3, 20, 24))
    assert len({tuple(one.flatten().tolist()) for one in again}) > 4


def test_words_are_those_of_torchvision() -> None:
    pixels = torch.randint(0, 256, (3, S, S), dtype=torch.uint8)
    made = ImageTransform(["color-jitter", "randaugment[magnitude=4]", "erasing", "flip"], S)
    steps = (v2.RandAugment(magnitude=4), v2.ColorJitter(0.4, 0.4, 0.4))
    for number in range(4):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            expected = steps[1](steps[0](pixels))
        assert torch.equal(made(pixels, number), expected)
    assert not ImageTransform(["erasing", "crop-flip"], S)


@pytest.mark.parametrize(
    "words", [("crop-flip", "randaugment", "erasing[p=1]"), ("random-resized-crop", "flip")]
)
def test_slices_batch_sizes_and_other_images_change_no_image(
    split: Split, words: tuple[str, ...]
) -> None:
    whole, labels = image_set(split, *words).batch(6, B, 0, B)
    for cuts in ((0, 3, B), (0, 1, 2, 7, B)):
        fresh = image_set(split, *words)
        parts = [fresh.batch(6, B, *cut) for cut in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat([x for x, _ in parts]), whole)
        assert torch.equal(torch.cat([y for _, y in parts]), labels)
    smaller = image_set(split, *words)
    assert torch.equal(torch.cat([smaller.batch(n, 4, 0, 4)[0] for n in (12, 13)]), whole)
    assert not torch.equal(image_set(split, *words, seed=4).batch(6, B, 0, B)[0], whole)


def test_an_epoch_changes_an_image_and_evaluation_never_does(split: Split) -> None:
    one = Split(split.images[:1], split.labels[:1])
    images = image_set(one, "randaugment", "erasing[p=1]")
    made = [images.batch(epoch, 1, 0, 1)[0] for epoch in range(6)]
    assert len({tuple(x.flatten().tolist()) for x in made}) == 6
    assert torch.equal(images.rows(0, 1)[0], image_set(one).rows(0, 1)[0])


def test_crop_and_flip_come_first_and_normalisation_last(split: Split) -> None:
    cropped = image_set(split, "crop-flip", dtype=torch.float64)
    made = image_set(split, "crop-flip", "randaugment", dtype=torch.float64)
    _, rows = made._batch_rows(5, B)  # in the second epoch
    mean, std = (
        torch.tensor(part, dtype=torch.float64).view(3, 1, 1)
        for part in vars(Normalisation.of(split.images)).values()
    )
    levels = ((cropped.batch(5, B, 0, B)[0] * std + mean) * 255).round().to(torch.uint8)
    keys = [key("augment", 3, 1, row) for row in rows.tolist()]
    expected = ImageTransform(["randaugment"], S).batch(levels, keys)
    torch.testing.assert_close(made.batch(5, B, 0, B)[0], (expected.double() / 255 - mean) / std)


def test_with_words_of_today_the_draws_are_those_of_today(split: Split) -> None:
    # Erasing draws from a generator of its own: what it leaves is the cropped image.
    plain, erased = (image_set(split, "crop-flip", *more) for more in ((), ("erasing[p=1]",)))
    together = image_set(split, "flip", "crop")
    for step in (0, 7):
        x, y = plain.batch(step, B, 0, B)[0], erased.batch(step, B, 0, B)[0]
        assert torch.equal(torch.where(y == 0, x, y), x) and (y == 0).any()
        assert torch.equal(together.batch(step, B, 0, B)[0], x)


# ---------------------------------------------------------------- erasing


def test_boxes_have_the_sizes_and_the_frequency_that_are_asked_for() -> None:
    arguments = {"p": 0.3, "scale": (0.1, 0.2), "ratio": (0.5, 2.0)}
    boxes = erasing_boxes(4000, 32, arguments, torch.Generator().manual_seed(0))
    top, bottom, left, right = boxes
    height, width = bottom - top, right - left
    some = height > 0
    assert abs(some.double().mean() - 0.3) < 0.03
    assert torch.equal(some, width > 0)
    assert (boxes[:, some] >= 0).all() and (boxes[:, some] <= 32).all()
    area, shape = (height * width)[some] / 32**2, (height / width)[some]
    # Sides are rounded to pixels, the shortest of which is 7.
    assert area.min() > 0.08 and area.max() < 0.23 and shape.min() > 0.42 and shape.max() < 2.3
    assert abs(area.mean() - 0.15) < 0.01
    assert abs((shape > 1).double().mean() - 0.5) < 0.05
    assert set(top[some].tolist()) >= set(range(18)) and bottom.max() == right.max() == 32


def test_a_box_that_never_fits_erases_nothing() -> None:
    arguments = {"p": 1.0, "scale": (1.0, 1.0), "ratio": (3.0, 3.0)}
    top, bottom, left, right = erasing_boxes(9, 8, arguments, torch.Generator())
    assert torch.equal(top, bottom) and torch.equal(left, right)


def test_erasing_by_hand() -> None:
    images, boxes = torch.ones(2, 3, 4, 4), torch.tensor([[1, 0], [3, 0], [0, 2], [2, 2]])
    erase(images, boxes, torch.arange(4))
    rows = [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    assert torch.equal(images[0], torch.tensor([rows] * 3).float())
    assert (images[1] == 1).all()
