"""Every way to learn together, step by step against the slow reference, in double precision."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dml_accel.core.config import Config, UsageError
from dml_accel.models import peer_folder as frozen
from dml_accel.models import spec as cohort
from dml_accel.models.model_card import write_peer
from dml_accel.mutual import links, losses, reference
from dml_accel.mutual.step import train_step
from dml_accel.mutual.teaching import Teaching
from tests.conftest import Training, assert_same_state, tiny_config

Build = Callable[..., Training]
PAIR = ("resnet8", "wrn_16_2")
TRIO = ("resnet8*2", "wrn_16_2")


def nets_in_turn(training: Training) -> list[torch.nn.Module]:
    """Copies of the networks, in the order of the command line."""
    modules = {peer.name: peer.module for peer in training.peers}
    return [copy.deepcopy(modules[name]) for name in training.teaching.turns]


def assert_as_reference(
    fast: Training, nets: list[torch.nn.Module], found: torch.Tensor, expected: list[float]
) -> None:
    by_name = dict(zip(fast.teaching.turns, zip(nets, expected, strict=True), strict=True))
    assert found[:, 0].tolist() == pytest.approx(
        [by_name[name][1] for name in sorted(by_name)], rel=1e-9
    )
    for peer in fast.peers:
        state, right = peer.module.state_dict(), by_name[peer.name][0].state_dict()
        for name, value in right.items():
            torch.testing.assert_close(state[name], value, rtol=1e-7, atol=1e-9)


def options(config: Config) -> dict[str, object]:
    return {
        "kl_weight": config.kl_weight,
        "temperature": config.temperature,
        "target": config.target,
    }


def rows_of(training: Training) -> list[list[float]] | None:
    """The links as the reference wants them: in the order of the command line, frozen last."""
    turns = training.teaching.turns
    known = [one.name for one in training.frozen]
    weights = links.read(training.config.links, turns, known)
    if weights is None:
        return None
    return [[weights[k].get(teacher, 0.0) for teacher in [*turns, *known]] for k in turns]


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
    ],
    ids=str,
)
def test_sequential_is_algorithm_1(training: Build, changes: dict) -> None:
    fast = training(update="sequential", **changes)
    nets = nets_in_turn(fast)
    optimizers = [cohort.optimizer(net, fast.config) for net in nets]
    for number in range(3):
        found, _ = train_step(fast.step(number, 0.05))
        batch = fast.data.train.batch(number, 8, 0, 8)
        expected = reference.sequential_step(
            nets,
            optimizers,
            batch,
            fast.config.clip_norm,
            links=rows_of(fast),
            **options(fast.config),
        )
        assert_as_reference(fast, nets, found, expected)


@pytest.mark.parametrize(
    "changes",
    [{"cohort": PAIR}, {"cohort": TRIO, "temperature": 2.0}, {"cohort": TRIO, "clip_norm": 0.5}],
    ids=str,
)
def test_official_is_the_authors_code(training: Build, changes: dict) -> None:
    fast = training(update="official", **changes)
    nets = nets_in_turn(fast)
    optimizers = [cohort.optimizer(net, fast.config) for net in nets]
    for number in range(3):
        found, _ = train_step(fast.step(number, 0.05))
        batches = [
            fast.data.train.batch(number * len(nets) + turn, 8, 0, 8) for turn in range(len(nets))
        ]
        expected = reference.official_step(
            nets, optimizers, batches, fast.config.clip_norm, **options(fast.config)
        )
        assert_as_reference(fast, nets, found, expected)


def test_the_turns_are_those_of_the_command_line(training: Build) -> None:
    # Of two equal cohorts in opposite orders, the one who is first learns from old predictions.
    one = training(cohort=("resnet8", "wrn_16_2"), update="sequential")
    other = training(cohort=("wrn_16_2", "resnet8"), update="sequential")
    for t in (one, other):
        train_step(t.step(0, 0.05))
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
    train_step(t.step(0, 0.05))
    assert calls[0] == forwards
    for peer in t.peers:
        norm = next(m for m in peer.module.modules() if isinstance(m, torch.nn.BatchNorm2d))
        assert norm.num_batches_tracked == batches


@pytest.mark.parametrize("update", ["sequential", "official"])
def test_alone_every_schedule_is_independent_training(training: Build, update: str) -> None:
    alone, usual = training(cohort=("resnet8",), update=update), training(cohort=("resnet8",))
    for number in range(3):
        for t in (alone, usual):
            train_step(t.step(number, 0.05))
    assert_same_state(alone.states()["resnet8-0"], usual.states()["resnet8-0"])


def test_without_kl_sequential_is_independent_training(training: Build) -> None:
    t, usual = (
        training(cohort=PAIR, update=update, kl_weight=0.0)
        for update in ("sequential", "simultaneous")
    )
    for number in range(3):
        for one in (t, usual):
            train_step(one.step(number, 0.05))
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
    own = losses.lessons(z, temperature, target)
    taught = losses.targets(own.sum(0) - own, target)
    fast = losses.mutual_losses(z, labels, taught, temperature=temperature).total.mean(1)
    fast.sum().backward()
    slow = [peer.clone().requires_grad_() for peer in logits]
    right = [
        reference.loss(k, slow, labels, temperature=temperature, target=target) for k in range(4)
    ]
    sum(right).backward()
    torch.testing.assert_close(fast, torch.stack(right), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(z.grad, torch.stack([peer.grad for peer in slow]))


def test_the_mean_posterior_teaches_as_its_peers_do_and_mean_logits_do_not(
    training: Build,
) -> None:
    # The identity of the paper's DML_e with DML: another value of the loss, the same gradient.
    trained = {}
    for target in ("peers", "mean-prob", "mean-logit"):
        t = training(cohort=TRIO, target=target)
        (found, _), trained[target] = train_step(t.step(0, 0.05)), t.states()
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
    own = losses.lessons(logits, 1.0, target)
    taught = losses.targets(own.sum(0) - own, target)
    without = losses.lessons(logits[[0, 2, 3]], 1.0, target)
    right = losses.targets(without.sum(0) - without, target)
    torch.testing.assert_close(taught.posterior[[0, 2, 3], 2], right.posterior[:, 2])
    assert taught.teachers[[0, 2, 3], 2].tolist() == [2, 2, 2]


@pytest.mark.parametrize("target", ["peers", "mean-prob", "mean-logit"])
def test_where_no_teacher_is_left_there_is_no_kl(logits: torch.Tensor, target: str) -> None:
    logits[1:] = math.nan
    own = losses.lessons(logits, 1.0, target)
    taught = losses.targets(own.sum(0) - own, target)
    found = losses.mutual_losses(logits, torch.arange(6), taught)
    assert torch.equal(found.total[0], found.cross_entropy[0])


# ---------------------------------------------------------------- links


NAMES = ["b-0", "a-0", "c-0"]


def test_a_ring_and_a_star_by_hand() -> None:
    assert links.read("full", NAMES, []) is None
    assert links.read("ring", NAMES, []) == {
        "b-0": {"c-0": 1.0},
        "a-0": {"b-0": 1.0},
        "c-0": {"a-0": 1.0},
    }
    assert links.read("star:a-0", NAMES, []) == {
        "a-0": {"b-0": 1.0, "c-0": 1.0},
        "b-0": {"a-0": 1.0},
        "c-0": {"a-0": 1.0},
    }
    assert links.read("frozen", NAMES, ["frozen-0"]) == {name: {"frozen-0": 1.0} for name in NAMES}


def test_a_matrix_is_read_by_name(tmp_path: Path) -> None:
    path = tmp_path / "links.csv"
    path.write_text(",c-0,a-0,b-0\n\nc-0,0,0.5,2\nb-0, 1 ,,0\na-0,0,0,0\n")
    weights = links.read(str(path), NAMES, [])
    assert weights["c-0"] == {"c-0": 0.0, "a-0": 0.5, "b-0": 2.0}
    assert weights["b-0"]["c-0"] == 1.0 and not any(weights["a-0"].values())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        (",a-0,b-0\na-0,0,1\nb-0,1,0\n", "first line names a-0, b-0, not b-0, a-0, c-0"),
        (",a-0,b-0,c-0\na-0,0,1,0\n", "first column names a-0, not"),
        (",a-0,b-0,c-0\na-0,0,1\nb-0,1,0,0\nc-0,1,1,0\n", "line of a-0 has 2 weights and not 3"),
        (",a-0,b-0,c-0\na-0,0,-1,0\nb-0,1,0,0\nc-0,1,1,0\n", "has '-1' for b-0"),
        (",a-0,b-0,c-0\na-0,0,nan,0\nb-0,1,0,0\nc-0,1,1,0\n", "has 'nan' for b-0"),
        (",a-0,b-0,c-0\na-0,1,1,0\nb-0,1,0,0\nc-0,1,1,0\n", "lets a-0 learn from itself"),
        (",a-0,b-0,c-0\na-0,0,0,0\nb-0,0,0,0\nc-0,0,0,0\n", "nobody learns from anybody"),
        ("\0\xff", "no CSV|no text|first line"),
    ],
    ids=range(9),
)
def test_a_matrix_that_is_none_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "links.csv"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=said) as refusal:
        links.read(str(path), NAMES, [])
    assert "\n" not in str(refusal.value) and str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("rings", NAMES, []), "--links rings cannot be read: .*; write full, ring, star:PEER"),
        (("star:x-0", NAMES, []), "there is no peer 'x-0'; there are b-0, a-0, c-0"),
        (("ring", NAMES[:1], []), "--links ring needs at least two peers"),
        (("ring", NAMES, ["frozen-0"]), "leaves --frozen-peers without pupils"),
    ],
    ids=str,
)
def test_links_that_cannot_be_are_refused(words: tuple, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        links.read(*words)


def test_a_peer_knows_who_teaches_it() -> None:
    def teachers(config: Config, known: list[str]) -> list[list[str]]:
        weights = links.read(config.links, NAMES, known)
        teaching = Teaching(config, NAMES, known, weights)
        return [teaching.teachers_of(name) for name in NAMES]

    assert teachers(Config(), ["frozen-0"])[0] == ["a-0", "c-0", "frozen-0"]
    assert teachers(Config(links="ring"), []) == [["c-0"], ["b-0"], ["a-0"]]
    only = Config(links="frozen", frozen_peers=("x",))
    assert teachers(only, ["frozen-0"]) == [["frozen-0"]] * 3
    assert teachers(Config(kl_weight=0.0), ["frozen-0"]) == [[]] * 3


def test_weighted_links_equal_the_reference(training: Build, tmp_path: Path) -> None:
    path = tmp_path / "links.csv"
    names = "resnet8-0,resnet8-1,wrn_16_2-0"
    path.write_text(f",{names}\nresnet8-0,0,0.5,2\nresnet8-1,0,0,0\nwrn_16_2-0,0.3,1,0\n")
    for changes in ({}, {"target": "mean-logit"}, {"kl_reduction": "sum"}):
        fast = training(cohort=TRIO, links=str(path), **changes)
        nets = nets_in_turn(fast)
        optimizers = [cohort.optimizer(net, fast.config) for net in nets]
        for number in range(2):
            found, _ = train_step(fast.step(number, 0.05))
            expected = reference.step(
                nets,
                optimizers,
                [fast.data.train.batch(number, 8, 0, 8)],
                links=rows_of(fast),
                kl_reduction=fast.config.kl_reduction,
                **options(fast.config),
            )
            assert_as_reference(fast, nets, found, expected)
        assert found[1, 2] == 0  # resnet8-1 learns from nobody


def test_full_links_are_no_links(training: Build, tmp_path: Path) -> None:
    path = tmp_path / "links.csv"
    path.write_text(",resnet8-0,resnet8-1\nresnet8-0,0,3\nresnet8-1,7,0\n")  # means: scales cancel
    linked, plain = training(links=str(path)), training()
    for t in (linked, plain):
        train_step(t.step(0, 0.05))
    for name, state in plain.states().items():
        for key, value in state.items():
            torch.testing.assert_close(linked.states()[name][key], value, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- warm-up


def test_the_kl_weight_grows_over_the_warm_up(training: Build) -> None:
    # 5 steps an epoch, 2 epochs: weights 2/10, 4/10, ... of 2; from the tenth step on it is 2.
    t = training(images=40, kl_warmup=2, kl_weight=2.0)
    found = []
    for number in (0, 4, 9, 10, 11):
        loss, cross_entropy, kl = train_step(t.step(number, 0.05))[0].T
        found.append(((loss - cross_entropy) / kl).tolist())
    for weights, right in zip(found, [0.2, 1.0, 2.0, 2.0, 2.0], strict=True):
        assert weights == pytest.approx([right, right])


# ---------------------------------------------------------------- labels of a part


def test_the_cross_entropy_is_the_mean_over_labelled_images(training: Build) -> None:
    fast = training(cohort=PAIR, labelled_fraction=0.3, images=64)
    nets = nets_in_turn(fast)
    optimizers = [cohort.optimizer(net, fast.config) for net in nets]
    for number in range(4):
        found, _ = train_step(fast.step(number, 0.05))
        x, y = fast.data.train.batch(number, 8, 0, 8)
        assert -1 in y
        expected = reference.step(nets, optimizers, [(x, y)], **options(fast.config))
        assert_as_reference(fast, nets, found, expected)


def test_parts_of_a_batch_share_its_labels(training: Build) -> None:
    # Without KL and in evaluation mode the parts of a batch add up to the batch.
    whole, parts = (
        training(cohort=("resnet8",), labelled_fraction=0.3, grad_accum=n, images=64)
        for n in (1, 4)
    )
    for t in (whole, parts):
        t.peers[0].module.eval()
        train_step(t.step(0, 0.05))
    for key, value in whole.states()["resnet8-0"].items():
        torch.testing.assert_close(parts.states()["resnet8-0"][key], value, rtol=0, atol=1e-12)


def test_a_batch_without_labels_has_no_cross_entropy(training: Build) -> None:
    t = training(cohort=PAIR, labelled_fraction=1 / 64, images=64)
    labelled = [(t.data.train.batch(n, 8, 0, 8)[1] >= 0).sum().item() for n in range(8)]
    assert sorted(labelled) == [0] * 7 + [1]
    for number, count in enumerate(labelled):
        _, cross_entropy, kl = train_step(t.step(number, 0.05))[0].T
        assert (cross_entropy == 0).all() if not count else (cross_entropy > 0).all()
        assert (kl > 0).all()


def test_kl_on_the_labelled_alone(training: Build) -> None:
    t = training(cohort=PAIR, labelled_fraction=0.3, kl_images="labelled", images=64)
    nets = nets_in_turn(t)
    found, _ = train_step(t.step(0, 0.05))
    x, y = t.data.train.batch(0, 8, 0, 8)
    log_p = [F.log_softmax(net(x), -1)[y >= 0] for net in nets]
    for k in (0, 1):
        right = F.kl_div(log_p[k], log_p[1 - k], log_target=True, reduction="batchmean")
        assert found[k, 2].item() == pytest.approx(right.item(), rel=1e-9)


def test_the_labelled_are_stratified_and_keyed_by_the_seed(training: Build) -> None:
    def labelled(seed: int) -> torch.Tensor:
        images = training(labelled_fraction=0.2, seed=seed).data.train
        return images._labels

    one, again, other = labelled(0), labelled(0), labelled(1)
    everyone = training().data.train._labels
    assert torch.equal(one, again) and not torch.equal(one, other)
    known = one >= 0
    assert known.sum() == round(0.2 * len(everyone))
    assert torch.equal(one[known], everyone[known])
    shares = torch.bincount(one[known]) / torch.bincount(everyone)
    assert (shares - 0.2).abs().max() < 0.01


def test_what_is_not_finite_stays_so_without_a_label(training: Build) -> None:
    t = training(cohort=("resnet8",), labelled_fraction=1 / 64, images=64)
    number = next(n for n in range(8) if (t.data.train.batch(n, 8, 0, 8)[1] < 0).all())
    weight = t.peers[0].module.conv1.weight
    with torch.no_grad():
        weight[0] = math.nan
    before = t.states()
    found, _ = train_step(t.step(number, 0.05))
    assert not found[0, 0].isfinite()
    for key, value in t.states()["resnet8-0"].items():
        torch.testing.assert_close(value, before["resnet8-0"][key], equal_nan=True)


# ---------------------------------------------------------------- peers that only teach


def folder_of(training: Training, index: int, path: Path) -> Path:
    """A trained peer's folder, as a run writes it."""
    data = training.data
    write_peer(
        path,
        training.peers[index],
        {"top1": 0.5, "n": 1},
        classes=data.classes,
        normalisation=data.normalisation,
        image_size=training.config.image_size,
        dataset="digits",
        steps=1,
        taught_by=[],
    )
    return path


@pytest.fixture
def teachers(training: Build, tmp_path: Path) -> list[Path]:
    """Two trained networks; the first saw other images, and so has another normalisation."""
    first, second = training(images=100, cohort=("resnet20",)), training(cohort=("wrn_16_2",))
    for t in (first, second):
        for number in range(3):
            train_step(t.step(number, 0.05))
    return [folder_of(first, 0, tmp_path / "a"), folder_of(second, 0, tmp_path / "b")]


@pytest.mark.parametrize("update", ["simultaneous", "sequential"])
@pytest.mark.parametrize("links_", ["full", "frozen"])
def test_frozen_peers_teach_and_do_not_learn(
    training: Build, teachers: list[Path], update: str, links_: str
) -> None:
    paths = tuple(map(str, teachers))
    fast = training(cohort=PAIR, frozen_peers=paths, update=update, links=links_)
    nets, taught_by = nets_in_turn(fast), [one._net for one in fast.frozen]
    before = copy.deepcopy([net.state_dict() for net in taught_by])
    optimizers = [cohort.optimizer(net, fast.config) for net in nets]
    ours = fast.data.normalisation

    class Rescaled(torch.nn.Module):
        """What the teacher would see: pixels, normalised as it was trained."""

        def __init__(self, one: frozen.Frozen) -> None:
            super().__init__()
            self.one = one

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def column(values: tuple[float, ...]) -> torch.Tensor:
                return torch.tensor(values, dtype=x.dtype).view(3, 1, 1)

            pixels = x * column(ours.std) + column(ours.mean)
            theirs = self.one.folder.normalisation
            return self.one._net((pixels - column(theirs.mean)) / column(theirs.std))

    step = {"simultaneous": reference.step, "sequential": reference.sequential_step}[update]
    for number in range(2):
        found, _ = train_step(fast.step(number, 0.05))
        batch = fast.data.train.batch(number, 8, 0, 8)
        expected = step(
            nets,
            optimizers,
            [batch] if update == "simultaneous" else batch,
            frozen=[Rescaled(one) for one in fast.frozen],
            links=rows_of(fast),
            **options(fast.config),
        )
        assert_as_reference(fast, nets, found, expected)
    for net, state in zip(taught_by, before, strict=True):
        assert_same_state(net.state_dict(), state)


def test_one_pupil_of_a_frozen_teacher_is_distillation(
    training: Build, teachers: list[Path]
) -> None:
    t = training(cohort=("resnet8",), frozen_peers=(str(teachers[1]),), temperature=3.0)
    (net,) = nets_in_turn(t)
    found, _ = train_step(t.step(0, 0.05))
    x, y = t.data.train.batch(0, 8, 0, 8)
    teacher, pupil = t.frozen[0]._net(x), net(x)
    kd = F.kl_div(F.log_softmax(pupil / 3, -1), F.softmax(teacher / 3, -1), reduction="batchmean")
    right = F.cross_entropy(pupil, y) + 9 * kd
    assert found[0, 0].item() == pytest.approx(right.item(), rel=1e-9)


def test_a_run_folder_means_all_of_its_peers(teachers: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    for folder in teachers:
        (run / "peers").mkdir(parents=True, exist_ok=True)
        folder.rename(run / "peers" / folder.name)
    found = frozen.read_all([str(run)], [str(n) for n in range(10)], 16)
    assert [folder.path.name for folder in found.values()] == ["a", "b"]
    assert list(found) == ["frozen-0", "frozen-1"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label_names": ["x", *map(str, range(1, 10))]}, "other classes: 'x' where .* '0'"),
        ({"num_classes": 7, "label_names": None}, "tells 7 classes apart; these images have 10"),
        ({"pretrained_cfg": None}, "does not describe a network as timm does"),
        ({"architecture": "no_such_net"}, "timm knows no network 'no_such_net'"),
        ({"architecture": "resnet8_cifar"}, "does not fit its network: "),
        ({"architecture": "resnet110_cifar"}, "it has more than the .* tensors of model"),
        ({"model_args": {"device": "cpu"}}, "'device' would lead"),
        ({"model_args": {"pretrained": True}}, "'pretrained' would lead to other files"),
        ({"model_args": {"checkpoint_path": "/x.pth"}}, "'checkpoint_path' would lead"),
        ({"model_args": {"pretrained_cfg": {"file": "x"}}}, "would lead to other files"),
        ({"model_args": {"unheard_of": 1}}, "cannot be built"),
        ({"model_args": [1]}, "does not describe a network"),
    ],
    ids=str,
)
def test_a_folder_of_another_kind_is_one_line(
    teachers: list[Path], change: dict, said: str
) -> None:
    import json

    file = teachers[0] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UsageError, match=said) as refusal:
        for folder in frozen.read_all([str(teachers[0])], list(map(str, range(10))), 16).values():
            frozen.build(folder)
    assert "\n" not in str(refusal.value) and str(teachers[0]) in str(refusal.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"[1]", b"\xff" * 64], ids=str)
def test_files_that_are_something_else_are_refused(
    teachers: list[Path], name: str, content: bytes
) -> None:
    (teachers[0] / name).write_bytes(content)
    with pytest.raises(UsageError) as refusal:
        frozen.build(frozen.read(teachers[0]))
    assert name in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_forged_size_allocates_nothing(teachers: list[Path]) -> None:
    weights, described = (teachers[0] / n for n in ("model.safetensors", "config.json"))
    size = weights.stat().st_size
    with open(weights, "r+b") as file:
        file.truncate(2**30)  # sparse
    with pytest.raises(UsageError, match="cannot be read"):
        frozen.build(frozen.read(teachers[0]))
    with open(weights, "r+b") as file:
        file.truncate(size)
    frozen.build(frozen.read(teachers[0]))
    with open(described, "r+b") as file:
        file.truncate(2**40)
    with pytest.raises(UsageError, match="more than the"):
        frozen.read(teachers[0])


# ---------------------------------------------------------------- what excludes each other


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"update": "sequential", "placement": "split"}, "--update sequential takes turns"),
        ({"update": "official", "placement": "split"}, "--update official takes turns"),
        ({"update": "sequential", "grad_accum": 2}, "goes with --grad-accum 1 alone"),
        ({"update": "official", "target": "mean-prob"}, "--update official sums the KL"),
        ({"kl_reduction": "sum", "target": "mean-logit"}, "has nothing to add up"),
        ({"links": "ring", "exchange": "sum"}, "--links weighs every peer on its own"),
        ({"links": "frozen"}, "--links frozen needs --frozen-peers"),
        ({"kl_images": "labelled"}, "needs --labelled-fraction below 1"),
        ({"labelled_fraction": 0.0}, "--labelled-fraction is 0.0; it must be above 0"),
        ({"kl_warmup": -1}, "--kl-warmup is -1; it must be 0 or more"),
    ],
    ids=str,
)
def test_refused_before_anything_is_read(changes: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        tiny_config(**changes)
