"""Frozen peers: trained networks that teach and are not updated, read from untrusted folders."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dml_accel.core.errors import UsageError
from dml_accel.data.batches import Normalisation
from dml_accel.data.pixels import Geometry
from dml_accel.models.optim import make_optimizer
from dml_accel.models.peer_folder import load_network, read_peer, write_peer
from dml_accel.mutual import reference
from dml_accel.mutual.teachers import Teacher, read_teachers
from tests.helpers import Training, assert_same_state, load
from tests.mutual.references import (
    PAIR,
    Build,
    assert_as_reference,
    link_rows,
    loss_options,
    nets_in_turn,
)
from tests.viewing import Viewing

CLASSES = tuple(map(str, range(10)))


def write_folder(training: Training, path: Path) -> Path:
    """Write the folder of a run's only peer, as the run does."""
    (peer,), data = training.peers, training.data
    write_peer(
        path,
        peer.module,
        peer.spec,
        {"top1": 0.5, "n": 1},
        classes=data.classes,
        normalisation=data.normalisation,
        geometry=Geometry.of(training.config.data),
        dataset="digits",
        steps=1,
        teachers=[],
    )
    return path


@pytest.fixture
def teachers(training: Build, tmp_path: Path) -> list[Path]:
    """Two trained networks; the first saw other images, and so has another normalisation."""
    first, second = training(images=100, cohort=("resnet20",)), training(cohort=("wrn_16_2",))
    for t in (first, second):
        t.take(3)
    return [write_folder(first, tmp_path / "a"), write_folder(second, tmp_path / "b")]


@pytest.mark.parametrize(
    ("update", "changes"),
    [
        ("simultaneous", {}),
        ("simultaneous", {"links": "frozen"}),
        ("sequential", {}),
        ("sequential", {"links": "frozen"}),
        ("sequential", {"target": "best", "divergence": "dkd"}),
    ],
    ids=str,
)
def test_frozen_peers_teach_and_do_not_learn(
    training: Build, teachers: list[Path], update: str, changes: dict[str, str]
) -> None:
    paths = tuple(map(str, teachers))
    fast = training(cohort=PAIR, frozen_peers=paths, update=update, **changes)
    nets, frozen = nets_in_turn(fast), fast.cohort.teachers
    before = copy.deepcopy([teacher.net.state_dict() for teacher in frozen])
    optimizers = [make_optimizer(net, fast.config.optim) for net in nets]
    ours = fast.data.normalisation

    class Rescaled(torch.nn.Module):
        """The teacher as it was trained, on pixels with its own normalisation."""

        def __init__(self, path: Path) -> None:
            super().__init__()
            self.folder = read_peer(path)
            self.net = load_network(self.folder)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def column(values: tuple[float, ...]) -> torch.Tensor:
                return torch.tensor(values, dtype=x.dtype).view(3, 1, 1)

            pixels = x * column(ours.std) + column(ours.mean)
            theirs = self.folder.normalisation
            return self.net((pixels - column(theirs.mean)) / column(theirs.std))

    step = {"simultaneous": reference.step, "sequential": reference.sequential_step}[update]
    for number in range(2):
        (found,) = fast.take(1, number)
        batch = fast.data.train.batch(number, 8, 0, 8)
        expected = step(
            nets,
            optimizers,
            [batch] if update == "simultaneous" else batch,
            frozen=[Rescaled(path) for path in teachers],
            links=link_rows(fast),
            **loss_options(fast.config),
        )
        assert_as_reference(fast, nets, found, expected)
    for teacher, state in zip(frozen, before, strict=True):
        assert_same_state(teacher.net.state_dict(), state)


def test_one_peer_with_a_frozen_teacher_is_distillation(
    training: Build, teachers: list[Path]
) -> None:
    t = training(cohort=("resnet8",), frozen_peers=(str(teachers[1]),), temperature=3.0)
    (net,) = nets_in_turn(t)
    (found,) = t.take(1)
    x, y = t.data.train.batch(0, 8, 0, 8)
    teacher, student = load_network(read_peer(teachers[1]))(x), net(x)
    kd = F.kl_div(F.log_softmax(student / 3, -1), F.softmax(teacher / 3, -1), reduction="batchmean")
    right = F.cross_entropy(student, y) + 9 * kd
    assert found[0, 0].item() == pytest.approx(right.item(), rel=1e-9)


def test_a_run_folder_stands_for_all_of_its_peers(teachers: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    for folder in teachers:
        (run / "peers").mkdir(parents=True, exist_ok=True)
        folder.rename(run / "peers" / folder.name)
    found = read_teachers([str(run)], CLASSES, 8)
    assert [folder.path.name for folder in found.values()] == ["a", "b"]
    assert list(found) == ["frozen-0", "frozen-1"]


def test_a_frozen_peer_may_have_seen_images_that_were_cut_in_another_way(
    training: Build, tmp_path: Path
) -> None:
    folder = write_folder(training(cohort=("resnet8",)), tmp_path / "a")
    config = load(folder / "config.json")
    config["pretrained_cfg"] |= {"crop_pct": 0.8, "interpolation": "bicubic"}
    (folder / "config.json").write_text(json.dumps(config))
    (found,) = read_teachers([str(folder)], CLASSES, 8).values()
    assert found.geometry == Geometry(8, 10, "center", "bicubic")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label_names": ["x", *map(str, range(1, 10))]}, "other classes: 'x' where .* '0'"),
        ({"num_classes": 7, "label_names": None}, "has 7 classes; these images have 10"),
        ({"pretrained_cfg": None}, "does not describe a network as timm does"),
        ({"architecture": "no_such_net"}, "timm has no network 'no_such_net'"),
        ({"architecture": "resnet8_cifar"}, "does not fit its network: "),
        ({"architecture": "resnet110_cifar"}, "it has more than the .* tensors of model"),
        ({"model_args": {"device": "cpu"}}, "'device' would make timm open other files"),
        ({"model_args": {"pretrained": True}}, "'pretrained' would make timm open other files"),
        ({"model_args": {"checkpoint_path": "/x.pth"}}, "'checkpoint_path' would make timm open"),
        ({"model_args": {"pretrained_cfg": {"file": "x"}}}, "would make timm open other files"),
        ({"model_args": {"unheard_of": 1}}, "cannot be built"),
        ({"model_args": [1]}, "does not describe a network"),
    ],
    ids=str,
)
def test_a_folder_with_another_config_is_refused_in_one_line(
    teachers: list[Path], change: dict, said: str
) -> None:
    file = teachers[0] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UsageError, match=said) as refusal:
        for folder in read_teachers([str(teachers[0])], CLASSES, 8).values():
            load_network(folder)
    assert "\n" not in str(refusal.value) and str(teachers[0]) in str(refusal.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"[1]", b"\xff" * 64], ids=str)
def test_files_with_other_content_are_refused(
    teachers: list[Path], name: str, content: bytes
) -> None:
    (teachers[0] / name).write_bytes(content)
    with pytest.raises(UsageError) as refusal:
        load_network(read_peer(teachers[0]))
    assert name in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_forged_size_allocates_nothing(teachers: list[Path]) -> None:
    weights, described = (teachers[0] / n for n in ("model.safetensors", "config.json"))
    size = weights.stat().st_size
    with open(weights, "r+b") as file:
        file.truncate(2**30)  # sparse
    with pytest.raises(UsageError, match="cannot be read"):
        load_network(read_peer(teachers[0]))
    with open(weights, "r+b") as file:
        file.truncate(size)
    load_network(read_peer(teachers[0]))
    with open(described, "r+b") as file:
        file.truncate(2**40)
    with pytest.raises(UsageError, match="more than the"):
        read_peer(teachers[0])


def test_a_teacher_of_somebodys_own_is_given_the_usual_layout() -> None:
    net = Viewing(10)
    folder = SimpleNamespace(arch="viewing", normalisation=Normalisation.identity())
    teacher = Teacher("frozen-0", folder, net, Normalisation.identity())
    x = torch.randn(2, 3, 8, 8)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(teacher.predict(last), teacher.predict(x))
