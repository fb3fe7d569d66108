"""Networks of a run share nothing, can learn, and are left as they were by looking at them."""

import copy
import functools
import io
import random
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import timm.models._registry as registry
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from dml_accel.core.errors import UsageError
from dml_accel.data.pixels import Geometry
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
        spec, square = PeerSpec("a-0", arch), Geometry(8, 8)
        card = peer_card(Pebble(), spec, {}, "digits", 1, [], False, square)
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


class Held(nn.Module):
    """Three layers, of which ``norm`` is called through what a test makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


class Through(Held):
    """Calls all of its layers through a function."""

    call: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


class Counting(Held):
    """Counts in Python and in TorchScript, whichever it is in."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("total", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.total = self.total + 1
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


def through(make: Callable[[Any], Callable[[Tensor], Tensor]]) -> nn.Module:
    net = Through()
    net.call = make(net)
    return net


def with_hook(call: Callable[[Any], Any]) -> nn.Module:
    net = Held()

    def hook(*_: object) -> None:
        call(net)

    net.conv.register_forward_hook(hook)
    return net


def with_hidden_layer(hold: Callable[[Any], Any], call: Callable[..., Tensor]) -> nn.Module:
    """Return a network that uses a layer which is not among its modules."""
    net, hidden = Held(), nn.BatchNorm2d(3)
    vars(net).update(held=hold(hidden), hidden=weakref.ref(hidden))  # the latter for ``everything``
    net.register_forward_pre_hook(lambda net, args: (call(net.held, args[0]),))
    return net


def with_buffer(buffer: Tensor) -> nn.Module:
    net = Held()
    net.register_buffer("constant", buffer)
    return net


def drawing(source: Any, draw: Callable[[Any], Any]) -> nn.Module:
    net = with_hook(lambda net: draw(net.source))
    net.source = source
    return net


def with_optimizer_in_backward() -> nn.Module:
    net = Held()
    steps = [0]
    vars(net)["steps"] = lambda: tuple(steps)  # the list is not the network's

    def step(weight: Tensor) -> None:
        steps[0] += 1

    net.head.weight.register_post_accumulate_grad_hook(step)
    return net


def that_thaws() -> nn.Module:
    net = with_hook(lambda net: net.head.bias.requires_grad_(True))
    net.head.bias.requires_grad_(False)
    return net


def loaded_script() -> nn.Module:
    content = io.BytesIO()
    torch.jit.save(torch.jit.script(Held()), content)
    content.seek(0)
    return torch.jit.load(content)


def made_in_inference() -> nn.Module:
    with torch.inference_mode():
        buffer = torch.ones(3)
    return with_buffer(buffer)


HELD: dict[str, Callable[[], nn.Module]] = {
    "closure": lambda: through(lambda net: lambda x: Held.forward(net, x)),
    "default": lambda: through(lambda net: lambda x, net=net: Held.forward(net, x)),
    "method": lambda: through(lambda net: types.MethodType(Held.forward, net)),
    "partial": lambda: through(lambda net: functools.partial(Held.forward, net)),
    "hook": lambda: with_hook(lambda net: net.norm(torch.ones(2, 4, 1, 1))),
    "hidden in a list": lambda: with_hidden_layer(lambda one: [one], lambda at, x: at[0](x)),
    "hidden in an object": lambda: with_hidden_layer(
        lambda one: types.SimpleNamespace(a=one), lambda at, x: at.a(x)
    ),
    "hidden in a function": lambda: with_hidden_layer(
        lambda one: lambda x: one(x), lambda at, x: at(x)
    ),
    "script": lambda: torch.jit.script(Counting()),
    "loaded script": loaded_script,
    "trace": lambda: torch.jit.trace(Held(), torch.ones(2, 3, 8, 8), check_trace=False),
    "list": lambda: drawing([1], lambda found: found.append(1)),
    "dict": lambda: drawing({}, lambda found: found.setdefault(1, 1)),
    "set": lambda: drawing({2}, lambda found: found.add(1)),
    "object": lambda: drawing(types.SimpleNamespace(n=1), lambda o: setattr(o, "n", o.n + 1)),
    "tensor": lambda: drawing(torch.zeros(2), lambda found: found.add_(1)),
    "array": lambda: drawing(np.zeros(2), lambda found: found.put(0, 1)),
    "generator": lambda: drawing(torch.Generator(), lambda g: torch.rand(1, generator=g)),
    "random": lambda: drawing(random.Random(1), lambda source: source.random()),
    "numpy": lambda: drawing(np.random.default_rng(1), lambda source: source.random()),
    "expanded": lambda: with_buffer(torch.ones(1).expand(3)),
    "of inference": made_in_inference,
    "thaws": that_thaws,
    "optimizer": with_optimizer_in_backward,
}


def everything(net: Any) -> str:
    """Return, as text, all that the networks above hold."""
    source = getattr(net, "source", None)
    if isinstance(source, torch.Generator):
        source = source.get_state().tolist()
    elif isinstance(source, random.Random):
        source = source.getstate()
    elif isinstance(source, np.random.Generator):
        source = source.bit_generator.state
    modules = [*net.modules(), *([net.hidden()] if hasattr(net, "hidden") else [])]
    tensors = [t for m in modules for t in (*m.parameters(False), *m.buffers(False))]
    return repr(
        [
            [(t.tolist(), t.dtype, t.grad, t.requires_grad) for t in tensors],
            [len(t._post_accumulate_grad_hooks or ()) for t in tensors],
            [module.training for module in modules],
            getattr(net, "calls", None),
            net.steps() if hasattr(net, "steps") else None,
            source,
        ]
    )


@pytest.mark.filterwarnings("ignore")  # torch calls TorchScript deprecated
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", HELD)
def test_what_a_network_holds_is_tried_and_put_back(kind: str, dtype: torch.dtype) -> None:
    net, x = HELD[kind](), torch.rand(2, 3, 8, 8)
    before = everything(net)
    reason, _ = logits_problem(net, x, 10, train=True, dtype=dtype, all_used=True)
    assert not reason or (dtype == torch.float64 and kind in NEVER_DOUBLE), reason
    assert everything(net) == before
    assert everything(net.eval()) != before  # the comparison sees something


# A layer, or an image in a hook, that ``net.double()`` does not reach.
NEVER_DOUBLE = [*(kind for kind in HELD if kind.startswith("hidden")), "hook"]
