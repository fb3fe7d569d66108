"""What tells images from others: the words in which two fingerprints differ."""

import json

import pytest
import torch

from dml_accel.data.splits import Fingerprint, Split, SplitPrint, sha256

NAMES = ("cat", "dog")


def fingerprint(
    names: tuple[str, ...] = NAMES, labels: list[int] | None = None, level: int = 9
) -> Fingerprint:
    """Of a training split of two images of each class, and a test split of one."""
    train = torch.tensor([0, 0, 1, 1] if labels is None else labels)
    images = torch.full((len(train), 2, 2, 3), level, dtype=torch.uint8)
    test = torch.tensor([0, 1])
    return Fingerprint(
        names,
        {
            "train": SplitPrint.of(train, len(names), sha256(images)),
            "test": SplitPrint.of(test, len(names), sha256(images[:2] * 0)),
        },
    )


DIFFERENCES = {
    "none": (fingerprint(), ""),
    "a renamed class": (
        fingerprint(("dog", "zebra")),
        "the classes were 'cat', now 'zebra'",
    ),
    "another order of classes": (fingerprint(("dog", "cat")), "its classes had another order"),
    "a new class": (
        fingerprint(("cat", "dog", "eel")),
        "the classes were 'cat', 'dog', now 'eel'",
    ),
    "more images": (
        fingerprint(labels=[0, 0, 1, 1, 1]),
        "the train split had 4 images, now 5; train images by class: dog 2, now 3",
    ),
    "an image that was moved": (
        fingerprint(labels=[0, 1, 1, 1]),
        "train images by class: cat 2, now 1; dog 2, now 3",
    ),
    "exchanged labels": (fingerprint(labels=[0, 1, 0, 1]), "other labels in the train split"),
    "other pixels": (
        fingerprint(level=8),
        "other images, or another order, in the train split",
    ),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_a_difference_is_said_in_words(case: str) -> None:
    now, words = DIFFERENCES[case]
    saved = json.loads(json.dumps(fingerprint().record()))
    assert now.difference(saved) == words


def forged(**changes: object) -> dict:
    record = fingerprint(level=8).record()
    record["splits"]["train"] |= changes
    return record


UNREADABLE = [{}, {"classes": 3, "splits": {}}, {"classes": [], "splits": []}]
UNREADABLE += [forged(by_class=[1]), forged(images="four"), forged(extra=1)]


@pytest.mark.parametrize("record", UNREADABLE)
def test_a_record_that_cannot_be_read_is_a_difference(record: dict) -> None:
    assert fingerprint().difference(record) == "the record of its images cannot be read"


def test_rows_that_are_not_decoded_keep_their_labels() -> None:
    images = torch.arange(2 * 3).view(2, 1, 1, 3).to(torch.uint8)
    split = Split(images, torch.tensor([5, 6, 7, 8]), torch.tensor([1, 3]))
    assert len(split) == 4
    chosen = split.select(torch.tensor([3, 1]))
    assert chosen.labels.tolist() == [8, 6]
    assert torch.equal(chosen.images, images.flip(0))
