"""Metrics: each against a value by hand or a plain loop, independent of batch sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score

from dml_accel.core.errors import UsageError
from dml_accel.mutual.metrics import ECE_BINS, batch_sums, finish, no_sums, sum_in_bins


def evaluate(logits: torch.Tensor, labels: torch.Tensor, cuts: list[int]) -> dict:
    parts = torch.tensor_split(torch.arange(len(labels)), cuts)
    sums = sum(batch_sums(logits[:, rows], labels[rows]) for rows in parts)
    return finish(sums, [f"n-{k}" for k in range(len(logits))], logits.shape[-1])


def test_values_by_hand() -> None:
    # Two peers, two rows, two classes.
    p = torch.tensor([[[0.8, 0.2], [0.6, 0.4]], [[0.3, 0.7], [0.2, 0.8]]], dtype=torch.float64)
    found = evaluate(p.log(), torch.tensor([0, 1]), [])
    first, second, ensemble = found["peers"]["n-0"], found["peers"]["n-1"], found["ensemble"]
    assert (first["n"], first["top1"], second["top1"], ensemble["top1"]) == (2, 0.5, 0.5, 1.0)
    assert first["top5"] is None
    assert first["nll"] == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)
    assert ensemble["nll"] == pytest.approx(-(math.log(0.55) + math.log(0.6)) / 2)
    # Confidences 0.8 (right) and 0.6 (wrong) fall into bins of their own.
    assert first["ece"] == pytest.approx((0.2 + 0.6) / 2)
    assert found["agreement"] == 0.0  # they predict (0, 0) and (1, 1)
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    entropy += -(0.6 * math.log(0.6) + 0.4 * math.log(0.4))
    assert found["entropy"]["n-0"] == pytest.approx(entropy / 2)
    kl_01 = 0.8 * math.log(0.8 / 0.3) + 0.2 * math.log(0.2 / 0.7)
    kl_01 += 0.6 * math.log(0.6 / 0.2) + 0.4 * math.log(0.4 / 0.8)
    assert found["kl"]["n-0"] == pytest.approx({"n-0": 0, "n-1": kl_01 / 2})


@pytest.fixture
def cohort() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 101, 7, generator=generator)
    return logits, torch.randint(0, 7, (101,), generator=generator)


def test_counts_are_exact_for_any_cut_into_batches(cohort: tuple) -> None:
    whole = evaluate(*cohort, [])
    for cuts in ([1], [50], [7, 8, 99]):
        parts = evaluate(*cohort, cuts)
        assert parts["agreement"] == whole["agreement"]
        for name in whole["peers"]:
            for metric in ("n", "top1", "top5"):
                assert parts["peers"][name][metric] == whole["peers"][name][metric]
            assert parts["peers"][name]["nll"] == pytest.approx(whole["peers"][name]["nll"])


def test_equals_a_plain_loop(cohort: tuple) -> None:
    logits, labels = cohort
    found = evaluate(logits, labels, [40])
    p = F.softmax(logits.double(), -1)
    for k, name in enumerate(found["peers"]):
        top1 = top5 = 0
        bins = [[0, 0.0, 0.0] for _ in range(ECE_BINS)]
        for row, label in enumerate(labels.tolist()):
            ranked = sorted(range(7), key=lambda c: -p[k, row, c].item())
            top1 += ranked[0] == label
            top5 += label in ranked[:5]
            confidence = p[k, row, ranked[0]].item()
            chosen = bins[min(ECE_BINS - 1, math.ceil(confidence * ECE_BINS) - 1)]
            chosen[0] += 1
            chosen[1] += confidence
            chosen[2] += ranked[0] == label
        ece = sum(abs(hit - sure) for _, sure, hit in bins) / 101
        metrics = found["peers"][name]
        assert (metrics["top1"], metrics["top5"]) == (top1 / 101, top5 / 101)
        assert metrics["ece"] == pytest.approx(ece)


def test_one_peer_has_no_agreement_and_is_its_own_ensemble(cohort: tuple) -> None:
    found = evaluate(cohort[0][:1], cohort[1], [])
    assert found["agreement"] is None
    assert found["ensemble"]["top1"] == found["peers"]["n-0"]["top1"]
    assert found["ensemble"]["nll"] == pytest.approx(found["peers"]["n-0"]["nll"])


def test_a_diverged_peer_gives_null_and_not_nan(cohort: tuple) -> None:
    logits = cohort[0].clone()
    logits[1] = math.nan
    found = evaluate(logits, cohort[1], [])
    assert found["peers"]["n-1"]["nll"] is None
    assert found["peers"]["n-0"]["nll"] is not None


def test_sums_in_bins_are_those_of_a_scatter() -> None:
    # What GPUs do; a peer that has diverged has bins that are not numbers, and no other peer has.
    values = torch.rand(3, 40, dtype=torch.float64)
    values[1, 5] = torch.nan
    bins = torch.randint(0, ECE_BINS, values.shape)
    expected = torch.zeros(3, ECE_BINS, dtype=values.dtype).scatter_add_(1, bins, values)
    found = sum_in_bins(values, bins)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14, equal_nan=True)


# ---------------------------------------------------------------- unbalanced classes


def test_macro_f1_by_hand() -> None:
    # Labels 0 0 0 1, predictions 0 0 2 0; class 2 has no rows. F1 of 0: 2 x 2 / (3 + 3); of 1: 0.
    best, labels = torch.tensor([0, 0, 2, 0]), torch.tensor([0, 0, 0, 1])
    logits = F.one_hot(best, 3).double()[None]
    found = evaluate(logits, labels, [])
    assert found["peers"]["n-0"]["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["imbalance"] == 3.0


@pytest.mark.parametrize("classes", [7, 12])  # 12: five without rows, but with predictions
def test_macro_f1_is_that_of_sklearn_for_any_cut_into_batches(classes: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 90, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 7, (90,), generator=generator) ** 2 // 6  # 0 0 0 1 2 4 6
    logits.scatter_add_(2, labels.expand(3, -1)[..., None], torch.ones(3, 90, 1).double())
    present = labels.unique()
    assert len(present) == 5
    found = [evaluate(logits, labels, cuts) for cuts in ([], [1], [30, 31, 80])]
    mean = torch.softmax(logits, -1).mean(0)
    for k, predictions in enumerate([*logits.argmax(-1), mean.argmax(-1)]):
        theirs = f1_score(labels, predictions, labels=present, average="macro")
        tables = [[*one["peers"].values(), one["ensemble"]][k]["macro_f1"] for one in found]
        assert 0.2 < tables[0] < 0.95 and tables[1:] == tables[:1] * 2
        assert tables[0] == pytest.approx(theirs, rel=1e-12)
    counts = labels.bincount()
    assert found[0]["imbalance"] == counts.max() / counts[counts > 0].min()


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_rows_without_a_label_are_counted_nowhere(cohort: tuple, bad: float) -> None:
    logits, labels = cohort
    out = torch.arange(101) % 4 == 1
    some, spoiled = labels.masked_fill(out, -1), logits.clone()
    spoiled[:, out] = bad
    found = evaluate(spoiled, some, [40])
    right = evaluate(logits[:, ~out], labels[~out], [30])
    assert found["ensemble"]["n"] == 75 + 1  # rows 1, 5, ..., 97 are out
    flat, expected = (torch.tensor(numbers(one)) for one in (found, right))
    torch.testing.assert_close(flat, expected, rtol=1e-12, atol=1e-14)
    for name in found["peers"]:
        for metric in ("n", "top1", "top5", "macro_f1"):
            assert found["peers"][name][metric] == right["peers"][name][metric]


def numbers(found: object) -> list[float]:
    """All numbers of an evaluation, in order."""
    if isinstance(found, dict):
        return [number for one in found.values() for number in numbers(one)]
    return [found]


def test_the_sums_grow_with_the_classes_and_not_with_their_square() -> None:
    few, many = (len(no_sums(4, classes, torch.device("cpu"))) for classes in (10, 5010))
    assert many - few == 5000 * (2 * 5 + 1)


def test_a_split_of_which_nothing_can_be_read_is_refused(cohort: tuple) -> None:
    sums = batch_sums(cohort[0], torch.full((101,), -1))
    assert len(sums) == len(no_sums(3, 7, sums.device)) and sums.abs().sum() == 0
    with pytest.raises(UsageError, match="none of the images of the val split could be read"):
        finish(sums, ["a", "b", "c"], 7, "val")
