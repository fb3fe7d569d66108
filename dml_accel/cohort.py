"""The cohort: who learns together, each peer in one record of its own.

A peer's initial weights and dropout are keyed by the seed and its name, never by its place in
the cohort: permuting the cohort permutes the results, and two peers never start equal.
"""

import ast
import contextlib
import copy
import difflib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dml_accel import networks, pretrained
from dml_accel.config import Config, UsageError
from dml_accel.keys import key
from dml_accel.pretrained import LEADS_ELSEWHERE, Weights

DEFAULT_NET = "resnet32"
SHORT_NAMES = tuple(name.removesuffix("_cifar") for name in networks.default_cfgs)


@dataclass(frozen=True)
class PeerSpec:
    """A peer before it is built: ``name`` in this cohort, timm's ``arch`` and its arguments.

    ``start`` says which trained weights it starts from (``pretrained.read``); None: untrained.
    """

    name: str
    arch: str
    arguments: dict[str, Any] = field(default_factory=dict)
    start: str | None = None


@dataclass
class Peer:
    """A network that learns, with what belongs to it alone.

    A loss scaler of its own too: one shared by several optimizers is updated by the first of
    them to step, and the others then divide their gradients by the wrong scale.

    ``net`` is what is called in training, wrapped as the placement needs it; ``module`` is the
    bare network whose parameters are saved. ``keeps_gradients`` where the memory of a backward pass
    is used again by the next network's, as CUDA graphs do: gradients then have memory of their own.
    """

    spec: PeerSpec
    module: nn.Module
    net: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    keeps_gradients: bool = False
    _buffers: list[tuple[list[Tensor], Tensor]] = field(default_factory=list, init=False)

    @property
    def name(self) -> str:
        """The peer's name, ``<net>-<index>``."""
        return self.spec.name

    def begin(self, lr: float) -> None:
        """Prepare a step: no gradients, its learning rate, and a copy of the buffers."""
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        if self.keeps_gradients:
            for weight in self.module.parameters():
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._buffers = self._copied_buffers()

    def _copied_buffers(self) -> list[tuple[list[Tensor], Tensor]]:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self.module.buffers():
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        return [(same, _flat(same)) for same in by_dtype.values()]

    @contextlib.contextmanager
    def keeping_buffers(self) -> Iterator[None]:
        """Leave the running statistics as they are, whatever is predicted meanwhile."""
        copied = self._copied_buffers()
        yield
        for buffers, before in copied:
            _set(buffers, before)

    def update(self, finite: Tensor, clip_norm: float | None) -> None:
        """Take the optimizer's step, or leave everything as it is where ``finite`` is false.

        Args:
            finite: whether the loss was, on the device; it is not read back.
            clip_norm: largest norm of the gradient, or None.
        """
        if clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.module.parameters(), clip_norm)
        # What fused optimizers look at before they touch anything.
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for buffers, before in self._buffers:  # running statistics have moved in the forward pass
            _set(buffers, torch.where(finite, _flat(buffers), before))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@torch.no_grad()
def _set(buffers: list[Tensor], flat: Tensor) -> None:
    parts = flat.split([buffer.numel() for buffer in buffers])
    shaped = [p.view_as(b) for p, b in zip(parts, buffers, strict=True)]
    torch._foreach_copy_(buffers, shaped)


def parse(cohort: Sequence[str]) -> list[PeerSpec]:
    """Read ``--cohort``: a number K, or nets as ``name``, ``name*N`` and ``timm:name[key=value]``.

    Returns:
        The peers in the order given; each is named ``<net>-<index>``, the index counting peers of
        that net.

    Raises:
        UsageError: fewer than one peer, an unknown net (the nearest names are listed) or
            arguments that cannot be read.
    """
    if len(cohort) == 1 and re.fullmatch(r"[+-]?\d+", cohort[0]):
        cohort = [f"{DEFAULT_NET}*{int(cohort[0])}"]
    specs: list[PeerSpec] = []
    count: Counter[str] = Counter()
    for text in cohort:
        match = re.fullmatch(r"(timm:)?([^\s\[\]*:]+)(?:\[([^\[\]]*)\])?(?:\*(-?\d+))?", text)
        if not match:
            raise UsageError(
                f"--cohort {text!r} cannot be read: write a number K alone, or name, name*N or "
                "'timm:name[key=value,...]*N'"
            )
        prefix, net, arguments, times = match.groups(default="")
        if int(times or 1) < 1:
            raise UsageError(f"--cohort {text!r} asks for {times} peers; at least 1 is needed")
        arch = net if prefix else f"{net}_cifar"
        _require_known(arch, net, bool(prefix))
        known, start = _arguments(text, arguments)
        for _ in range(int(times or 1)):
            specs.append(PeerSpec(f"{net}-{count[net]}", arch, dict(known), start))
            count[net] += 1
    return specs


def label(peers: Sequence[str]) -> str:
    """Return a cohort's short name for folders: ``resnet32x2-wrn_28_10`` for its peers' names."""
    nets = Counter(name.rpartition("-")[0] for name in peers)
    return "-".join(net if n == 1 else f"{net}x{n}" for net, n in nets.items())[:80]


def _require_known(arch: str, net: str, from_timm: bool) -> None:
    if timm.is_model(arch) if from_timm else net in SHORT_NAMES:
        return
    everything = timm.list_models() + timm.list_models(pretrained=True)
    names = [*SHORT_NAMES, *(f"timm:{name}" for name in everything)]
    wanted = f"timm:{net}" if from_timm else net
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    if timm.is_model(net):
        near.insert(0, f"timm:{net}")
    raise UsageError(
        f"--cohort: there is no net {wanted!r}; nearest: {', '.join(dict.fromkeys(near)) or 'none'}"
        f"; ours are {', '.join(SHORT_NAMES)}; any timm model as timm:<name>"
    )


def _arguments(text: str, arguments: str) -> tuple[dict[str, Any], str | None]:
    """Return a network's arguments, and the trained weights that it is to start from."""
    words = (part.strip() for part in arguments.split(","))
    pairs = [(f"{word}=True" if word == "pretrained" else word).split("=", 1) for word in words]
    pairs = [pair for pair in pairs if pair != [""]]
    if any(len(pair) != 2 for pair in pairs):
        raise UsageError(f"--cohort {text!r}: write arguments as [key=value,key=value]")
    found = {name.strip(): value.strip() for name, value in pairs}
    given = found.pop("pretrained", "False")
    start = {"true": pretrained.HUB, "false": None}.get(given.lower(), given)
    for name in found:
        if any(part in name for part in LEADS_ELSEWHERE):
            raise UsageError(
                f"--cohort {text!r}: {name} is not the network's; trained weights are pretrained, "
                "or pretrained=FOLDER_OR_FILE"
            )
    return {name: _literal(value) for name, value in found.items()}, start


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # a plain word, as in global_pool=max


def build(
    spec: PeerSpec, config: Config, classes: int, weights: Weights | None = None
) -> nn.Module:
    """Build the network of one peer on the CPU, in the run's precision.

    Args:
        spec: the peer.
        config: the run's.
        classes: of the images.
        weights: those that it starts from (default: untrained, drawn for the seed and its name).

    Raises:
        UsageError: timm does not accept the arguments, the weights are of another network, or the
            net cannot take the image size.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key("initial weights", config.seed, spec.name))
        try:
            if weights is not None:
                net = pretrained.build(spec.arch, spec.arguments, classes, weights)
            else:
                net = timm.create_model(spec.arch, num_classes=classes, **spec.arguments)
        except UsageError as error:
            raise UsageError(f"{spec.name}: {error}") from error
        except Exception as error:  # every model family raises its own kinds
            reason = " ".join(str(error).split())
            raise UsageError(f"{spec.name} ({spec.arch}) cannot be built: {reason}") from error
    reason = refusal(net, config.image_size, classes)
    if reason:
        raise UsageError(
            f"{spec.name} cannot take {config.image_size} x {config.image_size} images ({reason}); "
            f"try {_remedy(spec, config.image_size, classes)}"
        )
    smallest = config.batch_size // config.grad_accum
    if smallest == 1 and refusal(copy.deepcopy(net), config.image_size, classes, train=True):
        raise UsageError(
            f"{spec.name} cannot learn from 1 image at a time (its batch norm sees one value per "
            f"channel), as --batch-size {config.batch_size} --grad-accum {config.grad_accum} asks"
        )
    return net.double() if config.float64 else net


def refuse_twins(modules: Mapping[str, nn.Module]) -> None:
    """Refuse two networks with equal weights: they would take equal steps, at KL 0, for ever.

    Raises:
        UsageError: there are such; both are named.
    """
    for (one, first), (other, second) in itertools.combinations(modules.items(), 2):
        a, b = list(first.parameters()), list(second.parameters())
        # Different ones differ in the first tensors, so that few are compared.
        if len(a) == len(b) and all(torch.equal(v, w) for v, w in zip(a, b, strict=True)):
            raise UsageError(
                f"{one} and {other} start with the same weights: they would stay equal, and learn "
                "nothing from each other; drop one, take another network, or leave one untrained"
            )


def refusal(net: nn.Module, size: int, classes: int, train: bool = False) -> str:
    """Say why a net cannot take one image; empty where it can.

    Without ``train`` that leaves no trace in the net, which is in training mode afterwards.
    """
    net.train(train)
    try:
        with torch.no_grad():
            shape = tuple(net(torch.zeros(1, 3, size, size)).shape)
        return "" if shape == (1, classes) else f"it returns shape {shape} and not (1, {classes})"
    except Exception as error:  # every model family raises its own kinds
        return " ".join(str(error).split())
    finally:
        net.train()


def _remedy(spec: PeerSpec, size: int, classes: int) -> str:
    """Name arguments under which the net takes the image, tried out, and its own image size."""
    with torch.device("meta"):
        native = timm.create_model(spec.arch).default_cfg["input_size"][-1]
    patches = {"img_size": size, "patch_size": max(1, size // 8)}
    windows = {"img_size": size, "patch_size": max(1, size // 16), "window_size": 4}
    for arguments in (patches, windows, {"img_size": size}):
        try:
            net = timm.create_model(spec.arch, num_classes=classes, **spec.arguments | arguments)
        except Exception:  # every model family raises its own kinds
            continue
        if not refusal(net, size, classes):
            text = ",".join(f"{name}={value}" for name, value in arguments.items())
            return f"'timm:{spec.arch}[{text}]' or --image-size {native}"
    return f"--image-size {native}"


def optimizer(module: nn.Module, config: Config) -> torch.optim.SGD:
    """The paper's optimizer: SGD with Nesterov momentum; weight decay on all parameters.

    One fused kernel, which skips a step when it is told to (``Peer.update``).
    """
    sgd = torch.optim.SGD(
        module.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
        fused=True,
    )
    if config.momentum > 0:
        # Zero, the same start: the kernel would leave it undefined if the first step is skipped.
        for weight in module.parameters():
            sgd.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return sgd


def parameter_count(module: nn.Module) -> int:
    """Return how many numbers a network learns."""
    return sum(weight.numel() for weight in module.parameters())


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """The rate of optimizer step ``step`` (from 0): a function of it alone, nothing to save."""
    return config.lr * config.lr_gamma ** (step // steps_per_epoch // config.lr_step)
