"""Mixup and CutMix: drawn per batch, the same for every slice of it."""

import pytest
import torch

from dml_accel.data.batches import ImageFormat, ImageSet, Normalisation, PixelSet
from dml_accel.data.images import Data, prepare
from dml_accel.data.mixing import Mix, Mixing
from dml_accel.data.sources import Source
from dml_accel.data.splits import Split
from tests.helpers import tiny_config

N, S, B = 40, 16, 8
PER_EPOCH = N // B
CPU = torch.device("cpu")
BOTH = Mixing(mixup=1.0, cutmix=1.0)


@pytest.fixture(scope="module")
def split() -> Split:
    g = torch.Generator().manual_seed(0)
    return Split(
        torch.randint(0, 256, (N, S, S, 3), generator=g, dtype=torch.uint8), torch.arange(N) % 7
    )


def image_set(split: Split, mixing: Mixing | None, *words: str, seed: int = 3) -> PixelSet:
    options = {"seed": seed, "device": CPU, "dtype": torch.float32, "mixing": mixing}
    return PixelSet(split, Normalisation.of(split.images), augment=words, **options)


def test_a_pair_mixed_by_hand() -> None:
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[5.0, 6.0], [7.0, 8.0]]]])
    order = torch.tensor([1, 0])
    mixed = Mix(order, 0.75, None).apply(x.clone(), x[order])
    assert mixed.flatten().tolist() == [2, 3, 4, 5, 4, 5, 6, 7]
    cut = Mix(order, 0.5, (0, 2, 1, 2)).apply(x.clone(), x[order])  # the right column
    assert cut.flatten().tolist() == [1, 6, 3, 8, 5, 2, 7, 4]


@pytest.mark.parametrize("mixing", [Mixing(0.2, 0.0), Mixing(0.0, 1.0), Mixing(0.4, 1.0)], ids=str)
def test_batches_are_mixed_with_themselves_as_drawn(split: Split, mixing: Mixing) -> None:
    plain, mixed = image_set(split, None, "crop-flip"), image_set(split, mixing, "crop-flip")
    kinds = set()
    for step in range(3 * PER_EPOCH):
        epoch, index = divmod(step, PER_EPOCH)
        partners, drawn = mixing.draw(3, epoch, PER_EPOCH, B, (S, S))
        order, (share, box) = partners[index], drawn[index]
        assert sorted(order.tolist()) == list(range(B)) and 0 <= share <= 1
        x, y = plain.batch(step, B, 0, B)
        found, labels = mixed.batch(step, B, 0, B)
        with_what = mixed.mixed(step, B, 0, B)
        assert torch.equal(labels, y)
        if share == 1:
            assert with_what is None and torch.equal(found, x)
            continue
        assert torch.equal(with_what.labels, y[order]) and with_what.share == share
        if box is None:
            torch.testing.assert_close(found, share * x + (1 - share) * x[order])
        else:
            top, bottom, left, right = box
            inside = torch.zeros(S, S, dtype=torch.bool)
            inside[top:bottom, left:right] = True
            assert torch.equal(found, torch.where(inside, x[order], x))
            assert share == pytest.approx(1 - inside.double().mean().item())
        kinds.add(box is None)
    assert kinds == {kind for kind, on in ((True, mixing.mixup), (False, mixing.cutmix)) if on}


@pytest.mark.parametrize("words", [("crop-flip", "erasing"), ("crop-flip", "randaugment")])
def test_slices_of_a_mixed_batch_are_its_rows(split: Split, words: tuple[str, ...]) -> None:
    for step in (0, 3, 6):  # one of them mixup, one CutMix: see the draws
        whole, _ = image_set(split, BOTH, *words).batch(step, B, 0, B)
        labels = image_set(split, BOTH, *words).mixed(step, B, 0, B).labels
        fresh = image_set(split, BOTH, *words)
        cuts = [(0, 3), (3, 4), (4, B)]
        parts = [fresh.batch(step, B, *cut)[0] for cut in cuts]
        assert torch.equal(torch.cat(parts), whole)
        found = [fresh.mixed(step, B, *cut) for cut in cuts]
        assert torch.equal(torch.cat([one.labels for one in found]), labels)
        assert len({one.share for one in found}) == 1
    boxes = {
        BOTH.draw(3, s // PER_EPOCH, PER_EPOCH, B, (S, S))[1][s % PER_EPOCH][1] for s in (0, 3, 6)
    }
    assert None in boxes and len(boxes) > 1


def test_draws_follow_seed_and_epoch_and_nothing_drawn_before(split: Split) -> None:
    def draw(seed: int, epoch: int, size: int = B) -> tuple[list, list]:
        partners, drawn = BOTH.draw(seed, epoch, PER_EPOCH, size, (S, S))
        return partners.tolist(), drawn

    state = torch.get_rng_state()
    first = draw(0, 0)
    assert torch.equal(state, torch.get_rng_state())
    assert draw(0, 0) == first
    assert all(draw(*other) != first for other in ((1, 0), (0, 1), (0, 0, 4)))
    resumed, went = image_set(split, BOTH), image_set(split, BOTH)
    for step in range(7):
        went.batch(step, B, 0, B)
    assert torch.equal(resumed.batch(7, B, 0, B)[0], went.batch(7, B, 0, B)[0])


def test_shares_and_boxes_are_distributed_as_in_the_papers() -> None:
    _, mixup = Mixing(0.2, 0.0).draw(0, 0, 4000, 1, (S, S))
    shares = torch.tensor([share for share, _ in mixup], dtype=torch.float64)
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)).
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / (4 * 1.4), abs=0.01)
    _, both = BOTH.draw(0, 0, 4000, 1, (S, 2 * S))
    boxes = torch.tensor([box for _, box in both if box])
    assert len(boxes) == pytest.approx(2000, abs=150)
    # Around the last pixel, the smallest box begins one before it and is cut off behind it.
    assert boxes.min() == 0 and boxes.amax(0).tolist() == [S - 2, S, 2 * S - 2, 2 * S]


def test_only_training_images_are_mixed_and_augmented(digits: Source) -> None:
    config = tiny_config(mixup=1.0, augment=("randaugment",), val_fraction=0.1)
    images = ImageFormat(16, torch.float64, torch.contiguous_format, CPU)
    data: Data = prepare(digits, config.data, 0, images)
    assert data.train.mixed(0, B, 0, B)
    for held in (data.val, data.test):
        assert held.mixed(0, B, 0, B) is None
        assert torch.equal(held.batch(0, B, 0, B)[0], held.at(held._batch_rows(0, B)[1])[0])


def test_floating_images_of_any_shape_are_mixed() -> None:
    split = Split(torch.randn(12, 5, 3), torch.arange(12) % 3)
    source = Source(split, split, ("a", "b", "c"))
    images = ImageFormat(5, torch.float64, torch.contiguous_format, CPU)

    def train(**changes: float) -> ImageSet:
        return prepare(source, tiny_config(**changes).data, 0, images).train

    plain, mixed = train(), train(mixup=1.0)
    x, with_what = plain.batch(0, 12, 0, 12)[0], mixed.mixed(0, 12, 0, 12)
    order = Mixing(1.0, 0.0).draw(0, 0, 1, 12, (1, 1))[0][0]
    expected = with_what.share * x + (1 - with_what.share) * x[order]
    torch.testing.assert_close(mixed.batch(0, 12, 0, 12)[0], expected)
    assert torch.equal(plain.rows(0, 12)[0], split.images.double())  # not changed in place
