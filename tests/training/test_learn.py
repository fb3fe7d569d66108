"""``learn``: your own networks and images, with the steps of a run."""

import copy
import itertools
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import dml_accel
from dml_accel import Config, EvaluationRecord, StepRecord, UsageError, learn
from dml_accel.data.selection import labelled_rows
from dml_accel.data.sources import Source
from dml_accel.models.optim import make_optimizer
from dml_accel.mutual import reference
from tests.helpers import Training, assert_same_state

ROWS, CLASSES = 24, 3


def net(width: int, inputs: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 3))


def features(rows: int = ROWS, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generate = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 2, 5, generator=generate, dtype=torch.float64)
    return images, torch.randint(0, CLASSES, (rows,), generator=generate)


def settings(**changes: object) -> Config:
    given = {"batch_size": 8, "lr": 0.05, "epochs": 2, "cpu": True, "float64": True}
    return Config(**(given | changes))


def steps(records: list) -> list[StepRecord]:
    return [record for record in records if isinstance(record, StepRecord)]


@pytest.mark.parametrize("target", ["peers", "mean-logit"])
def test_the_steps_are_the_references(target: str) -> None:
    nets = {"small": net(4).double(), "large": net(9).double()}
    twins = [copy.deepcopy(nets[name]) for name in sorted(nets)]
    config = settings(target=target, temperature=2.0)
    optimizers = [make_optimizer(twin, config.optim) for twin in twins]
    images, labels = features()
    order = []

    class Watched(nn.Module):
        """Remembers which images it was shown in training."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                order.append([int((images == one).all((1, 2)).nonzero()) for one in x])
            return self.inner(x)

    watched = {"small": Watched(nets["small"]), "large": nets["large"]}
    records = learn(watched, (images, labels), features(5, seed=2), config)
    order.clear()  # what it was shown before the first step, to see whether it can learn
    records = list(records)
    assert [record.epoch for record in steps(records)] == [0, 0, 0, 1, 1, 1]
    # Every image once an epoch, in another order the second time.
    first, second = (list(itertools.chain(*order[at : at + 3])) for at in (0, 3))
    assert sorted(first) == sorted(second) == list(range(ROWS)) and first != second
    for record, rows in zip(steps(records), order, strict=True):
        expected = reference.step(
            twins, optimizers, [(images[rows], labels[rows])], target=target, temperature=2.0
        )
        assert record.losses_KP[:, 0].tolist() == pytest.approx(expected, rel=1e-9)
    for name, twin in zip(sorted(nets), twins, strict=True):
        for mine, right in zip(nets[name].parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-12)


def test_the_last_record_has_the_accuracies_of_the_networks() -> None:
    nets = {"a": net(4), "b": net(9)}
    images, labels = features(40, seed=2)
    records = list(learn(nets, features(), (images, labels), settings(val_fraction=0.25)))
    last = records[-1]
    assert isinstance(last, EvaluationRecord) and last.val and last.val["ensemble"]["n"] == 6
    with torch.no_grad():
        logits = {name: module(images) for name, module in nets.items()}
    for name, found in logits.items():
        assert last.test["peers"][name]["top1"] == (found.argmax(1) == labels).sum().item() / 40
    mean = sum(found.softmax(1) for found in logits.values()) / 2
    assert last.test["ensemble"]["top1"] == (mean.argmax(1) == labels).sum().item() / 40


def test_uint8_images_are_augmented_as_in_a_run(
    training: Callable[..., Training], digits: Source
) -> None:
    # The networks and images of a run, given to both: the same augmented batches, step by step.
    fast = training(images=64, cohort=("resnet8*2",), lr_step=100)
    nets = {peer.name: copy.deepcopy(peer.module) for peer in fast.peers}
    train = (digits.train.images[:64], digits.train.labels[:64])
    test = (digits.test.images[:8], digits.test.labels[:8])
    config = settings(augment="crop", epochs=1, max_steps=3)
    found = steps(list(learn(nets, train, test, config)))
    for record, expected in zip(found, fast.take(3), strict=True):
        assert torch.equal(record.losses_KP, expected)
    for peer in fast.peers:
        assert torch.equal(nets[peer.name].fc.weight, peer.module.fc.weight)


def test_images_whose_labels_are_not_used_do_not_matter_without_kl() -> None:
    images, labels = features()
    config = settings(labelled_fraction=0.5, kl_weight=0.0, epochs=1)
    used = labelled_rows(labels, 0.5, config.seed)
    assert used is not None and len(used) == 12
    other = images + 1
    other[used] = images[used]
    nets = [net(4)]
    nets += [copy.deepcopy(nets[0]), copy.deepcopy(nets[0])]
    for module, shown, share in zip(nets, (images, other, other), (0.5, 0.5, 1.0), strict=True):
        given = config.changed(labelled_fraction=share)
        list(learn({"a": module}, (shown, labels), features(5), given))
    assert torch.equal(nets[0][1].weight, nets[1][1].weight)
    assert not torch.equal(nets[0][1].weight, nets[2][1].weight)


def test_what_does_not_fit_is_refused_at_once() -> None:
    good = {"a": net(4), "b": net(9)}
    data, test = features(), features(5)
    pictures = torch.zeros(ROWS, 8, 8, 3, dtype=torch.uint8)
    twins = {"a": good["a"], "b": copy.deepcopy(good["a"])}
    for modules, train, report, changes, message in (
        ({}, data, test, {}, "modules is empty"),
        (list(good.values()), data, test, {}, "modules is a list; it must map names to networks"),
        (twins, data, test, {}, "a and b start with the same weights"),
        (good, data, (test[0][:, :1], test[1]), {}, r"test has images \[5, 1, 5\] of"),
        (good, (data[0], data[1][:3]), test, {}, r"images \[24, 2, 5\] and labels \[3\]"),
        (good, (data[0], data[1].float()), test, {}, "each image needs a label of torch.int64"),
        (good, (data[0], data[1] - 1), test, {}, "train has labels from -1 to 1; .* 3 classes"),
        (good, data, (test[0], test[1] + 1), {}, "test has labels from 1 to 3"),
        (good, (pictures[..., :1], data[1]), test, {}, r"give uint8 images \[N, H, H, 3\], or"),
        (
            good,
            (pictures, data[1]),
            (pictures, data[1]),
            {},
            r"a cannot take images \[1, 3, 8, 8\]",
        ),
        (good | {"c": nn.Flatten()}, data, test, {}, "c has no parameters to train"),
        (
            {"a": good["a"]},
            data,
            test,
            {"ce_weight": 0.0},
            "--ce-weight 0 leaves a nothing to learn",
        ),
        (good, data, test, {"ce_weight": 0.0, "links": "leader"}, "leaves a nothing to learn"),
        ({"a": good["a"]}, data, test, {"update": "switch"}, "is made for two peers, not for 1"),
        (good | {"c": nn.Linear(5, 3)}, data, test, {}, r"must return logits \[1, classes\]"),
        (good, data, test, {"augment": "crop"}, "floating images are used as they are"),
        (good, data, test, {"augment": "cropp"}, "floating images are used as they are"),
        (good, data, test, {"cutmix": 1.0}, r"needs images \[N, C, H, W\]; these are \[N, 2, 5\]"),
        (good, (pictures, data[1]), (pictures, data[1]), {"augment": "cropp"}, "unknown word"),
        (good, data, test, {"batch_size": 25}, "--batch-size 25 is more than the 24"),
        (good, data, test, {"log_with": ("tensorboard",)}, "learn writes no files"),
        (good, data, test, {"placement": "split"}, "every network in every process"),
    ):
        with pytest.raises(UsageError, match=message):
            learn(modules, train, report, settings(**changes))


class Trained(nn.Module):
    """A network that returns something else in training."""

    def __init__(self, change: Callable[[torch.Tensor], Any], inner: nn.Module | None = None):
        super().__init__()
        self.inner, self.change = inner or net(4), change

    def forward(self, x: torch.Tensor) -> Any:
        return self.change(self.inner(x)) if self.training else self.inner(x)


Aux = namedtuple("Aux", "logits aux")


def lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))


def lazy_buffer() -> nn.Module:
    module = net(4)
    module.insert(1, nn.LazyBatchNorm1d(affine=False))
    return module


def sparse_buffer() -> nn.Module:
    module = net(4)
    module.register_buffer("table", torch.eye(3).to_sparse())
    return module


def mixed() -> nn.Module:
    module = net(4)
    module[3].half()
    return module


def in_place() -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), net(4))


def made_for_inference() -> nn.Module:
    with torch.inference_mode():
        return net(4)


NETWORKS: dict[str, tuple[Callable[[], Any], str]] = {
    "aux": (lambda: Trained(lambda z: Aux(z, z)), "in training mode it returns a Aux, not a tens"),
    "list": (lambda: Trained(lambda z: [z]), "it returns a list, not a tensor of logits"),
    "shape": (lambda: Trained(lambda z: z[:, :2]), r"returns shape \[2, 2\], not logits \[2, 3\]"),
    "one row": (lambda: Trained(lambda z: z[:1]), r"returns shape \[1, 3\], not logits \[2, 3\]"),
    "integers": (lambda: Trained(lambda z: z.long()), "it returns logits of torch.int64"),
    "complex": (lambda: Trained(lambda z: z + 0j), "it returns logits of torch.complex64"),
    "nan": (lambda: Trained(lambda z: z * float("nan")), "it returns logits that are not finite"),
    "detached": (lambda: Trained(lambda z: z.data), "logits that carry no gradient to its weights"),
    "backward": (
        lambda: Trained(lambda z: z.exp() * z.exp().exp_()),
        "fails: one of the variables needed",
    ),
    "broken": (
        lambda: Trained(lambda z: z @ z),
        "a cannot be trained: .* it fails: .*mat1 and mat2",
    ),
    "one image": (lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(10), net(4)), "single image"),
    "frozen": (lambda: net(4).requires_grad_(False), "a is frozen, so there is nothing to train"),
    "double": (lambda: net(4).double(), r"1.weight is torch.float64, but .* call a.float\(\)"),
    "half": (
        lambda: net(4).half(),
        "a: 1.weight is torch.float16, but weights must be torch.float",
    ),
    "bfloat16": (lambda: net(4).bfloat16(), "a: 1.weight is torch.bfloat16"),
    "mixed": (mixed, "a: 3.weight is torch.float16, but weights must be torch.float32"),
    "complex weights": (
        lambda: nn.Linear(5, 3, dtype=torch.complex64),
        "weight is torch.complex64",
    ),
    "meta": (lambda: net(4).to("meta"), "1.weight is on the device meta, which holds no values"),
    "lazy": (lazy, "a: the layer of 1.weight is lazy: call a on an image first"),
    "inference": (made_for_inference, r"a: 1.weight was made under torch.inference_mode\(\)"),
    "changes images": (in_place, "a cannot take images .* changes its images in place, which its"),
    "lazy buffer": (lazy_buffer, "a: the layer of 1.running_mean is lazy: call a on an image"),
    "sparse buffer": (sparse_buffer, r"a: the buffer table is sparse .*: .* table.to_dense\(\)"),
    "evaluation": (lambda: Trained(lambda z: z, nn.Flatten()), "a has no parameters to train"),
    "class": (lambda: nn.Linear, r"modules\['a'\] is a type; names must be text"),
    "compiled": (lambda: torch.compile(net(4)), "a is compiled: give the network itself, and Conf"),
    "function": (lambda: torch.relu, r"modules\['a'\] is a builtin_function_or_method"),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_that_the_first_step_would_trip_over_are_refused_at_once(kind: str) -> None:
    make, text = NETWORKS[kind]
    images, labels = features(8)
    data, config = (images.float(), labels), settings(float64=False, batch_size=1)
    module = make()
    with pytest.raises(UsageError, match=text) as refused:
        learn({"b": net(9), "a": module}, data, data, config)
    assert "\n" not in str(refused.value)


def test_a_module_dict_maps_names_to_networks_and_a_dict_is_no_configuration() -> None:
    modules = nn.ModuleDict({"a": net(4), "b": net(9)})
    *_, last = learn(modules, features(), features(5), settings())
    assert set(last.test["peers"]) == {"a", "b"}
    with pytest.raises(UsageError, match="config is a dict; it must be a Config"):
        learn(modules, features(), features(5), {"epochs": 1})


def test_networks_that_share_are_refused() -> None:
    trunk, data = nn.Sequential(nn.Flatten(), nn.Linear(10, 4)), features()
    shared = {name: nn.Sequential(trunk, nn.Linear(4, 3)) for name in "ab"}
    with pytest.raises(
        UsageError, match="^a and b share the weight 0.1.weight: each network needs"
    ):
        learn(shared, data, data, settings())
    with pytest.raises(UsageError, match="^a and b share the weight 1.weight: each network needs"):
        learn(dict.fromkeys("ab", net(4)), data, data, settings())


class Endless(Dataset):
    """As a data set may be: without a length and without an end."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(2, 5), 0


IMAGES, LABELS = features()
PIXELS = torch.zeros(ROWS, 3, 8, 8, dtype=torch.uint8)
HOLE = IMAGES.clone()
HOLE[7, 1, 2] = float("inf")
PAIR = "learn takes a pair of tensors"
DATA: dict[str, tuple[Any, str]] = {
    "none": (None, rf"train is a NoneType; {PAIR} \(images, labels\)"),
    "data set": (Endless(), r"train is a Endless without len\(\): give it __len__"),
    "pairs": ([(image, 0) for image in IMAGES], rf"train is a list; {PAIR} .*: torch.stack\(\["),
    "three": (
        (IMAGES, LABELS, LABELS),
        rf"train is a tuple of tensors; {PAIR} .*, and these are 3",
    ),
    "two pairs": (
        [(IMAGES[0], 0), (IMAGES[1], 1)],
        "its images are a tuple of tensors; learn takes",
    ),
    "generator": (
        (one for one in [IMAGES, LABELS]),
        "train is a generator, which can be read once",
    ),
    "dictionary": ({"images": IMAGES, "labels": LABELS}, f"train is a dict; {PAIR}"),
    "tensor": (torch.zeros(2, 5), f"train is a Tensor; {PAIR}"),
    "array": (IMAGES.numpy(), f"train is a ndarray; {PAIR}"),
    "text": ("photos", f"train is a str; {PAIR}"),
    "lists": (
        (list(IMAGES), list(LABELS)),
        r"images are a list of tensors; .*: torch.stack\(images",
    ),
    "arrays": ((IMAGES.numpy(), LABELS), r"images are a ndarray; .*: torch.as_tensor\(images\)"),
    "array of labels": (
        (IMAGES, LABELS.numpy()),
        r"labels are a ndarray; .*torch.as_tensor\(labels",
    ),
    "list of labels": (
        (IMAGES, LABELS.tolist()),
        r"labels are a list; .*: torch.as_tensor\(labels\)",
    ),
    "int32": ((IMAGES, LABELS.int()), r"of torch.int32; .* torch.int64; use labels.long\(\)"),
    "uint8": ((IMAGES, LABELS.byte()), r"of torch.uint8; .*; use labels.long\(\)"),
    "bool": ((IMAGES, LABELS > 0), r"of torch.bool; .*; use labels.long\(\)"),
    "float": ((IMAGES, LABELS.float()), r"of torch.float32; .*; use labels.long\(\)"),
    "one-hot": (
        (IMAGES, nn.functional.one_hot(LABELS)),
        r"labels \[24, 3\] .*; use labels.argmax\(1\)",
    ),
    "column": ((IMAGES, LABELS[:, None]), r"labels \[24, 1\] .*; use labels\[:, 0\].long\(\)"),
    "fewer": ((IMAGES, LABELS[:5]), r"labels \[5\] of torch.int64; each image needs a label"),
    "one label": ((IMAGES, LABELS[0]), r"labels \[\] of torch.int64; each image needs a label"),
    "empty": ((IMAGES[:0], LABELS[:0]), "at least one image is needed"),
    "no images": ((torch.tensor(1.0), LABELS), "at least one image is needed"),
    "channels first": (
        (PIXELS, LABELS),
        r"floating ones of any shape: images.permute\(0, 2, 3, 1\)",
    ),
    "grey": ((PIXELS[:, 0], LABELS), "of torch.uint8; give uint8 images .*: images / 255"),
    "integers": ((PIXELS.long(), LABELS), r"of torch.int64; give uint8 .*: images.float\(\)"),
    "complex": ((IMAGES + 0j, LABELS), r"of torch.complex128; give uint8"),
    "gradients": (
        (IMAGES.clone().requires_grad_(), LABELS),
        r"require gradients; give images.detach",
    ),
    "sparse": ((IMAGES.to_sparse(), LABELS), r"its images are not dense; .*: images.to_dense\(\)"),
    "meta": ((IMAGES.to("meta"), LABELS), "its images are on the device meta"),
    "not finite": ((HOLE, LABELS), "train: image 7 has values that are not finite"),
}


@pytest.mark.parametrize("kind", DATA)
def test_data_of_another_kind_are_refused_with_how_to_convert_them(kind: str) -> None:
    data, text = DATA[kind]
    nets, test = {"a": net(4), "b": net(9)}, features(5)
    with pytest.raises(UsageError, match=text) as refused:
        learn(nets, data, test, settings())
    assert "\n" not in str(refused.value)
    with pytest.raises(UsageError, match=text.replace("train", "test")):
        learn(nets, test, data, settings(batch_size=5))


def test_looking_at_networks_changes_nothing_that_they_learn() -> None:
    def nets() -> dict[str, nn.Module]:
        torch.manual_seed(3)
        norm = nn.BatchNorm1d(10)
        norm.eval()  # learn trains it all the same
        return {"a": nn.Sequential(nn.Flatten(), norm, nn.Dropout(), net(4)), "b": net(9)}

    looked, trained, data = nets(), nets(), features()
    before = copy.deepcopy(looked["a"].state_dict())
    for _ in range(3):
        learn(looked, data, data, settings())  # never begun
    next(learn(copy.deepcopy(looked), data, data, settings()))  # never finished
    assert_same_state(looked["a"].state_dict(), before)
    assert not looked["a"][1].training and looked["a"].training
    losses = [
        torch.stack(
            [record.losses_KP for record in steps(list(learn(one, data, data, settings())))]
        )
        for one in (looked, trained)
    ]
    assert torch.equal(*losses)
    assert_same_state(looked["a"].state_dict(), trained["a"].state_dict())


def test_every_call_has_its_own_precision() -> None:
    data = tuple(one.float() if one.is_floating_point() else one for one in features())
    first = {"a": net(4), "b": net(9)}

    def losses(precision: str, nets: dict[str, nn.Module]) -> torch.Tensor:
        config = settings(float64=False, mixed_precision=precision)
        records = steps(list(learn(nets, data, data, config)))
        assert all("forward" not in vars(one) for one in nets.values())
        return torch.stack([record.losses_KP for record in records])

    found = [losses(precision, copy.deepcopy(first)) for precision in ("no", "bf16", "no", "bf16")]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])
    # Of networks that were trained before, and of networks that an accelerator of the user holds.
    again = copy.deepcopy(first)
    again["a"]._original_forward = again["a"].forward
    again["a"].forward = lambda x: first["b"](x)
    again["b"]._is_accelerate_prepared = True
    config = settings(float64=False, mixed_precision="bf16")
    records = steps(list(learn(again, data, data, config)))
    assert torch.equal(torch.stack([record.losses_KP for record in records]), found[1])
    assert again["a"](data[0]) is not None and again["b"]._is_accelerate_prepared
    assert torch.equal(again["a"](data[0]), first["b"](data[0]))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("memory_format", [None, "channels_last"])
def test_batch_norms_are_what_they_were_afterwards(
    tmp_path: Path, precision: str, memory_format: str | None
) -> None:
    nets = {
        name: nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.LazyLinear(CLASSES)
        )
        for name, width in (("student", 4), ("other", 5))
    }
    images = torch.randint(0, 256, (ROWS, 8, 8, 3), dtype=torch.uint8)
    data = images, torch.arange(ROWS) % CLASSES
    for one in nets.values():
        one(torch.zeros(2, 3, 8, 8))  # the last layer learns its size
    config = settings(
        float64=False,
        mixed_precision=precision,
        memory_format=memory_format,
        output_dir=str(tmp_path / "run"),
    )
    assert steps(list(learn(nets, data, data, config)))
    assert all(type(one[1]) is nn.BatchNorm2d for one in nets.values())


def test_learn_trains_whatever_the_caller_does_with_gradients() -> None:
    nets, data = {"a": net(4), "b": net(9)}, features()
    with torch.no_grad():
        for _ in learn(nets, data, data, settings(epochs=1)):
            assert not torch.is_grad_enabled()
    with (
        torch.inference_mode(),
        pytest.raises(UsageError, match="learn cannot train under torch.inf"),
    ):
        learn(nets, data, data, settings())


def test_importing_the_package_imports_no_more_than_its_networks() -> None:
    script = (
        "import sys, dml_accel\n"
        "assert 'accelerate' not in sys.modules and 'dml_accel.training.learn' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'lern'"):
        _ = dml_accel.lern
