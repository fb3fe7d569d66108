"""The cohort: who learns together, each peer in one record of its own.

A peer's initial weights and dropout are keyed by the seed and its name, never by its place in
the cohort: permuting the cohort permutes the results, and two peers never start equal.
"""

import ast
import contextlib
import difflib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dml_accel.core.config import Config, UsageError
from dml_accel.models import networks, pretrained
from dml_accel.models.pretrained import LEADS_ELSEWHERE

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


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """The rate of optimizer step ``step`` (from 0): a function of it alone, nothing to save."""
    return config.lr * config.lr_gamma ** (step // steps_per_epoch // config.lr_step)
