"""Every way to learn together, step by step against the slow reference, in double precision."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dml_accel.models.optim import make_optimizer
from dml_accel.mutual import losses, reference
from dml_accel.mutual.targets import Lesson
from tests.helpers import assert_same_state
from tests.mutual.references import (
    PAIR,
    TRIO,
    Build,
    assert_as_reference,
    batch_of,
    link_rows,
    loss_options,
    nets_in_turn,
)

# ---------------------------------------------------------------- the schedules


@pytest.mark.parametrize(
    "changes",
    [
        {"cohort": PAIR},
        {"cohort": TRIO},
        {"cohort": ("wrn_16_2", "resnet8*2"), "temperature": 2.0, "kl_weight": 0.5},
        {"cohort": PAIR, "clip_norm": 0.5},
        {"cohort": TRIO, "target": "mean-logit"},
        {"cohort": TRIO, "links": "ring"},
        {"cohort": PAIR, "mixup": 1.0},
    ],
    ids=str,
)
def test_sequential_equals_algorithm_1(training: Build, changes: dict) -> None:
    fast = training(update="sequential", **changes)
    nets = nets_in_turn(fast)
    optimizers = [make_optimizer(net, fast.config.optim) for net in nets]
    for number in range(3):
        (found,) = fast.take(1, number)
        batch = batch_of(fast, number, 0, 8)
        expected = reference.sequential_step(
            nets,
            optimizers,
            batch,
            fast.config.optim.clip_norm,
            links=link_rows(fast),
            **loss_options(fast.config),
        )
        assert_as_reference(fast, nets, found, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"cohort": PAIR},
        {"cohort": TRIO, "temperature": 2.0},
        {"cohort": TRIO, "clip_norm": 0.5},
        {"cohort": PAIR, "mixup": 1.0, "cutmix": 1.0},
    ],
    ids=str,
)
def test_official_equals_the_authors_code(training: Build, changes: dict) -> None:
    fast = training(update="official", **changes)
    nets = nets_in_turn(fast)
    optimizers = [make_optimizer(net, fast.config.optim) for net in nets]
    for number in range(3):
        (found,) = fast.take(1, number)
        batches = [batch_of(fast, number * len(nets) + turn, 0, 8) for turn in range(len(nets))]
        expected = reference.official_step(
            nets, optimizers, batches, fast.config.optim.clip_norm, **loss_options(fast.config)
        )
        assert_as_reference(fast, nets, found, expected)


def test_peers_take_turns_in_the_order_of_the_command_line(training: Build) -> None:
    # Of two equal cohorts in opposite orders, the first one learns from old predictions.
    one = training(cohort=("resnet8", "wrn_16_2"), update="sequential")
    other = training(cohort=("wrn_16_2", "resnet8"), update="sequential")
    for t in (one, other):
        t.take(1)
    weight = "conv1.weight"
    a, b = (t.states()["resnet8-0"][weight] for t in (one, other))
    assert not torch.equal(a, b)


@pytest.mark.parametrize(
    ("update", "forwards", "batches"),
    # K = 3: one each; 2K - 1, the last need not predict again; K for each of K batches.
    [("simultaneous", 3, 1), ("sequential", 5, 1), ("official", 9, 3)],
)
def test_forward_passes_and_statistics_once_a_batch(
    training: Build, update: str, forwards: int, batches: int
) -> None:
    t = training(cohort=TRIO, update=update)
    calls = [0]
    for peer in t.peers:
        peer.module.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    t.take(1)
    assert calls[0] == forwards
    for peer in t.peers:
        norm = next(m for m in peer.module.modules() if isinstance(m, torch.nn.BatchNorm2d))
        assert norm.num_batches_tracked == batches


@pytest.mark.parametrize("update", ["sequential", "official"])
def test_one_peer_trains_independently_by_every_schedule(training: Build, update: str) -> None:
    alone, usual = training(cohort=("resnet8",), update=update), training(cohort=("resnet8",))
    for t in (alone, usual):
        t.take(3)
    assert_same_state(alone.states()["resnet8-0"], usual.states()["resnet8-0"])


def test_without_kl_sequential_is_independent_training(training: Build) -> None:
    t, usual = (
        training(cohort=PAIR, update=update, kl_weight=0.0)
        for update in ("sequential", "simultaneous")
    )
    for one in (t, usual):
        one.take(3)
    for name, state in usual.states().items():
        assert_same_state(t.states()[name], state)


# ---------------------------------------------------------------- the targets


@pytest.fixture
def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(4, 6, 10, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("target", ["peers", "mean-prob", "mean-logit"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_targets_equal_the_reference(logits: torch.Tensor, target: str, temperature: float) -> None:
    labels = torch.arange(6)
    z = logits.clone().requires_grad_()
    fast = losses.mutual_loss(z, labels, temperature=temperature, target=target).total.mean(1)
    fast.sum().backward()
    slow = [peer.clone().requires_grad_() for peer in logits]
    right = [
        reference.loss(k, slow, labels, temperature=temperature, target=target) for k in range(4)
    ]
    sum(right).backward()
    torch.testing.assert_close(fast, torch.stack(right), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(z.grad, torch.stack([peer.grad for peer in slow]))


def test_mean_prob_trains_as_peers_does_and_mean_logit_does_not(
    training: Build,
) -> None:
    # The identity of the paper's DML_e with DML: another value of the loss, the same gradient.
    trained = {}
    for target in ("peers", "mean-prob", "mean-logit"):
        t = training(cohort=TRIO, target=target)
        (found,) = t.take(1)
        trained[target] = t.states()
        trained[f"{target} kl"] = found[:, 2]
    for name, state in trained["peers"].items():
        for key, value in state.items():
            torch.testing.assert_close(value, trained["mean-prob"][name][key], rtol=0, atol=1e-12)
    assert (trained["peers kl"] > trained["mean-prob kl"]).all()
    weight = "conv1.weight"
    assert not torch.allclose(
        trained["peers"]["resnet8-0"][weight], trained["mean-logit"]["resnet8-0"][weight]
    )


@pytest.mark.parametrize("target", ["mean-prob", "mean-logit"])
def test_a_row_that_is_not_finite_teaches_nobody(logits: torch.Tensor, target: str) -> None:
    logits[1, 2, 5] = math.inf
    lesson, labels = Lesson(target), torch.arange(6)
    own = lesson.contributions(logits, labels)
    found = lesson.targets(own, own, labels)
    without = lesson.contributions(logits[[0, 2, 3]], labels)
    right = lesson.targets(without, without, labels)
    torch.testing.assert_close(found.taught[[0, 2, 3], 2], right.taught[:, 2])
    assert found.teachers[[0, 2, 3], 2].tolist() == [2, 2, 2]


@pytest.mark.parametrize("target", ["peers", "mean-prob", "mean-logit"])
def test_where_no_teacher_is_left_there_is_no_kl(logits: torch.Tensor, target: str) -> None:
    logits[1:] = math.nan
    found = losses.mutual_loss(logits, torch.arange(6), target=target)
    assert torch.equal(found.total[0], found.cross_entropy[0])


# ---------------------------------------------------------------- links and warm-up


def test_weighted_links_equal_the_reference(training: Build, tmp_path: Path) -> None:
    path = tmp_path / "links.csv"
    names = "resnet8-0,resnet8-1,wrn_16_2-0"
    path.write_text(f",{names}\nresnet8-0,0,0.5,2\nresnet8-1,0,0,0\nwrn_16_2-0,0.3,1,0\n")
    for changes in ({}, {"target": "mean-logit"}, {"kl_reduction": "sum"}):
        fast = training(cohort=TRIO, links=str(path), **changes)
        nets = nets_in_turn(fast)
        optimizers = [make_optimizer(net, fast.config.optim) for net in nets]
        for number in range(2):
            (found,) = fast.take(1, number)
            expected = reference.step(
                nets,
                optimizers,
                [fast.data.train.batch(number, 8, 0, 8)],
                links=link_rows(fast),
                kl_reduction=fast.config.method.kl_reduction,
                **loss_options(fast.config),
            )
            assert_as_reference(fast, nets, found, expected)
        assert found[1, 2] == 0  # resnet8-1 learns from nobody


def test_links_from_all_equal_no_links_whatever_their_scale(
    training: Build, tmp_path: Path
) -> None:
    path = tmp_path / "links.csv"
    path.write_text(",resnet8-0,resnet8-1\nresnet8-0,0,3\nresnet8-1,7,0\n")  # means: scales cancel
    linked, plain = training(links=str(path)), training()
    for t in (linked, plain):
        t.take(1)
    for name, state in plain.states().items():
        for key, value in state.items():
            torch.testing.assert_close(linked.states()[name][key], value, rtol=0, atol=1e-12)


def test_the_kl_weight_grows_over_the_warm_up(training: Build) -> None:
    # 5 steps an epoch, 2 epochs: weights 2/10, 4/10, ... of 2; from the tenth step on it is 2.
    t = training(images=40, kl_warmup=2, kl_weight=2.0)
    found = []
    for number in (0, 4, 9, 10, 11):
        loss, cross_entropy, kl = t.take(1, number)[0].T
        found.append(((loss - cross_entropy) / kl).tolist())
    for weights, right in zip(found, [0.2, 1.0, 2.0, 2.0, 2.0], strict=True):
        assert weights == pytest.approx([right, right])


# ---------------------------------------------------------------- partly labelled images


def test_the_cross_entropy_is_the_mean_over_labelled_images(training: Build) -> None:
    fast = training(cohort=PAIR, labelled_fraction=0.3, images=64)
    nets = nets_in_turn(fast)
    optimizers = [make_optimizer(net, fast.config.optim) for net in nets]
    for number in range(4):
        (found,) = fast.take(1, number)
        x, y = fast.data.train.batch(number, 8, 0, 8)
        assert -1 in y
        expected = reference.step(nets, optimizers, [(x, y)], **loss_options(fast.config))
        assert_as_reference(fast, nets, found, expected)


def test_micro_batches_are_weighted_by_the_labels_of_the_whole_batch(training: Build) -> None:
    # Without KL and in evaluation mode the parts of a batch add up to the batch.
    whole, parts = (
        training(cohort=("resnet8",), labelled_fraction=0.3, grad_accum=n, images=64)
        for n in (1, 4)
    )
    for t in (whole, parts):
        t.peers[0].module.eval()
        t.take(1)
    for key, value in whole.states()["resnet8-0"].items():
        torch.testing.assert_close(parts.states()["resnet8-0"][key], value, rtol=0, atol=1e-12)


def test_a_batch_without_labels_has_no_cross_entropy(training: Build) -> None:
    t = training(cohort=PAIR, labelled_fraction=1 / 64, images=64)
    labelled = [(t.data.train.batch(n, 8, 0, 8)[1] >= 0).sum().item() for n in range(8)]
    assert sorted(labelled) == [0] * 7 + [1]
    for number, count in enumerate(labelled):
        _, cross_entropy, kl = t.take(1, number)[0].T
        assert (cross_entropy == 0).all() if not count else (cross_entropy > 0).all()
        assert (kl > 0).all()


def test_kl_on_labelled_images_only(training: Build) -> None:
    t = training(cohort=PAIR, labelled_fraction=0.3, kl_images="labelled", images=64)
    nets = nets_in_turn(t)
    (found,) = t.take(1)
    x, y = t.data.train.batch(0, 8, 0, 8)
    log_p = [F.log_softmax(net(x), -1)[y >= 0] for net in nets]
    for k in (0, 1):
        right = F.kl_div(log_p[k], log_p[1 - k], log_target=True, reduction="batchmean")
        assert found[k, 2].item() == pytest.approx(right.item(), rel=1e-9)


def test_labelled_images_are_stratified_and_keyed_by_the_seed(training: Build) -> None:
    def labels(seed: int, fraction: float = 0.2) -> torch.Tensor:
        images = training(labelled_fraction=fraction, seed=seed).data.train
        return images.rows(0, len(images))[1]

    one, again, other = labels(0), labels(0), labels(1)
    everyone = labels(0, fraction=1.0)
    assert torch.equal(one, again) and not torch.equal(one, other)
    known = one >= 0
    assert known.sum() == round(0.2 * len(everyone))
    assert torch.equal(one[known], everyone[known])
    shares = torch.bincount(one[known]) / torch.bincount(everyone)
    assert (shares - 0.2).abs().max() < 0.01


def test_a_loss_that_is_not_finite_stays_so_without_labels(training: Build) -> None:
    t = training(cohort=("resnet8",), labelled_fraction=1 / 64, images=64)
    number = next(n for n in range(8) if (t.data.train.batch(n, 8, 0, 8)[1] < 0).all())
    weight = t.peers[0].module.conv1.weight
    with torch.no_grad():
        weight[0] = math.nan
    before = t.states()
    (found,) = t.take(1, number)
    assert not found[0, 0].isfinite()
    for key, value in t.states()["resnet8-0"].items():
        torch.testing.assert_close(value, before["resnet8-0"][key], equal_nan=True)
