"""Divergences and targets of the user's own: values, combinations, and what is refused."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dml_accel
from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.core.method import MethodConfig
from dml_accel.mutual.losses import mutual_loss
from dml_accel.mutual.teaching import Teaching
from tests.mutual.references import B, C, K, gradient
from tests.mutual.test_combinations import LINKS, NAMES

pytestmark = pytest.mark.usefixtures("registry")


class Copy(dml_accel.Divergence):
    """KL, as two functions."""

    def teach(self, log_p: Tensor, labels: Tensor) -> Tensor:
        p = log_p.exp()
        return torch.cat([p, (p * log_p).sum(-1, keepdim=True)], dim=-1)

    def learn(self, log_q: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        return taught[..., -1] - (taught[..., :-1] * log_q).sum(-1)


def of_pairs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL, as a function."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class Mean(dml_accel.Target):
    """The mean logits."""

    def contribute(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits

    def combine(self, mean: Tensor, labels: Tensor) -> Tensor:
        return mean


class MeanOfAll(Mean):
    shared = True


def weighted(logits_LBC: Tensor, weights_LB: Tensor) -> Tensor:
    """The mean logits, as a function."""
    return (weights_LB[..., None] * logits_LBC).sum(0) / weights_LB.sum(0)[:, None]


def largest(logits: Tensor, weights: Tensor) -> Tensor:
    """Class by class, the largest logit of any teacher."""
    return logits.masked_fill((weights == 0)[..., None], -1e9).amax(0)


def hellinger(log_p: Tensor, log_q: Tensor, scale: float = 1.0) -> Tensor:
    """1 - sum sqrt(p q), times a number."""
    return scale * (1 - ((log_p + log_q) / 2).exp().sum(-1))


# ---------------------------------------------------------------- values


def test_an_own_divergence_by_hand(logits: Tensor, labels: Tensor) -> None:
    dml_accel.register_divergence("own")(hellinger)
    z = torch.tensor([[0.8, 0.2], [0.5, 0.5]], dtype=torch.float64).log()[:, None]
    right = 1 - math.sqrt(0.4) - math.sqrt(0.1)
    found = mutual_loss(z, torch.tensor([0]), divergence="own")
    assert found.kl[:, 0].tolist() == pytest.approx([right, right], rel=1e-12)
    tripled = mutual_loss(z, torch.tensor([0]), divergence="own", divergence_args={"scale": 3.0})
    assert tripled.kl[0].item() == pytest.approx(3 * right, rel=1e-12)


def test_labels_reach_the_rows_that_they_belong_to(logits: Tensor, labels: Tensor) -> None:
    @dml_accel.register_divergence("own")
    def of_label(log_q: Tensor, log_p: Tensor, labels_N: Tensor) -> Tensor:
        rows = torch.arange(len(labels_N))
        return log_p.exp()[rows, labels_N] * -log_q[rows, labels_N]

    log_p = logits.log_softmax(-1)
    right: list[Any] = [
        sum(
            -log_p[other, row, labels[row]].exp() * log_p[k, row, labels[row]]
            for other in range(K)
            if other != k
        )
        / (K - 1)
        for k in range(K)
        for row in range(B)
    ]
    found = mutual_loss(logits, labels, divergence="own").kl
    torch.testing.assert_close(found, torch.stack(right).view(K, B))


def test_an_own_target_by_hand() -> None:
    dml_accel.register_target("own")(largest)
    z = torch.tensor([[0.8, 0.2], [0.5, 0.5], [0.2, 0.8]], dtype=torch.float64).log()[:, None]
    found = mutual_loss(z, torch.tensor([0]), target="own").kl[:, 0]
    # Of the first peer: larger of (.5, .5) and (.2, .8), made to sum to 1; of the second: even.
    p = 5 / 13
    first = p * math.log(p / 0.8) + (1 - p) * math.log((1 - p) / 0.2)
    assert found.tolist() == pytest.approx([first, 0, first], rel=1e-12, abs=1e-12)


SAME = [
    ("divergence", Copy, {}, {"divergence": "kl"}, 0.0),
    ("divergence", of_pairs, {}, {"divergence": "kl"}, 1e-12),
    ("target", Mean, {}, {"target": "mean-logit"}, 0.0),
    ("target", weighted, {}, {"target": "mean-logit"}, 1e-12),
    ("target", MeanOfAll, {}, {"target": "mean-logit-all"}, 0.0),
    ("target", weighted, {"shared": True}, {"target": "mean-logit-all"}, 1e-12),
]
same = pytest.mark.parametrize(("kind", "thing", "words", "ours", "close"), SAME)


def assert_close(one: Tensor, other: Tensor, close: float) -> None:
    if close:
        torch.testing.assert_close(one, other, rtol=close, atol=close)
    else:
        assert torch.equal(one, other)


def register(kind: str, thing: Any, words: dict[str, Any]) -> None:
    register_one: Callable[..., Any] = getattr(dml_accel, f"register_{kind}")
    register_one("own", **words)(thing)


@same
@pytest.mark.parametrize(
    "others", [{}, {"temperature": 3.0, "standardize": True}, {"divergence": "renyi"}], ids=str
)
def test_a_copy_of_ours_is_ours(
    logits: Tensor,
    labels: Tensor,
    kind: str,
    thing: Any,
    words: dict[str, Any],
    ours: dict[str, Any],
    close: float,
    others: dict[str, Any],
) -> None:
    if kind == "divergence" and "divergence" in others:
        others = {"target": "mean-logit"}  # made of logits, of which ours takes a shortcut
        close = 1e-12
    register(kind, thing, words)
    found = [
        [
            mutual_loss(logits, labels, **others | one).total,
            gradient(lambda *z, **m: mutual_loss(*z, **m).total, logits, labels, **others | one),
        ]
        for one in ({kind: "own"}, ours)
    ]
    for own, right in zip(*found, strict=True):
        assert_close(own, right, close)


@same
@pytest.mark.parametrize("linked", [False, True])
def test_links_frozen_peers_and_rows_that_are_not_finite(
    logits: Tensor,
    labels: Tensor,
    kind: str,
    thing: Any,
    words: dict[str, Any],
    ours: dict[str, Any],
    close: float,
    linked: bool,
) -> None:
    register(kind, thing, words)
    if linked and ours.get("target") == "mean-logit-all":
        return  # one target for all has no links, which Config refuses
    frozen = 2 * torch.randn(1, B, C, generator=torch.Generator().manual_seed(3)).double()
    taught = logits.clone()
    taught[1, 2, 0] = torch.nan
    frozen[0, 0, 1] = -torch.inf
    found = []
    for one in ({kind: "own"}, ours):
        config = Config(**one, frozen_peers=("x",)).method
        teaching = Teaching(config, NAMES, ["frozen-0"], LINKS if linked else None)
        everyone, theirs = (teaching.contributions(z, labels) for z in (taught, frozen))
        z = logits.clone().requires_grad_()
        total = torch.cat(
            [
                teaching.losses(
                    z[[place]],
                    labels,
                    teaching.targets_of(place, everyone, labels, theirs),
                    kl_weight=1.0,
                    label_weight=None,
                ).total
                for place in range(K)
            ]
        )
        found.append([total.detach(), *torch.autograd.grad(total.sum(), z)])
    assert found[0][0].isfinite().all()
    for own, right in zip(*found, strict=True):
        assert_close(own, right, close)


def test_a_teacher_that_does_not_count_spoils_no_function(logits: Tensor, labels: Tensor) -> None:
    # Of zeros, which are no posterior, this one makes infinity.
    @dml_accel.register_divergence("own")
    def log_odds(log_p: Tensor, log_q: Tensor) -> Tensor:
        return ((log_p - torch.log1p(-log_p.exp()) - log_q).square()).sum(-1)

    spoilt = logits.clone()
    spoilt[1] = torch.nan
    z = spoilt.requires_grad_()
    found = mutual_loss(z, labels, divergence="own").kl
    right = mutual_loss(logits[[0, 2]], labels, divergence="own").kl
    torch.testing.assert_close(found[[0, 2]], right)
    (ours,) = torch.autograd.grad(found[[0, 2]].sum(), z)
    assert ours[[0, 2]].isfinite().all() and ours[0].any()


def test_one_that_derives_from_ours_is_not_taken_for_it(logits: Tensor, labels: Tensor) -> None:
    from dml_accel.mutual.divergences import KL

    @dml_accel.register_divergence("own")
    class Twice(KL):
        def teach(self, log_p: Tensor, labels: Tensor) -> Tensor:
            return 2 * super().teach(log_p, labels)

    for target in ("peers", "mean-logit"):
        found = mutual_loss(logits, labels, divergence="own", target=target).kl
        torch.testing.assert_close(found, 2 * mutual_loss(logits, labels, target=target).kl)


# ---------------------------------------------------------------- facts


@pytest.mark.parametrize(
    ("kind", "thing", "numbers", "refused"),
    [
        ("divergence", Copy, C + 2, ""),
        ("divergence", of_pairs, C + 1, "--exchange sum"),
        ("target", Mean, C + 1, ""),
        ("target", weighted, C + 1, "--exchange sum"),
    ],
)
def test_what_is_exchanged(kind: str, thing: Any, numbers: int, refused: str) -> None:
    register(kind, thing, {})
    assert Config(**{kind: "own"}).method.numbers_taught(C) == numbers
    if refused:
        with pytest.raises(UsageError, match=rf"--{kind} own compares peers .* {refused}"):
            Config(**{kind: "own"}, exchange="sum")
    else:
        Config(**{kind: "own"}, exchange="sum")


def test_w_is_measured() -> None:
    @dml_accel.register_target("own")
    class Wide(Mean):
        def contribute(self, logits: Tensor, labels: Tensor) -> Tensor:
            return torch.cat([logits, logits.square()], -1)

        def combine(self, mean: Tensor, labels: Tensor) -> Tensor:
            return mean.chunk(2, -1)[0]

    assert MethodConfig(target="own").numbers_taught(7) == 15


@pytest.mark.parametrize("kind", ["divergence", "target"])
def test_labels_need_one_label_for_each_image(kind: str) -> None:
    def divergence(log_p: Tensor, log_q: Tensor, labels: Tensor) -> Tensor:
        return of_pairs(log_p, log_q)

    def target(logits: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
        return weighted(logits, weights)

    register(kind, {"divergence": divergence, "target": target}[kind], {})
    for flags in ({"mixup": 0.5}, {"labelled_fraction": 0.5}):
        with pytest.raises(UsageError, match=f"--{kind} own needs"):
            Config(**{kind: "own"}, **flags)
    Config(**{kind: "own"}, labelled_fraction=0.5, kl_images="labelled")


def test_defaults_of_a_class_are_its_arguments(logits: Tensor, labels: Tensor) -> None:
    @dml_accel.register_divergence("own")
    class Scaled(Copy):
        defaults: ClassVar = {"scale": 2.0}

        def learn(self, log_q: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
            return self.arguments["scale"] * super().learn(log_q, taught, labels)

    kl = mutual_loss(logits, labels).kl
    for numbers, factor in ((None, 2), ({"scale": 5}, 5)):
        found = mutual_loss(logits, labels, divergence="own", divergence_args=numbers).kl
        torch.testing.assert_close(found, factor * kl)
    with pytest.raises(UsageError, match="--divergence own has no such argument; it takes scale"):
        mutual_loss(logits, labels, divergence="own", divergence_args={"other": 1.0})


# ---------------------------------------------------------------- what is refused


def changes_in_place(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp_() * -log_q).sum(-1)


def draws(log_p: Tensor, log_q: Tensor) -> Tensor:
    return of_pairs(log_p, log_q) * torch.rand(())


def of_the_batch(log_p: Tensor, log_q: Tensor) -> Tensor:
    return of_pairs(log_p, log_q) - of_pairs(log_p, log_q).mean()


def many(log_p: Tensor, log_q: Tensor, *others: Tensor) -> Tensor:
    return of_pairs(log_p, log_q)


def unknown(log_p: Tensor, log_q: Tensor, teacher: Tensor) -> Tensor:
    return of_pairs(log_p, log_q)


class Squared(Copy):
    """Not linear."""

    def learn(self, log_q: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        return super().learn(log_q, taught, labels).square()


class Shifted(Copy):
    """Affine."""

    def learn(self, log_q: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        return super().learn(log_q, taught, labels) + 1


class Infinite(Squared):
    linear = False

    def learn(self, log_q: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        return 1 / taught[..., -1] * log_q.sum(-1)


class OfLabel(Copy):
    def learn(self, log_q: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        return super().learn(log_q, taught, labels) * (1 + labels)


class Unfinished(dml_accel.Divergence):
    def teach(self, log_p: Tensor, labels: Tensor) -> Tensor:
        return log_p


def ignores_weights(logits: Tensor, weights: Tensor) -> Tensor:
    return logits.mean(0)


REFUSED = [
    (
        "divergence",
        lambda log_p, log_q: log_q.sum(-1, keepdim=True),
        r"returns \[6, 1\] for .*\[6\]",
    ),
    ("divergence", lambda log_p, log_q: 1.0, "returns float, not a tensor"),
    ("divergence", lambda log_p, log_q: (log_q / 0).sum(-1), "not finite"),
    ("divergence", lambda log_p, log_q: log_q.missing, "fails: AttributeError: 'Tensor' object"),
    ("divergence", lambda log_p, log_q: log_q.sum(-1).float(), "keep the precision"),
    ("divergence", lambda log_p, log_q: of_pairs(log_p, log_q.detach()), "no gradient reaches"),
    ("divergence", lambda log_p, log_q: (log_q * 0).sum(-1), "no gradient reaches log_q"),
    ("divergence", lambda log_p, log_q: (log_q - log_q).sum(-1).sqrt(), "gradient .*not finite"),
    ("divergence", lambda log_p: log_p.sum(-1), "has no parameter log_q; it takes log_p and log_q"),
    ("divergence", lambda log_p, log_q, x=True: log_q.sum(-1), "x needs a finite number"),
    ("divergence", changes_in_place, "changes what it is given"),
    ("divergence", draws, "another result each time"),
    ("divergence", of_the_batch, "a row depend on the other rows"),
    ("divergence", many, "others cannot be given by name"),
    ("divergence", unknown, "teacher needs a finite number as its default"),
    ("divergence", Squared, "linear is True, but learn of the mean of what 4 teachers teach"),
    ("divergence", Shifted, "learn of zeros is 1, not 0"),
    ("divergence", Infinite, "learn of zeros, .* is not finite"),
    ("divergence", OfLabel, "depends on labels: set needs_labels = True"),
    ("divergence", Unfinished, "abstract"),
    ("divergence", Mean, "Mean is not a subclass of dml_accel.Divergence"),
    ("divergence", F.relu_, "register a function or a class"),
    ("target", ignores_weights, "depends on logits of a teacher whose weight is 0"),
    ("target", lambda logits: logits.mean(0), "has no parameter weights; it takes logits and"),
    ("target", lambda logits, weights: logits.sum(), r"returns \[\] for .*, not \[6, 5\]"),
    ("target", lambda logits, weights, other: logits[0], "parameter other is unknown"),
    ("target", Copy, "Copy is not a subclass of dml_accel.Target"),
]


@pytest.mark.parametrize(("kind", "thing", "why"), REFUSED)
def test_what_cannot_be_used_is_refused(kind: str, thing: Any, why: str) -> None:
    with pytest.raises(UsageError, match=f"{kind} 'own'.*{why}") as refusal:
        register(kind, thing, {})
    assert "\n" not in str(refusal.value)
    with pytest.raises(UsageError, match="must be one of"):
        Config(**{kind: "own"})


def test_the_check_draws_nothing_from_torch() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    dml_accel.register_divergence("own")(of_pairs)
    with pytest.raises(UsageError):
        dml_accel.register_divergence("own")(draws)
    assert torch.equal(torch.get_rng_state(), before)
