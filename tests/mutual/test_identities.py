"""Identities between divergences and targets, and the mistakes of other implementations."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dml_accel.core.lessons import DIVERGENCES
from dml_accel.mutual import reference
from tests.mutual.references import B, C, K, Terms, both, differ, fast, gradient

# ---------------------------------------------------------------- identities


@both
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_identity_1_forward_kl_is_that_from_the_mean_posterior(
    terms: Terms, logits: Tensor, labels: Tensor, temperature: float
) -> None:
    method = {"temperature": temperature}
    one, other = (
        gradient(terms, logits, labels, target=t, **method) for t in ("peers", "mean-prob")
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    # Their values differ by a constant, H(mean p) - mean H(p).
    p = F.softmax(logits / temperature, -1)
    for k in range(K):
        others = p[[peer for peer in range(K) if peer != k]]
        constant = (others * others.log()).sum(-1).mean(0)
        constant = constant - (others.mean(0) * others.mean(0).log()).sum(-1)
        gap = terms(logits, labels, **method) - terms(logits, labels, target="mean-prob", **method)
        torch.testing.assert_close(gap[k], temperature**2 * constant)


@both
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_identity_2_reverse_kl_is_that_to_the_mean_logits(
    terms: Terms, logits: Tensor, labels: Tensor, temperature: float
) -> None:
    method = {"temperature": temperature, "divergence": "reverse-kl"}
    one, other = (
        gradient(terms, logits, labels, target=t, **method) for t in ("peers", "mean-logit")
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    z = logits / temperature
    gap = terms(logits, labels, **method) - terms(logits, labels, target="mean-logit", **method)
    for k in range(K):
        others = z[[peer for peer in range(K) if peer != k]]
        constant = others.logsumexp(-1).mean(0) - others.mean(0).logsumexp(-1)
        torch.testing.assert_close(gap[k], temperature**2 * constant)
    # Jeffreys: half of it, and half of identity 1.
    half = gradient(terms, logits, labels, target="mean-prob", temperature=temperature) + other
    jeffreys = gradient(terms, logits, labels, divergence="jeffreys", temperature=temperature)
    torch.testing.assert_close(jeffreys, half / 2, rtol=0, atol=1e-12)


def test_identity_2_with_weights(logits: Tensor, labels: Tensor) -> None:
    # Sum w times the reverse KL to the posterior of sum w z / sum w, but for a constant.
    links, w = [[0.0, 0.5, 2.0]] * K, torch.tensor([0.5, 2.0], dtype=torch.float64)
    z = logits.clone().requires_grad_()
    found = reference.loss(
        0, list(z), labels, ce_weight=0.0, links=links, kl_reduction="sum", divergence="reverse-kl"
    )
    target = torch.einsum("l,lbc->bc", w, logits[1:]) / w.sum()
    log_q = F.log_softmax(z[0], -1)
    right = w.sum() * F.kl_div(
        F.log_softmax(target, -1), log_q, log_target=True, reduction="batchmean"
    )
    one, other = (torch.autograd.grad(value, z, retain_graph=True)[0] for value in (found, right))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@both
def test_identity_3_a_mean_with_oneself_is_a_smaller_weight(
    terms: Terms, logits: Tensor, labels: Tensor
) -> None:
    z = logits.clone().requires_grad_()
    mean = F.softmax(logits, -1).mean(0).expand(K, B, C)
    own = F.kl_div(F.log_softmax(z, -1), mean, reduction="sum")
    (with_oneself,) = torch.autograd.grad(own, z)
    dml = gradient(terms, logits, labels)
    torch.testing.assert_close(with_oneself, (K - 1) / K * dml, rtol=0, atol=1e-12)


def parts(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p_t, [..., B, 1], b, [..., B, 2], and the posterior of the other classes, [..., B, C - 1]."""
    p = F.softmax(logits, -1)
    label = F.one_hot(labels, logits.shape[-1]).bool().expand(p.shape)
    p_t = p[label].view(*p.shape[:-1], 1)
    rest = p[~label].view(*p.shape[:-1], -1)
    return p_t, torch.cat([p_t, 1 - p_t], -1), rest / rest.sum(-1, keepdim=True)


def kl_of(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def one_lesson(z: Tensor, labels: Tensor, name: str, *, of_mean: bool = False) -> Tensor:
    """DKD or NKD of the first peer from the mean of what the others teach, [B]."""
    p_t, b, r = (part.detach().mean(0) for part in parts(z[1:], labels))
    if of_mean:  # the mistake: not the mean of the renormalised posteriors
        _, _, r = parts(F.softmax(z[1:], -1).mean(0).log().detach(), labels)
    q_t, b_k, r_k = parts(z[0], labels)
    if name == "dkd":
        return kl_of(b, b_k) + 8 * kl_of(r, r_k)
    return -(p_t * q_t.log()).sum(-1) - 1.5 * (r * r_k.log()).sum(-1)


@both
@pytest.mark.parametrize("name", ["dkd", "nkd"])
def test_identity_4_a_mean_of_lessons_with_labels_is_one_lesson(
    terms: Terms, logits: Tensor, labels: Tensor, name: str
) -> None:
    ours = gradient(terms, logits, labels, divergence=name)[0]
    right, wrong = (
        gradient(one_lesson, logits, labels, name, of_mean=of_mean)[0] for of_mean in (False, True)
    )
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-12)
    assert differ(ours, wrong)
    gap = terms(logits, labels, divergence=name)[0] - one_lesson(logits, labels, name)
    if name == "dkd":  # entropies of the mean and of each
        _, b, r = parts(logits[1:], labels)
        gap = gap - sum(
            w * ((x * x.log()).sum(-1).mean(0) - (x.mean(0) * x.mean(0).log()).sum(-1))
            for w, x in ((1, b), (8, r))
        )
    torch.testing.assert_close(gap, torch.zeros_like(gap))


@both
def test_identity_5_dkd_with_the_teachers_own_weight_is_kl(
    terms: Terms, logits: Tensor, labels: Tensor
) -> None:
    for row in range(B):
        z, y = logits[:2, [row]], labels[[row]]
        beta = 1 - F.softmax(z[0, 0], -1)[y].item()
        dkd = {"divergence": "dkd", "divergence_args": {"alpha": 1.0, "beta": beta}}
        torch.testing.assert_close(terms(z, y, **dkd)[1], terms(z, y)[1], rtol=1e-12, atol=0)
        one, other = gradient(terms, z, y, **dkd)[1], gradient(terms, z, y)[1]
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@both
def test_identity_6_jeffreys_has_the_gradient_of_joined_graphs(
    terms: Terms, logits: Tensor, labels: Tensor
) -> None:
    def joined(z: Tensor) -> Tensor:  # as PaddleClas does it: nothing is detached
        p = F.softmax(z, -1)
        return (kl_of(p[0], p[1]) + kl_of(p[1], p[0])) / 2

    ours = gradient(terms, logits[:2], labels, divergence="jeffreys")
    torch.testing.assert_close(ours, gradient(joined, logits[:2]), rtol=0, atol=1e-12)
    assert differ(ours, gradient(terms, logits[:2], labels))  # it is another loss than DML's


@both
@pytest.mark.parametrize("name", ["jsd", "renyi"])
def test_identity_7_two_divergences_do_not_become_one_lesson(
    terms: Terms, logits: Tensor, labels: Tensor, name: str
) -> None:
    ours = gradient(terms, logits, labels, divergence=name)[0]
    for mean in (F.softmax(logits[1:], -1).mean(0).log(), logits[1:].mean(0)):
        alone = gradient(terms, torch.stack([logits[0], mean]), labels, divergence=name)[0]
        assert differ(ours, alone)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("changes", [{}, {"standardize": True}], ids=str)
def test_gradients_are_finite_differences(
    logits: Tensor, labels: Tensor, name: str, changes: dict[str, Any]
) -> None:
    # Of each learner in a direction: the loss of peer k sees nothing but constants beside z_k.
    method = {"divergence": name} | changes
    if not DIVERGENCES[name].own_temperature:
        method["temperature"] = 2.0
    exact = gradient(fast, logits, labels, **method)
    way = torch.randn(K, B, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for k in range(K):
        step = torch.zeros_like(way)
        step[k] = 1e-5 * way[k]
        ahead, behind = (fast(logits + s * step, labels, **method)[k].sum() for s in (1, -1))
        found, right = ((ahead - behind) / 2e-5).item(), (exact[k] * way[k]).sum().item()
        assert found == pytest.approx(right, rel=1e-6, abs=1e-8)


# ---------------------------------------------------------------- mistakes of others


def dml(z: Tensor, *, detached: bool = True) -> Tensor:
    """KL(p_l || p_k) of two peers, [2, B]."""
    taught = z.detach() if detached else z
    return torch.stack(
        [
            F.kl_div(F.log_softmax(z[k], -1), F.softmax(taught[1 - k], -1), reduction="none").sum(
                -1
            )
            for k in (0, 1)
        ]
    )


@both
def test_teachers_that_are_not_constant(terms: Terms, logits: Tensor, labels: Tensor) -> None:
    z = logits[:2]
    ours = gradient(terms, z, labels)
    torch.testing.assert_close(ours, gradient(dml, z), rtol=0, atol=1e-12)
    assert differ(ours, gradient(dml, z, detached=False))


@both
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("kl", {}),
        ("reverse-kl", {}),
        ("jsd", {"beta": 0.3}),
        ("renyi", {}),
        ("dkd", {}),
        ("nkd", {}),
        ("ttm", {}),
        ("wttm", {}),
    ],
)
def test_reversed_arguments(
    terms: Terms, logits: Tensor, labels: Tensor, name: str, arguments: dict
) -> None:
    found = terms(logits[:2], labels, divergence=name, divergence_args=arguments)
    of_pair = reference.DIVERGENCES[name]
    right, wrong = (
        torch.stack(
            [
                of_pair(logits[a, row], logits[b, row], int(labels[row]), **arguments)
                for row in range(B)
            ]
        )
        for a, b in ((0, 1), (1, 0))
    )
    torch.testing.assert_close(found[1], right, rtol=1e-12, atol=1e-12)
    assert differ(found[1], wrong)


@both
def test_other_reductions_and_scales(terms: Terms, logits: Tensor, labels: Tensor) -> None:
    z = logits[:2]
    log_p, log_q = F.log_softmax(z / 3, -1)
    ours = terms(z, labels, temperature=3.0)[1].mean()
    right = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    torch.testing.assert_close(ours, 9 * right)
    # Without T^2; with T; kl_div's reductions "mean", over rows and classes, and "sum".
    for wrong in (right, 3 * right, 9 * right / C, 9 * right * B):
        assert differ(ours, wrong)


@both
def test_other_standardisations(terms: Terms, logits: Tensor, labels: Tensor) -> None:
    def as_logits(z: Tensor, correction: int = 1, learner: bool = True) -> Tensor:
        deviation = z.std(-1, correction=correction, keepdim=True)
        teach = ((z - z.mean(-1, keepdim=True)) / (deviation + 1e-7)).detach()
        learn = (z - z.mean(-1, keepdim=True)) / (deviation + 1e-7) if learner else z
        return torch.stack(
            [kl_of(F.softmax(teach[1 - k], -1), F.softmax(learn[k], -1)) for k in (0, 1)]
        )

    z = logits[:2]
    ours = terms(z, labels, standardize=True)
    torch.testing.assert_close(ours, as_logits(z), rtol=1e-12, atol=1e-12)
    assert differ(ours, as_logits(z, correction=0))  # biased
    assert differ(ours, as_logits(z, learner=False))  # teachers only
    slope = gradient(terms, z, labels, standardize=True)
    torch.testing.assert_close(slope, gradient(as_logits, z), rtol=0, atol=1e-12)
    # A learner whose mean and deviation are constants would have another gradient.
    scale = z.std(-1, keepdim=True) + 1e-7
    constant = gradient(terms, z / scale, labels) / scale
    assert differ(slope, constant)
