"""Networks of a run share nothing, can learn, and are left as they were by looking at them."""

import copy
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import timm.models._registry as registry
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from dml_accel.core.errors import UsageError
from dml_accel.data.sources import Source
from dml_accel.models.build import refuse_shared
from dml_accel.models.model_card import own_networks, peer_card
from dml_accel.models.rehearsal import logits_problem
from dml_accel.models.spec import PeerSpec
from dml_accel.training import setup
from tests.helpers import assert_same_state, build_peer, tiny_config

# ---------------------------------------------------------------- nothing is shared


class Body(nn.Module):
    """A network that holds what it is given."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.head = nn.Linear(2, 2)


class Memory(nn.Module):
    """Has no tensors, and remembers what it has seen."""


def plain(value: object) -> Body:
    net = Body()
    vars(net)["kept"] = value
    return net


def hooked() -> nn.Module:
    module = nn.ReLU()
    module.register_forward_hook(lambda *_: None)
    return module


FLAT = torch.zeros(10)
STATISTICS = nn.BatchNorm1d(2, affine=False)
SHARED: dict[str, tuple[Callable[[Any], nn.Module], Any, str]] = {
    "trunk": (lambda x: Body(trunk=nn.Sequential(x)), nn.Linear(2, 2), "weight trunk.0.weight"),
    "same": (lambda x: x, nn.Linear(2, 2), "weight weight"),
    "embedding": (lambda x: Body(table=x), nn.Embedding(3, 2), "weight table.weight"),
    "parameter": (lambda x: Body(scale=x), nn.Parameter(torch.zeros(2)), "weight scale"),
    "buffer": (lambda x: Body(mean=x), torch.zeros(2), "buffer mean"),
    "batch norm": (lambda x: Body(norm=x), STATISTICS, "buffer norm.running_mean"),
    "plain tensor": (plain, torch.zeros(2), "tensor kept"),
    "in a list": (plain, [nn.Linear(2, 2)], "tensor kept"),
    "in a dictionary": (plain, {"a": torch.zeros(2)}, "tensor kept"),
    "memory": (lambda x: Body(part=x), Memory(), r"module part \(Memory\), which may keep"),
    "hook": (lambda x: Body(part=x), hooked(), r"module part \(ReLU\), which may keep"),
}


@pytest.mark.parametrize("kind", SHARED)
def test_networks_that_share_anything_are_refused(kind: str) -> None:
    make, part, text = SHARED[kind]
    with pytest.raises(
        UsageError, match=f"^b and a share the {text}.*: each network needs its own"
    ):
        refuse_shared({"b": make(part), "other": nn.Linear(2, 2), "a": make(part)})
    refuse_shared({"b": make(part), "a": copy.deepcopy(make(part))})


@pytest.mark.parametrize(
    ("ranges", "shared"), [((0, 5, 5, 10), False), ((0, 6, 5, 10), True), ((5, 7, 0, 10), True)]
)
def test_views_may_not_overlap(ranges: tuple[int, ...], shared: bool) -> None:
    a, b, c, d = ranges
    nets = {"b": Body(view=FLAT[a:b]), "a": Body(part=nn.Parameter(FLAT[c:d]))}
    if not shared:
        return refuse_shared(nets)
    with pytest.raises(UsageError, match="b and a share the buffer view: "):
        refuse_shared(nets)


def test_a_network_may_share_within_itself_and_layers_that_keep_nothing() -> None:
    relu, drop = nn.ReLU(), nn.Dropout()
    nets = {name: Body(first=nn.Linear(2, 2), act=relu, drop=drop) for name in "ab"}
    for net in nets.values():
        net.first.weight = net.head.weight
        net.again = net.head
    refuse_shared(nets)


# ---------------------------------------------------------------- networks that a file registers

Make = Callable[[], nn.Module]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Make], None]]:
    """Register what a function makes as timm's network ``pebble``, for one test."""
    for name in ("_model_entrypoints", "_module_to_models", "_model_to_module"):
        monkeypatch.setattr(registry, name, copy.copy(getattr(registry, name)))
    for name in ("_model_default_cfgs", "_model_pretrained_cfgs"):
        if hasattr(registry, name):
            monkeypatch.setattr(registry, name, copy.copy(getattr(registry, name)))

    made: list[Make] = []

    def pebble(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(lambda **_: made[-1](), "pebble", pretrained, **kwargs)

    cfgs = generate_default_cfgs({"pebble.untrained": {}})
    monkeypatch.setitem(globals(), "default_cfgs", cfgs)
    register_model(pebble)
    yield made.append


class Pebble(nn.Module):
    """Ten classes; what it does in training is another function's business."""

    def __init__(self, stem: nn.Module | None = None, trained: Any = None) -> None:
        super().__init__()
        self.num_classes = 10
        self.stem = stem or nn.Conv2d(3, 4, 3)
        self.norm, self.fc = nn.BatchNorm1d(4), nn.Linear(4, 10)
        self.trained = trained or (lambda out, _: out)

    def forward(self, x: Tensor) -> Any:
        out = self.fc(self.norm(self.stem(x).mean((2, 3))))
        return self.trained(out, x) if self.training else out


def check(digits: Source, *cohort: str, **changes: Any) -> dict[str, nn.Module]:
    config = tiny_config(cohort=cohort, float64=False, **changes)
    return setup.check(config, digits)[1]


def test_registered_networks_from_a_cache_are_refused(
    digits: Source, register: Callable[[Make], None]
) -> None:
    one, stem = Pebble(), nn.Conv2d(3, 4, 3)
    register(lambda: one)
    with pytest.raises(UsageError, match="pebble-0 and pebble-1 share the weight stem.weight"):
        check(digits, "timm:pebble*2")
    register(lambda: Pebble(stem))
    with pytest.raises(UsageError, match="pebble-0 and pebble-1 share the weight stem.weight"):
        check(digits, "timm:pebble*2")
    kept = check(digits, "timm:pebble", "resnet8")
    with pytest.raises(UsageError, match="pebble-0 has the weight stem.weight of a network that"):
        check(digits, "timm:pebble", "resnet8")
    register(Pebble)
    assert len(kept) == len(check(digits, "timm:pebble*2"))


def changes_images(out: Tensor, x: Tensor) -> Tensor:
    x -= 0.5
    return out


BAD_IN_TRAINING: dict[str, tuple[Any, str]] = {
    "tuple": (lambda out, _: (out, out), "returns a tuple, not a tensor of logits"),
    "dict": (lambda out, _: {"out": out}, "returns a dict, not a tensor of logits"),
    "shape": (lambda out, _: out[:, :5], r"returns shape \[2, 5\], not logits \[2, 10\]"),
    "one row": (lambda out, _: out.mean(0, keepdim=True), r"returns shape \[1, 10\]"),
    "complex": (lambda out, _: out.to(torch.complex64), "returns logits of torch.complex64"),
    "nan": (lambda out, _: out / 0 * 0, "returns logits that are not finite"),
    "no gradient": (lambda out, _: out.detach(), "returns logits that carry no gradient"),
    "in place": (lambda out, _: out.exp().add_(1).mul(out.exp_()), "fails: one of the variables"),
    "images": (changes_images, "changes its images in place, which its peers see too"),
}


@pytest.mark.parametrize("kind", BAD_IN_TRAINING)
def test_registered_networks_that_cannot_learn_are_refused(
    digits: Source, register: Callable[[Make], None], kind: str
) -> None:
    trained, text = BAD_IN_TRAINING[kind]
    register(lambda: Pebble(trained=trained))
    with pytest.raises(UsageError, match=f"pebble-0 cannot be trained: in training mode it {text}"):
        check(digits, "timm:pebble", "resnet8")


def test_a_card_says_what_registers_a_network_that_timm_does_not_know(
    register: Callable[[Make], None],
) -> None:
    register(Pebble)
    line = "import tests.models.test_build  # registers pebble with timm, which does not know it"
    ours = "import dml_accel  # registers the *_cifar networks with timm\n"
    for arch, lines in (("pebble", ours + line), ("resnet8_cifar", ours + "\nnet = timm.")):
        card = peer_card(Pebble(), PeerSpec("a-0", arch), {}, "digits", 1, [], False)
        assert lines in str(card)
    assert own_networks(["test_vit", "pebble", "unknown"]) == {"pebble": __name__}


def test_arguments_that_keep_trained_patches_are_offered_first() -> None:
    small = {"depth": 1, "embed_dim": 12, "num_heads": 1}
    whole = r"'timm:vit_tiny_patch16_224\[img_size=96\]'"
    text = f"try {whole}, {whole[:-3]},patch_size=12.' or --image-size 224"
    with pytest.raises(UsageError, match=text):
        build_peer(PeerSpec("vit-0", "vit_tiny_patch16_224", small), tiny_config(image_size=96), 10)


# ---------------------------------------------------------------- no trace


class Noisy(Pebble):
    """Changes, in each forward pass, everything that a network can change."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.calls, self.last = 0, torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.last = self.calls + 1, x
        self.seen = self.seen + random.random() + np.random.rand()
        self.register_buffer("late", x)
        with torch.no_grad():
            self.fc.bias += 1
        return super().forward(nn.functional.dropout(x))


def with_lock(net: Noisy) -> Noisy:
    net.lock = threading.Lock()  # cannot be copied
    return net


def copied_as_itself(net: Noisy) -> Noisy:
    vars(net)["__deepcopy__"] = lambda memo: net
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("holds", [lambda net: net, with_lock, copied_as_itself])
@pytest.mark.parametrize("fails", [False, True])
def test_a_rehearsal_leaves_no_trace(
    holds: Callable[[Noisy], Noisy], dtype: torch.dtype, fails: bool
) -> None:
    net = holds(Noisy())
    net.train()
    net.norm.eval()
    net.fc.weight.grad = torch.ones(10, 4)
    x = torch.randn(2, 3, 8, 8)

    def held() -> dict[str, Any]:
        return {name: dict(vars(module)) for name, module in net.named_modules()}

    state, attributes, places = copy.deepcopy(net.state_dict()), held(), net.state_dict()
    gradient, images = net.fc.weight.grad, x.clone()
    randomness = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    classes = 7 if fails else 10
    reason, found = logits_problem(net, x, classes, train=True, dtype=dtype)
    assert (bool(reason), found) == (fails, 0 if fails else 10)
    assert_same_state(net.state_dict(), state)
    assert {n: t.data_ptr() for n, t in net.state_dict().items()} == {
        n: t.data_ptr() for n, t in places.items()
    }
    assert held() == attributes
    assert net.fc.weight.grad is gradient and net.fc.bias.grad is None
    assert torch.equal(gradient, torch.ones(10, 4)) and torch.equal(x, images)
    assert torch.equal(torch.get_rng_state(), randomness[0])
    assert random.getstate() == randomness[1]
    assert (np.random.get_state()[1] == randomness[2]).all()
