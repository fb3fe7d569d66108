"""The training step, law by law."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dml_accel.core.config import Config
from dml_accel.data.batches import slices
from dml_accel.models.optim import make_optimizer
from dml_accel.models.schedules import learning_rate
from dml_accel.models.spec import PeerSpec
from dml_accel.mutual import losses, reference, teaching
from dml_accel.mutual.peer import Peer
from dml_accel.mutual.step import train_step
from dml_accel.training.loop import EvaluationRecord, Record, StepRecord, evaluate, fit
from tests.helpers import Training, assert_same_state
from tests.mutual.references import batch_of

Build = Callable[..., Training]


def fitted(training: Training) -> list[Record]:
    return list(fit(training.cohort, training.data, training.config.run))


# ---------------------------------------------------------------- the algorithm


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cohort": ("resnet8*3",)},
        {"cohort": ("resnet8", "wrn_16_2")},
        {"grad_accum": 3},
        {"grad_accum": 3, "mixup": 1.0, "cutmix": 1.0, "label_smoothing": 0.1},
        {"label_smoothing": 0.2, "augment": ("crop", "randaugment", "erasing")},
        {"clip_norm": 0.5},
        {"temperature": 2.0, "kl_weight": 0.5, "kl_reduction": "sum"},
    ],
    ids=str,
)
def test_steps_equal_the_slow_reference(training: Build, changes: dict) -> None:
    fast = training(**changes)
    optim, method = fast.config.optim, fast.config.method
    nets = [copy.deepcopy(peer.module) for peer in fast.peers]
    optimizers = [make_optimizer(net, optim) for net in nets]
    for step in range(3):
        (found,) = fast.take(1, step)
        batches = [
            batch_of(fast, step, lo, hi) for lo, hi in slices(optim.batch_size, optim.grad_accum)
        ]
        expected = reference.step(
            nets,
            optimizers,
            batches,
            optim.clip_norm,
            kl_weight=method.kl_weight,
            temperature=method.temperature,
            kl_reduction=method.kl_reduction,
        )
        assert found[:, 0].tolist() == pytest.approx(expected, rel=1e-9)
        for peer, net in zip(fast.peers, nets, strict=True):
            for name, weight in net.state_dict().items():
                torch.testing.assert_close(
                    peer.module.state_dict()[name], weight, rtol=1e-7, atol=1e-9
                )


def test_parts_add_up_and_are_means_over_the_batch(training: Build) -> None:
    (parts,) = training(kl_weight=0.5).take(1)
    loss, cross_entropy, kl = parts.T
    torch.testing.assert_close(loss, cross_entropy + 0.5 * kl)
    assert (kl > 0).all()
    assert abs(cross_entropy.mean().item() - math.log(10)) < 1.0  # an untrained net guesses


def test_learning_improves_on_guessing(training: Build) -> None:
    t = training(max_steps=60, float64=False, batch_size=32)
    records = fitted(t)
    assert min(p["top1"] for p in records[-1].test["peers"].values()) > 0.3


# ---------------------------------------------------------------- law 1: isolation


def gradients_of(training: Training, peer: int) -> list[torch.Tensor]:
    return [weight.grad for weight in training.peers[peer].module.parameters()]


def test_no_gradient_of_a_peers_loss_reaches_another(
    training: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Let only peer 0's loss count: then peer 1 must not move at all.
    real = losses.mutual_losses

    def only_the_first(*args: object, **options: object) -> losses.Losses:
        found = real(*args, **options)
        mask = torch.tensor([[1.0], [0.0]], dtype=found.total.dtype)
        return found._replace(total=found.total * mask)

    monkeypatch.setattr(teaching, "mutual_losses", only_the_first)
    t = training()
    t.take(1)
    assert all(grad.abs().sum() > 0 for grad in gradients_of(t, 0))
    assert all(grad.abs().sum() == 0 for grad in gradients_of(t, 1))


# ---------------------------------------------------------------- law 3: independent training


def test_without_kl_a_peer_learns_as_if_alone(training: Build) -> None:
    together = training(cohort=("resnet8", "wrn_16_2"), kl_weight=0.0)
    alone = training(cohort=("resnet8",))
    parts = together.take(3), alone.take(3)
    assert_same_state(together.states()["resnet8-0"], alone.states()["resnet8-0"])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*parts, strict=True))


def test_with_kl_a_peer_learns_otherwise(training: Build) -> None:
    together, alone = training(cohort=("resnet8", "wrn_16_2")), training(cohort=("resnet8",))
    together.take(2), alone.take(2)
    weight = "conv1.weight"
    assert not torch.equal(
        together.states()["resnet8-0"][weight], alone.states()["resnet8-0"][weight]
    )


def test_a_diverged_peer_leaves_independent_peers_alone(training: Build) -> None:
    t, clean = training(kl_weight=0.0), training(kl_weight=0.0)
    with torch.no_grad():
        t.peers[1].module.conv1.weight.fill_(math.nan)
    t.take(2), clean.take(2)
    assert_same_state(t.states()["resnet8-0"], clean.states()["resnet8-0"])


# ---------------------------------------------------------------- law 4: order does not matter


def test_permuting_the_cohort_permutes_the_results(training: Build) -> None:
    names = ("wrn_16_2", "resnet8*2")
    first, second = training(cohort=names), training(cohort=names[::-1])
    orders = [t.cohort.teaching.turns for t in (first, second)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    ends = [fitted(t)[-1] for t in (first, second)]
    assert ends[0] == ends[1]
    a, b = first.states(), second.states()
    for name in a:
        assert_same_state(a[name], b[name])


def test_two_peers_never_start_equal(training: Build) -> None:
    t = training(cohort=("resnet8*3",))
    weights = [peer.module.conv1.weight for peer in t.peers]
    assert not any(torch.equal(weights[i], weights[j]) for i in range(3) for j in range(i))
    (parts,) = t.take(1)
    assert (parts[:, 2] > 0).all()  # their KL is not 0


def test_initial_weights_are_keyed_by_seed_and_name_only(training: Build) -> None:
    wide = training(cohort=("wrn_16_2", "resnet8*2")).states()
    plain, other = training().states(), training(seed=1).states()
    assert_same_state(wide["resnet8-1"], plain["resnet8-1"])
    assert not torch.equal(plain["resnet8-1"]["conv1.weight"], other["resnet8-1"]["conv1.weight"])


def test_dropout_is_keyed_and_differs_between_peers_and_steps(training: Build) -> None:
    nets = "timm:resnet10t[drop_rate=0.5]"
    settings = {"cohort": (nets,), "kl_weight": 0.0, "image_size": 16}
    first, again = training(**settings), training(**settings)
    torch.manual_seed(123)
    first.take(2)
    torch.manual_seed(456)
    again.take(2)
    assert_same_state(first.states()["resnet10t-0"], again.states()["resnet10t-0"])
    masks, plain = [], training(**settings)
    for step, name in ((0, "a"), (0, "b"), (1, "a")):
        dropout = nn.Dropout(0.5)
        peer = Peer(PeerSpec(name, ""), dropout, dropout, None, None)
        masks.append(plain.step(step, 0.1).forward(peer, torch.ones(64), 0))
    assert not any(torch.equal(masks[i], masks[j]) for i in range(3) for j in range(i))


# ---------------------------------------------------------------- law 5: the state is small


def test_weights_buffers_optimizer_and_step_are_all_there_is(training: Build) -> None:
    # Fresh objects given only those must go on as the first ones do, across an epoch's end.
    settings = {"cohort": ("resnet8", "timm:resnet10t[drop_rate=0.5]"), "images": 34}
    whole, before, after = (training(**settings) for _ in range(3))
    whole.take(6)
    before.take(3)
    for old, new in zip(before.peers, after.peers, strict=True):
        new.module.load_state_dict(copy.deepcopy(old.module.state_dict()))
        new.optimizer.load_state_dict(copy.deepcopy(old.optimizer.state_dict()))
    torch.manual_seed(99)
    after.take(3, start=3)
    for name, state in whole.states().items():
        assert_same_state(state, after.states()[name])


def test_the_learning_rate_is_a_function_of_the_step() -> None:
    optim = Config(lr=0.1, lr_step=60, lr_gamma=0.1).optim
    epochs = [0, 59, 60, 119, 120, 199]
    rates = [learning_rate(optim, epoch * 781 + 780, 781) for epoch in epochs]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.0001])
    assert learning_rate(optim, 60 * 781 - 1, 781) == 0.1
    assert learning_rate(optim, 60 * 781, 781) == pytest.approx(0.01)


def test_every_peer_gets_the_learning_rate(training: Build) -> None:
    t = training(cohort=("resnet8*3",), epochs=2, images=17, lr_step=1, max_steps=None)
    rates = [
        (record.step, record.lr, [peer.optimizer.param_groups[0]["lr"] for peer in t.peers])
        for record in fit(t.cohort, t.data, t.config.run)
        if isinstance(record, StepRecord)
    ]
    assert rates == [
        (step, pytest.approx(lr), [pytest.approx(lr)] * 3)
        for step, lr in ((1, 0.05), (2, 0.05), (3, 0.005), (4, 0.005))
    ]


# ---------------------------------------------------------------- what the optimizer and nets see


def test_the_optimizer_is_the_one_of_the_paper() -> None:
    sgd = make_optimizer(nn.Linear(2, 2), Config().optim)
    group = sgd.param_groups[0]
    found = {name: group[name] for name in ("lr", "momentum", "nesterov", "weight_decay")}
    assert found == {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    assert len(sgd.param_groups) == 1 and len(group["params"]) == 2  # the bias decays as well


def test_clipping_is_per_peer(training: Build) -> None:
    t = training(clip_norm=1e-3)
    t.take(1)
    for index in range(2):
        norm = torch.stack([grad.norm() for grad in gradients_of(t, index)]).norm()
        assert norm.item() == pytest.approx(1e-3, rel=1e-2)


def test_batch_norm_statistics_move_once_per_batch(training: Build) -> None:
    t = training(grad_accum=2)
    t.take(3)
    for peer in t.peers:
        assert peer.module.bn1.num_batches_tracked == 3 * 2


def test_evaluation_leaves_no_trace(training: Build) -> None:
    t, undisturbed = training(), training()
    t.take(1), undisturbed.take(1)
    before = t.states()
    evaluate(t.peers, t.data.test, 10, t.placement)
    assert all(m.training for peer in t.peers for m in peer.net.modules())
    for name, state in before.items():
        assert_same_state(state, t.states()[name])
    t.take(1, start=1), undisturbed.take(1, start=1)
    for name, state in undisturbed.states().items():
        assert_same_state(state, t.states()[name])


def test_evaluation_counts_every_image_once(training: Build) -> None:
    t = training()
    found = evaluate(t.peers, t.data.test, 10, t.placement)
    images, labels = t.data.test.rows(0, 1000)
    for peer in t.peers:
        with torch.no_grad():
            hits = (peer.module.eval()(images).argmax(1) == labels).sum().item()
        metrics = found["peers"][peer.name]
        assert (metrics["n"], metrics["top1"]) == (360, hits / 360)


# ---------------------------------------------------------------- the loop


@pytest.mark.parametrize(
    ("changes", "steps", "evaluations"),
    [
        ({"max_steps": 5, "eval_every": "2"}, 5, [2, 4, 5]),
        ({"max_steps": None, "epochs": 3, "images": 17}, 6, [2, 4, 6]),
        ({"max_steps": 3, "epochs": 3, "images": 17, "eval_every": "2ep"}, 3, [3]),
        ({"max_steps": 2, "eval_every": "0.000001min"}, 2, [1, 2]),
    ],
)
def test_fit_records_each_step_and_ends_with_an_evaluation(
    training: Build, changes: dict, steps: int, evaluations: list[int]
) -> None:
    t = training(cohort=("resnet8",), float64=False, **changes)
    records = fitted(t)
    taken = [record.step for record in records if isinstance(record, StepRecord)]
    assert taken == list(range(1, steps + 1))
    assert [r.step for r in records if isinstance(r, EvaluationRecord)] == evaluations
    assert isinstance(records[-1], EvaluationRecord)


def test_the_validation_split_is_measured_beside_the_test_split(training: Build) -> None:
    t = training(cohort=("resnet8",), max_steps=1, val_fraction=0.2)
    last = fitted(t)[-1]
    assert last.test["ensemble"]["n"] == 360
    assert last.val["ensemble"]["n"] == 287


def test_the_step_reads_nothing_back_from_the_device(training: Build) -> None:
    # On a GPU each such read waits for the device; here any of them raises.
    def forbidden(*_: object) -> None:
        raise AssertionError("the step waits for a number")

    t = training(clip_norm=1.0, grad_accum=2)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "numpy"):
            patch.setattr(torch.Tensor, name, forbidden)
        parts = t.take(1)
    assert not parts[0].requires_grad


# ---------------------------------------------------------------- one loss scaler per peer


def with_scalers(training: Training, **options: float) -> Training:
    """Give every peer the scaler that fp16 uses on a GPU; the class is the same on a CPU."""
    for peer in training.peers:
        peer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, **options)
    return training


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_one_peers_overflow_is_its_own(training: Build, clip_norm: float | None) -> None:
    settings = {"cohort": ("resnet8*3",), "float64": False, "clip_norm": clip_norm}
    scaled, plain = with_scalers(training(**settings)), training(**settings)
    before = scaled.states()["resnet8-0"]
    overflow = scaled.peers[0].module.conv1.weight.register_hook(lambda grad: grad * math.inf)
    scaled.take(1), plain.take(1)
    overflow.remove()
    assert [peer.scaler.get_scale() for peer in scaled.peers] == [512, 1024, 1024]
    for name, weight in scaled.peers[0].module.named_parameters():
        assert torch.equal(weight, before[name])  # the overflowing peer skipped its step
    for name in ("resnet8-1", "resnet8-2"):  # the others took theirs, with the right gradient
        for key, value in plain.states()[name].items():
            torch.testing.assert_close(scaled.states()[name][key], value)
    scaled.take(1, start=1)
    assert not torch.equal(scaled.peers[0].module.conv1.weight, before["conv1.weight"])


def test_scales_grow_once_per_step_and_are_all_kept(training: Build) -> None:
    t = with_scalers(training(cohort=("resnet8*3",), float64=False), growth_interval=2)
    t.take(4)
    assert [peer.scaler.get_scale() for peer in t.peers] == [4096, 4096, 4096]
    assert len({id(peer.scaler) for peer in t.peers}) == 3
    assert all(peer.scaler.state_dict()["scale"] == 4096 for peer in t.peers)


def test_outside_fp16_a_scaler_does_nothing(training: Build) -> None:
    assert not any(peer.scaler.is_enabled() for peer in training().peers)


# ---------------------------------------------------------------- settings of one peer


def test_a_peer_has_an_optimizer_and_a_rate_of_its_own(training: Build) -> None:
    cosine = {"epochs": 2, "images": 17, "lr_schedule": "cosine", "max_steps": None}
    own = {"peer_opt": ("resnet8-1:lr=0.02,optimizer=adamw,weight_decay=0",)}
    t = training(cohort=("resnet8*2",), lr=0.1, **cosine, **own)
    names = [peer.name for peer in t.peers]
    steps = [one for one in fitted(t) if isinstance(one, StepRecord)]
    # Half a cosine over four steps: 1, 0.85, 0.5, 0.15.
    shares = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert [one.lr for one in steps] == pytest.approx([0.1 * share for share in shares])
    assert list(steps[0].lrs) == names
    for one, share in zip(steps, shares, strict=True):
        assert list(one.lrs.values()) == pytest.approx([0.1 * share, 0.02 * share])
    groups = [peer.optimizer.param_groups[0] for peer in t.peers]
    assert [group["lr"] for group in groups] == list(steps[-1].lrs.values())
    assert [group["weight_decay"] for group in groups] == [5e-4, 0]
    assert type(t.peers[1].optimizer) is torch.optim.AdamW


def test_settings_follow_a_peer_and_touch_no_other(training: Build) -> None:
    alone = {"kl_weight": 0.0, "peer_opt": ("resnet20-0:lr=0.01,optimizer=lion",)}
    cohort, swapped = ("resnet8", "resnet20"), ("resnet20", "resnet8")
    runs = [training(cohort=one, **alone) for one in (cohort, swapped)]
    runs.append(training(cohort=cohort, kl_weight=0.0))
    for t in runs:
        optim = t.config.optim
        rates = {peer.name: learning_rate(optim.of_peer(peer.name), 0, 9) for peer in t.peers}
        for step in range(2):
            train_step(t.cohort, step, rates)
    first, second, shared = ({p.name: p.module.state_dict() for p in t.peers} for t in runs)
    for name in first:
        assert_same_state(first[name], second[name])
    assert_same_state(first["resnet8-0"], shared["resnet8-0"])
    weights = [state["resnet20-0"]["conv1.weight"] for state in (first, shared)]
    assert not torch.equal(*weights)
