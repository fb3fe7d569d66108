"""Divergences and targets: values by hand and those of torch, and laws of every divergence."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dml_accel.core.lessons import DIVERGENCES
from dml_accel.core.method import MethodConfig
from dml_accel.mutual import reference
from dml_accel.mutual.divergences import make_divergence
from dml_accel.mutual.losses import mutual_loss
from dml_accel.mutual.targets import Lesson
from tests.mutual.references import B, K, Terms, both, differ, fast

ln = math.log

# ---------------------------------------------------------------- by hand

ROOT2 = math.sqrt(2)
# Posteriors of the teacher and of the learner; the label is the first class.
TWO = ([0.8, 0.2], [0.5, 0.5])
THREE = ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5])
# What is written out here: KL = sum p ln(p / q), and 2/3, 1/3 are sqrt(.8), sqrt(.2) normalised.
BY_HAND: list[tuple[str, dict[str, float], Any, float]] = [
    ("kl", {}, TWO, 0.8 * ln(1.6) + 0.2 * ln(0.4)),
    ("reverse-kl", {}, TWO, 0.5 * ln(0.625) + 0.5 * ln(2.5)),
    ("jeffreys", {}, TWO, 0.15 * ln(4)),
    ("jsd", {}, TWO, (0.8 * ln(16 / 13) + 0.2 * ln(4 / 7) + 0.5 * ln(10 / 13 * 10 / 7)) / 2),
    ("renyi", {}, TWO, ln(1.36)),
    ("renyi", {"alpha": 0.5}, TWO, -2 * ln(math.sqrt(0.4) + math.sqrt(0.1))),
    ("dkd", {}, TWO, 0.8 * ln(1.6) + 0.2 * ln(0.4)),  # one other class: no second term
    ("dkd", {"alpha": 0.5, "beta": 2.0}, TWO, 0.4 * ln(1.6) + 0.1 * ln(0.4)),
    ("nkd", {}, TWO, 0.8 * ln(2)),
    ("ttm", {"gamma": 0.5}, TWO, 2 / 3 * ln(4 / 3) + 1 / 3 * ln(2 / 3)),
    ("wttm", {"gamma": 0.5}, TWO, 3 / math.sqrt(5) * (2 / 3 * ln(4 / 3) + 1 / 3 * ln(2 / 3))),
    ("kl", {}, THREE, 0.25 * ln(2)),
    ("reverse-kl", {}, THREE, 0.25 * ln(2)),
    ("jeffreys", {}, THREE, 0.25 * ln(2)),
    ("jsd", {}, THREE, 0.5 * ln(4 / 3) + 0.25 * ln(2 / 3)),
    (
        "jsd",  # m = (5/16, 1/4, 7/16)
        {"beta": 0.25},
        THREE,
        0.25 * (0.5 * ln(8 / 5) + 0.25 * ln(4 / 7)) + 0.75 * (0.25 * ln(4 / 5) + 0.5 * ln(8 / 7)),
    ),
    ("renyi", {}, THREE, ln(1.375)),
    ("renyi", {"alpha": 3.0}, THREE, ln(2 + 0.25 + 0.0625) / 2),
    # b = (1/2, 1/2) and (1/4, 3/4); r = (1/2, 1/2) and (1/3, 2/3).
    ("dkd", {}, THREE, 0.5 * ln(4 / 3) + 4 * ln(9 / 8)),
    ("dkd", {"alpha": 2.0, "beta": 0.0}, THREE, ln(4 / 3)),
    ("nkd", {}, THREE, 0.5 * ln(4) + 0.75 * ln(9 / 2)),
    # At L = 2 the learner's r is (1, sqrt 2) / (1 + sqrt 2).
    ("nkd", {"temperature": 2.0}, THREE, ln(2) + 6 * (ln(1 + ROOT2) - 0.25 * ln(2))),
    ("nkd", {"gamma": 0.0}, THREE, ln(2)),
    # p^2, normalised: (4, 1, 1) / 6; their sum is 3/8.
    ("ttm", {"gamma": 2.0}, THREE, 2 / 3 * ln(8 / 3) - 1 / 6 * ln(9 / 2)),
    ("wttm", {"gamma": 2.0}, THREE, (2 / 3 * ln(8 / 3) - 1 / 6 * ln(9 / 2)) * 3 / 8),
]


@both
@pytest.mark.parametrize(("name", "arguments", "posteriors", "right"), BY_HAND, ids=str)
def test_divergences_by_hand(
    terms: Terms,
    name: str,
    arguments: dict[str, float],
    posteriors: tuple[list[float], list[float]],
    right: float,
) -> None:
    z = torch.tensor(posteriors, dtype=torch.float64).log()[:, None] + 3  # 3 changes nothing
    found = terms(z, torch.tensor([0]), divergence=name, divergence_args=arguments)
    assert found[1].item() == pytest.approx(right, rel=1e-12)


def test_every_divergence_is_there_by_hand_and_in_the_reference() -> None:
    assert {name for name, *_ in BY_HAND} == set(DIVERGENCES) == set(reference.DIVERGENCES)


# Three peers with (.8, .2), (.5, .5) and (.2, .8), so log-odds ln 4, 0 and -ln 4; the label is the
# first class. Targets of the first, the second and the third peer: the posterior of the label.
ODDS = [ln(4), 0.0, -ln(4)]
TARGETS = {
    "mean-prob": [0.35, 0.5, 0.65],
    "mean-logit": [1 / 3, 1 / 2, 2 / 3],  # log-odds -ln 2, 0, ln 2
    "mean-logit-all": [0.5, 0.5, 0.5],
    "best": [0.8, 0.8, 0.8],
    "min-logit": [0.8, 0.8, 0.8],
}


@both
@pytest.mark.parametrize("target", TARGETS)
def test_targets_of_two_classes_by_hand(terms: Terms, target: str) -> None:
    z = torch.tensor([[[odds, 0.0]] for odds in ODDS], dtype=torch.float64)
    found = terms(z, torch.tensor([0]), target=target)[:, 0].tolist()
    right = [
        p * ln(p / q) + (1 - p) * ln((1 - p) / (1 - q))
        for p, q in zip(TARGETS[target], (0.8, 0.5, 0.2), strict=True)
    ]
    assert found == pytest.approx(right, rel=1e-12, abs=1e-15)


@both
@pytest.mark.parametrize(
    ("target", "taught"),
    [
        # Logs of (2, 1, 1) and (4, 5, 1): label 0 is more probable to the first, 2/4 to 4/10.
        ("best", (2 / 4, 1 / 4, 1 / 4)),
        # Over the label: (1, 1/2, 1/2) and (1, 5/4, 1/4); the smallest are (1, 1/2, 1/4).
        ("min-logit", (4 / 7, 2 / 7, 1 / 7)),
        # The geometric mean is (2 sqrt 2, sqrt 5, 1).
        (
            "mean-logit-all",
            tuple(v / (1 + math.sqrt(5) + 2 * ROOT2) for v in (2 * ROOT2, 5**0.5, 1)),
        ),
    ],
)
def test_targets_of_three_classes_by_hand(
    terms: Terms, target: str, taught: tuple[float, ...]
) -> None:
    z = torch.tensor([[[2.0, 1, 1]], [[4.0, 5, 1]]], dtype=torch.float64).log()
    found = terms(z, torch.tensor([0]), target=target)[:, 0].tolist()
    learners = ((2 / 4, 1 / 4, 1 / 4), (4 / 10, 5 / 10, 1 / 10))
    right = [sum(p * ln(p / q) for p, q in zip(taught, qs, strict=True)) for qs in learners]
    assert found == pytest.approx(right, rel=1e-12, abs=1e-15)


@both
def test_the_best_peer_is_another_one_on_another_row_and_the_first_of_two(
    terms: Terms,
) -> None:
    # Row 0: the label is 2, and the last peer knows it best. Row 1: the first two are equal in the
    # label's posterior alone. Temperature and size of the logits decide nothing.
    p = torch.tensor(
        [
            [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]],
            [[0.4, 0.4, 0.2], [0.6, 0.1, 0.3]],
            [[0.5, 0.1, 0.4], [0.3, 0.3, 0.4]],
        ],
        dtype=torch.float64,
    )
    found = terms(p.log() + 5, torch.tensor([2, 0]), target="best")
    torch.testing.assert_close(found[:, 0], (p[2, 0] * (p[2, 0] / p[:, 0]).log()).sum(-1))
    torch.testing.assert_close(found[:, 1], (p[0, 1] * (p[0, 1] / p[:, 1]).log()).sum(-1))


@both
def test_standardized_logits_by_hand(terms: Terms) -> None:
    # (2, 0, -2) + 7 and (0, .5, -.5): their means are 7 and 0, their deviations 2 and .5.
    z = torch.tensor([[[9.0, 7, 5]], [[0.0, 0.5, -0.5]]], dtype=torch.float64)
    found = terms(z, torch.tensor([0]), standardize=True)
    # KL of (e, 1, 1/e) and (1, e, 1/e), both over their sum, in each direction.
    right = (math.e - 1) / (math.e + 1 + 1 / math.e)
    assert found[:, 0].tolist() == pytest.approx([right, right], abs=1e-6)


@both
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_gate_by_hand(terms: Terms, reduction: str) -> None:
    # The label is the first class: only the first peer is right, and teaches the others alone.
    p = torch.tensor([[[0.8, 0.2]], [[0.4, 0.6]], [[0.1, 0.9]]], dtype=torch.float64)
    found = terms(p.log(), torch.tensor([0]), gate="correct", kl_reduction=reduction)[:, 0].tolist()
    # It still counts as one of two teachers.
    each = 0.5 if reduction == "mean" else 1.0
    right = [0.8 * ln(0.8 / q) + 0.2 * ln(0.2 / (1 - q)) for q in (0.4, 0.1)]
    assert found == pytest.approx([0, each * right[0], each * right[1]], rel=1e-12, abs=1e-15)


def test_the_cross_entropy_has_a_weight(logits: Tensor, labels: Tensor) -> None:
    for weight in (0.0, 0.1, 1.0):
        losses = mutual_loss(logits, labels, ce_weight=weight, kl_weight=0.7)
        right = F.cross_entropy(logits.flatten(0, 1), labels.repeat(K), reduction="none").view(K, B)
        torch.testing.assert_close(losses.total, weight * right + 0.7 * losses.kl)
        slowly = [
            reference.loss(k, list(logits), labels, ce_weight=weight, kl_weight=0.7)
            for k in range(K)
        ]
        torch.testing.assert_close(losses.total.mean(1), torch.stack(slowly), rtol=1e-12, atol=0)


# ---------------------------------------------------------------- as torch has them


@both
def test_divergences_are_those_of_torch(terms: Terms, logits: Tensor, labels: Tensor) -> None:
    z, method = logits[:2], {"temperature": 2.0}
    log_p, log_q = F.log_softmax(z / 2, -1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return 4 * F.kl_div(b, a, log_target=True, reduction="none").sum(-1)

    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    rights = {
        "kl": kl(log_p, log_q),
        "reverse-kl": kl(log_q, log_p),
        "jsd": (kl(log_p, log_m) + kl(log_q, log_m)) / 2,
    }
    for name, right in rights.items():
        torch.testing.assert_close(terms(z, labels, divergence=name, **method)[1], right)
    scaled = z / z.std(-1, keepdim=True)  # a softmax does not see the mean
    same, standardized = (
        terms(scaled, labels, **method),
        terms(z, labels, standardize=True, **method),
    )
    torch.testing.assert_close(standardized, same, rtol=1e-6, atol=0)


# ---------------------------------------------------------------- laws of all divergences


TRUE = set(DIVERGENCES) - {"nkd", "ttm", "wttm"}  # 0 at equality


@pytest.mark.parametrize("name", DIVERGENCES)
def test_linear_is_what_a_mean_of_lessons_makes_of_it(
    logits: Tensor, labels: Tensor, name: str
) -> None:
    divergence, log_p = make_divergence(name), F.log_softmax(logits, -1)
    taught = divergence.teach(log_p[1:], labels)
    each = torch.stack([divergence.learn(log_p[0], one, labels) for one in taught]).mean(0)
    of_mean = divergence.learn(log_p[0], taught.mean(0), labels)
    same = torch.allclose(each, of_mean, rtol=1e-12, atol=1e-12)
    assert same == divergence.linear == DIVERGENCES[name].linear
    assert same or differ(each, of_mean)
    if divergence.linear:
        nothing = divergence.learn(log_p[0], torch.zeros_like(taught[0]), labels)
        assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_0_at_equality_and_never_below(
    logits: Tensor, labels: Tensor, name: str
) -> None:
    divergence, log_p = make_divergence(name), F.log_softmax(logits, -1)
    equal = divergence.learn(log_p, divergence.teach(log_p, labels), labels)
    assert (equal.abs().max() < 1e-12) == (name in TRUE)
    everyone = F.log_softmax(torch.cat([logits, 5 * logits]), -1)
    found = divergence.learn(everyone[:, None], divergence.teach(everyone, labels), labels)
    assert found.shape == (2 * K, 2 * K, B)  # pairs
    assert found.min() > -1e-12  # cross-entropies and matched powers are not below 0 either


@pytest.mark.parametrize("name", DIVERGENCES)
def test_only_the_learner_has_a_gradient(logits: Tensor, labels: Tensor, name: str) -> None:
    z = logits.clone().requires_grad_()
    found = fast(z, labels, divergence=name)
    for k in range(K):
        (slope,) = torch.autograd.grad(found[k].sum(), z, retain_graph=True)
        assert slope[k].abs().max() > 1e-3
        assert slope[[peer for peer in range(K) if peer != k]].abs().max() == 0


EXTREME = torch.tensor(
    [
        [1e4, -1e4, 0.0, 0.0],
        [-1e4, 1e4, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
        [1e4, 1e4, 1e4, 1e4],
        [100.0, 0.0, 0.0, 0.0],
        [-1e4, -1e4, -1e4, 1e4],
    ]
)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(
    "changes", [{}, {"standardize": True}, {"target": "min-logit"}, {"target": "best"}], ids=str
)
def test_extreme_logits_give_finite_losses(name: str, changes: dict[str, Any]) -> None:
    if "target" in changes and DIVERGENCES[name].own_temperature:
        return
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    for label in (0, 3):
        z = EXTREME[pairs.T].clone().requires_grad_()  # [2, 36, 4]
        losses = mutual_loss(z, torch.full((36,), label), divergence=name, **changes)
        assert losses.kl.dtype == torch.float32 and losses.total.isfinite().all()
        losses.total.sum().backward()
        assert z.grad.isfinite().all()
        if name in TRUE:
            assert losses.kl.min() > -1e-3 * losses.kl.abs().max()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted(
    logits: Tensor, labels: Tensor, name: str, dtype: torch.dtype
) -> None:
    half = logits.to(dtype)
    for standardize in (False, True):
        method = {"divergence": name, "standardize": standardize}
        found = fast(half, labels, **method)
        assert found.dtype == torch.float32
        assert torch.equal(found, fast(half.float(), labels, **method))


@pytest.mark.parametrize("arguments", [{"alpha": 1.002}, {"alpha": 0.998}], ids=str)
def test_renyi_near_1_is_kl(logits: Tensor, labels: Tensor, arguments: dict[str, float]) -> None:
    found = fast(logits, labels, divergence="renyi", divergence_args=arguments)
    torch.testing.assert_close(found, fast(logits, labels), rtol=5e-3, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_what_is_said_of_a_divergence_is_true(logits: Tensor, labels: Tensor, name: str) -> None:
    found, facts = make_divergence(name), DIVERGENCES[name]
    assert (found.linear, found.needs_labels) == (facts.linear, facts.needs_labels)
    if facts.linear:
        taught = found.teach(F.log_softmax(logits, -1), labels)
        assert taught.shape[-1] == facts.taught(logits.shape[-1])
        contributed = Lesson("peers", found).contributions(logits, labels)
        numbers = MethodConfig(divergence=name).numbers_taught(logits.shape[-1])
        assert contributed.shape[-1] == numbers
