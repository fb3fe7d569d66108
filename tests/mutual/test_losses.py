"""Losses: the paper's equations, their gradients, and mistakes of other implementations."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from dml_accel.data.mixing import Mixed
from dml_accel.mutual import reference
from dml_accel.mutual.losses import balanced_weights, mutual_loss, mutual_losses
from dml_accel.mutual.targets import Lesson

K, B, C = 4, 6, 10


def kl_of(logits: torch.Tensor) -> torch.Tensor:
    return mutual_loss(logits, torch.zeros(logits.shape[1], dtype=torch.int64)).kl


@pytest.fixture
def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(K, B, C, generator=generator, dtype=torch.float64)


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(0, C, (B,), generator=torch.Generator().manual_seed(1))


def test_golden_values_by_hand() -> None:
    # p1 = (.9, .1), p2 = (.5, .5), label 0, T = 1; a KL belongs to the peer that learns.
    p = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]], dtype=torch.float64)
    losses = mutual_loss(p.log(), torch.tensor([0]))
    ce_1, ce_2 = -math.log(0.9), -math.log(0.5)
    kl_21 = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    kl_12 = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert (round(ce_1, 6), round(ce_2, 6)) == (0.105361, 0.693147)
    assert (round(kl_21, 6), round(kl_12, 6)) == (0.510826, 0.368064)
    assert losses.cross_entropy[:, 0].tolist() == pytest.approx([ce_1, ce_2])
    assert losses.kl[:, 0].tolist() == pytest.approx([kl_21, kl_12])
    assert losses.total[:, 0].tolist() == pytest.approx([ce_1 + kl_21, ce_2 + kl_12])


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_equals_the_reference_in_value_and_gradient(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float, reduction: str, weight: float
) -> None:
    options = {"kl_weight": weight, "temperature": temperature, "kl_reduction": reduction}
    fast = logits.clone().requires_grad_()
    slow = [z.clone().requires_grad_() for z in logits]
    losses = mutual_loss(fast, labels, **options).total.mean(1)
    losses.sum().backward()
    expected = [reference.loss(k, slow, labels, **options) for k in range(K)]
    sum(expected).backward()
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fast.grad, torch.stack([z.grad for z in slow]))


def test_no_gradient_of_a_peer_reaches_another(logits: torch.Tensor, labels: torch.Tensor) -> None:
    logits.requires_grad_()
    for k in range(K):
        (grad,) = torch.autograd.grad(mutual_loss(logits, labels).total[k].sum(), logits)
        assert grad[k].abs().sum() > 0
        assert grad[[peer for peer in range(K) if peer != k]].abs().sum() == 0


def test_without_kl_the_loss_is_the_cross_entropy_bit_for_bit(
    logits: torch.Tensor, labels: torch.Tensor
) -> None:
    alone = [mutual_losses(z[None], labels, None).total[0] for z in logits]
    together = mutual_losses(logits, labels, None).total
    assert torch.equal(together, torch.stack(alone))


def test_a_diverged_peer_is_harmless_without_kl(logits: torch.Tensor, labels: torch.Tensor) -> None:
    logits[1] = math.nan
    logits.requires_grad_()
    total = mutual_losses(logits, labels, None).total
    total.sum().backward()
    assert total[0].isfinite().all() and logits.grad[0].isfinite().all()
    assert total[1].isnan().all()


def test_kl_is_summed_over_classes_and_not_reversed(logits: torch.Tensor) -> None:
    log_p = F.log_softmax(logits[:2], -1)
    kl = kl_of(logits[:2])
    right = F.kl_div(log_p[0], log_p[1], log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl[0], right)
    assert not torch.allclose(kl[0], right / C)
    assert not torch.allclose(kl[0], kl[1])


def test_the_mean_posterior_as_target_has_the_same_gradient(logits: torch.Tensor) -> None:
    # DML_e teaches with the mean posterior of the others: another value, the very same gradient.
    z = logits.clone().requires_grad_()
    (dml,) = torch.autograd.grad(kl_of(z).sum(), z)
    for k in range(K):
        others = F.softmax(torch.cat([logits[:k], logits[k + 1 :]]), -1).mean(0)
        z_k = logits[k].clone().requires_grad_()
        F.kl_div(F.log_softmax(z_k, -1), others, reduction="sum").backward()
        torch.testing.assert_close(dml[k], z_k.grad, rtol=0, atol=1e-13)


def test_permuting_the_peers_permutes_the_losses(
    logits: torch.Tensor, labels: torch.Tensor
) -> None:
    order = torch.tensor([2, 0, 3, 1])
    moved = mutual_loss(logits[order], labels).total
    torch.testing.assert_close(moved, mutual_loss(logits, labels).total[order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_converted_to_single(
    logits: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
) -> None:
    half = logits.to(dtype)
    losses = mutual_loss(half, labels)
    assert losses.total.dtype == torch.float32
    torch.testing.assert_close(losses.total, mutual_loss(half.float(), labels).total)


def test_kl_of_confident_peers_is_finite_and_not_negative() -> None:
    sure = torch.tensor([[[200.0, 0.0, 0.0]], [[200.0, 0.0, 0.0]], [[0.0, 200.0, 0.0]]])
    kl = kl_of(sure)
    assert kl[:, 0].tolist() == pytest.approx([100.0, 100.0, 200.0])


def test_sums_over_parts_of_a_cohort_give_the_targets_of_the_whole(
    logits: torch.Tensor, labels: torch.Tensor
) -> None:
    lesson = Lesson()
    first, rest = (lesson.contributions(part, labels) for part in (logits[:1], logits[1:]))
    sums = first.sum(0) + rest.sum(0)
    part = mutual_losses(logits[1:3], labels, lesson.targets(sums[None], rest[:2], labels))
    torch.testing.assert_close(part.total, mutual_loss(logits, labels).total[1:3])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_teaches_nobody(
    logits: torch.Tensor, labels: torch.Tensor, bad: float, reduction: str
) -> None:
    spoiled = logits.clone()
    spoiled[1, 2, 5] = bad
    z = spoiled.clone().requires_grad_()
    losses = mutual_loss(z, labels, kl_reduction=reduction)
    others = [0, 2, 3]
    without = mutual_loss(logits[others], labels, kl_reduction=reduction).total
    torch.testing.assert_close(losses.total[others, 2], without[:, 2])
    fine = [0, 1, 3, 4, 5]
    as_usual = mutual_loss(logits, labels, kl_reduction=reduction).total
    torch.testing.assert_close(losses.total[:, fine], as_usual[:, fine])
    assert not losses.total[1, 2].isfinite()
    losses.total[others].sum().backward()
    assert z.grad[others].isfinite().all()


def test_where_no_teacher_is_left_the_loss_is_the_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor
) -> None:
    logits[1:] = math.nan
    losses = mutual_loss(logits, labels)
    assert torch.equal(losses.total[0], losses.cross_entropy[0])
    assert losses.kl[0].abs().max() == 0


def test_a_single_network_has_no_kl_whatever_its_logits(
    logits: torch.Tensor, labels: torch.Tensor
) -> None:
    losses = mutual_loss(logits[:1], labels)
    assert torch.equal(losses.total, losses.cross_entropy) and losses.kl.abs().max() == 0


def test_at_weight_0_the_kl_is_not_computed(logits: torch.Tensor, labels: torch.Tensor) -> None:
    logits[1] = math.nan  # 0 x NaN would be NaN
    losses = mutual_loss(logits, labels, kl_weight=0.0)
    assert torch.equal(losses.total[0], losses.cross_entropy[0])
    assert torch.equal(losses.total[0], mutual_losses(logits[:1], labels, None).total[0])
    assert losses.kl.abs().max() == 0


# ---------------------------------------------------------------- labels that are not hard


@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_and_smoothed_labels_equal_torch_and_the_reference(
    logits: torch.Tensor, labels: torch.Tensor, share: float | None, smoothing: float
) -> None:
    partners = labels.roll(1)
    mixed = None if share is None else Mixed(partners, share)
    z = logits.clone().requires_grad_()
    losses = mutual_loss(z, labels, mixed=mixed, label_smoothing=smoothing)
    share = 1.0 if share is None else share
    soft = share * F.one_hot(labels, C) + (1 - share) * F.one_hot(partners, C)
    hard = mutual_loss(logits, labels)
    for k in range(K):
        expected = F.cross_entropy(
            logits[k], soft.double(), reduction="none", label_smoothing=smoothing
        )
        torch.testing.assert_close(losses.cross_entropy[k], expected)
    torch.testing.assert_close(losses.total, losses.cross_entropy + hard.kl)
    assert torch.equal(losses.kl, hard.kl)
    slow = [one.clone().requires_grad_() for one in logits]
    targets_BC = reference.soft_labels(labels, C, partners, share, smoothing)
    expected = [reference.loss(k, slow, targets_BC) for k in range(K)]
    torch.testing.assert_close(losses.total.mean(1), torch.stack(expected))
    losses.total.mean(1).sum().backward()
    sum(expected).backward()
    torch.testing.assert_close(z.grad, torch.stack([one.grad for one in slow]))


def test_mixed_by_hand() -> None:
    # p = (.9, .1), labels 0 and 1 with shares .7 and .3; smoothing .2 adds .1 to .8 of each.
    p = torch.tensor([[[0.9, 0.1]]], dtype=torch.float64)
    mixed = Mixed(torch.tensor([1]), 0.7)
    found = mutual_losses(p.log(), torch.tensor([0]), None, mixed=mixed).total.item()
    assert found == pytest.approx(-0.7 * math.log(0.9) - 0.3 * math.log(0.1))
    found = mutual_losses(p.log(), torch.tensor([0]), None, mixed=mixed, label_smoothing=0.2)
    assert found.total.item() == pytest.approx(-0.66 * math.log(0.9) - 0.34 * math.log(0.1))


def test_a_row_without_a_label_has_no_smoothed_one_either(
    logits: torch.Tensor, labels: torch.Tensor
) -> None:
    some = labels.clone()
    some[2] = -1
    options = {"label_weight": torch.tensor(B / (B - 1)), "label_smoothing": 0.1}
    found = mutual_losses(logits, some, None, **options).cross_entropy
    for k in range(K):
        expected = F.cross_entropy(logits[k], some, ignore_index=-1, label_smoothing=0.1)
        torch.testing.assert_close(found[k].mean(), expected)
    assert (found[:, 2] == 0).all()


# ---------------------------------------------------------------- weights of classes


WEIGHTS = torch.tensor([0.5, 0.0, 2.0, 1.0, 1.5, 3.0, 0.25, 1.0, 0.75, 4.0], dtype=torch.float64)


@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_classes_equal_torch_and_the_reference(
    logits: torch.Tensor, labels: torch.Tensor, share: float | None, smoothing: float
) -> None:
    partners = labels.roll(1)
    mixed = None if share is None else Mixed(partners, share)
    options = {"mixed": mixed, "label_smoothing": smoothing}
    z = logits.clone().requires_grad_()
    losses = mutual_loss(z, labels, **options, class_weights_C=WEIGHTS)
    share = 1.0 if share is None else share
    for k in range(K):
        # A smoothed label has the weight of its own class as a whole: torch would weight its parts.
        own, theirs = (
            WEIGHTS[y] * F.cross_entropy(logits[k], y, reduction="none", label_smoothing=smoothing)
            for y in (labels, partners)
        )
        torch.testing.assert_close(losses.cross_entropy[k], share * own + (1 - share) * theirs)
        if not smoothing and share == 1:
            weighted = F.cross_entropy(logits[k], labels, weight=WEIGHTS, reduction="none")
            torch.testing.assert_close(losses.cross_entropy[k], weighted)
    plain = mutual_loss(logits, labels, **options)
    assert torch.equal(losses.kl, plain.kl)
    torch.testing.assert_close(losses.total, losses.cross_entropy + plain.kl)
    slow = [one.clone().requires_grad_() for one in logits]
    weights = WEIGHTS.tolist()
    soft = reference.soft_labels(labels, C, partners, share, smoothing, weights)
    expected = [reference.loss(k, slow, soft) for k in range(K)]
    if not smoothing and share == 1:
        hard = [reference.loss(k, slow, labels, class_weights=weights) for k in range(K)]
        torch.testing.assert_close(torch.stack(hard), torch.stack(expected))
    torch.testing.assert_close(losses.total.mean(1), torch.stack(expected))
    losses.total.mean(1).sum().backward()
    sum(expected).backward()
    torch.testing.assert_close(z.grad, torch.stack([one.grad for one in slow]))


def test_weighted_classes_by_hand() -> None:
    # p = (.9, .1), labels 0 and 1 with shares .7 and .3, weights 2 and 5, smoothing .2.
    p, weights = torch.tensor([[[0.9, 0.1]]], dtype=torch.float64), torch.tensor([2.0, 5.0])
    options = {"mixed": Mixed(torch.tensor([1]), 0.7), "class_weights_C": weights.double()}
    a, b = -math.log(0.9), -math.log(0.1)
    found = mutual_losses(p.log(), torch.tensor([0]), None, **options).total.item()
    assert found == pytest.approx(0.7 * 2 * a + 0.3 * 5 * b)
    options["label_smoothing"] = 0.2
    found = mutual_losses(p.log(), torch.tensor([0]), None, **options).total.item()
    assert found == pytest.approx(0.7 * 2 * (0.9 * a + 0.1 * b) + 0.3 * 5 * (0.1 * a + 0.9 * b))


def test_weighted_rows_are_those_of_any_slice(logits: torch.Tensor, labels: torch.Tensor) -> None:
    # Not divided by the weights of a batch: slices on several processes have other ones.
    some = labels.clone()
    some[1] = -1
    options = {"label_weight": torch.tensor(B / (B - 1)), "class_weights_C": WEIGHTS}
    whole = mutual_losses(logits, some, None, **options).total
    parts = [
        mutual_losses(logits[:, s], some[s], None, **options).total
        for s in [range(2), [2, 3, 4, 5]]
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-14)
    assert (whole[:, 1] == 0).all()
    right = WEIGHTS[labels[2]] * -F.log_softmax(logits, -1)[:, 2, labels[2]] * B / (B - 1)
    torch.testing.assert_close(whole[:, 2], right)


def test_balanced_weights_are_inverse_frequencies_with_a_mean_of_1() -> None:
    # 12 images of three classes with any: 12 / (3 x 8), 12 / (3 x 3), 12 / (3 x 1).
    counts = torch.tensor([8, 0, 3, 1])
    weights = balanced_weights(counts)
    assert weights.tolist() == pytest.approx([0.5, 0, 4 / 3, 4])
    assert (weights * counts).sum() / counts.sum() == pytest.approx(1)
    labels = np.repeat([0, 2, 3], [8, 3, 1])
    theirs = compute_class_weight("balanced", classes=np.array([0, 2, 3]), y=labels)
    assert weights[[0, 2, 3]].tolist() == pytest.approx(theirs.tolist())
