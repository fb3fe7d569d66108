"""The optimizer of a peer: one of timm's, or a refusal with the reason.

Every name of ``timm.optim.list_optimizers()`` is accepted or refused here. An accepted one skips a
step without a trace and is resumed bit for bit, with its state in JSON and safetensors.
"""

import difflib
import fnmatch
import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import timm.optim
import torch
from torch import Tensor, nn

from dml_accel.core.assignments import assignment, literal, peer_settings
from dml_accel.core.config import OF_PEER, OptimConfig
from dml_accel.core.errors import UsageError, one_line

# Why names that match a pattern are refused.
REFUSED = {
    "adahessian": "it needs second derivatives, and a step computes first ones only",
    "bnb*": "it needs bitsandbytes and CUDA; the same name without bnb needs neither",
    "fused*": "it needs apex; adam, adamw and sgd are fused by torch itself",
    "kron*": "it draws random numbers from a generator that it carries, and randomness here is "
    "keyed by the step",
    "lookahead_*": "its slow weights lie outside of what is saved; --ema averages weights",
}
# Those whose fused kernels skip a step when they are told to, on every device, without a trace.
_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
# Arguments that are flags, choose an implementation, or would mean something else here: dampening
# starts with the second step in torch, but with the first one after momentum of zero.
_NOT_OFFERED = {"params", "lr", "weight_decay", "foreach", "fused", "capturable", "differentiable"}
_NOT_OFFERED |= {"maximize", "dampening"}
_WORDS = {"true": True, "false": False, "none": None}


def make_optimizer(module: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer of one peer.

    Args:
        module: its network, on its device.
        optim: its settings (``OptimConfig.of_peer``), which ``check_optimizers`` has accepted.

    Returns:
        With ``sgd``, ``momentum``, ``adam`` and ``adamw`` a fused kernel, which skips a step when
        it is told to (``Peer.update``); it has all of its state from the start.
    """
    name, arguments = optim.optimizer, _arguments(optim)
    info = timm.optim.get_optimizer_info(name)
    if optim.momentum == 0 and (info.defaults or {}).get("nesterov"):
        arguments.setdefault("nesterov", False)
    if has_fused(name):
        arguments["fused"] = True
    optimizer: torch.optim.Optimizer = timm.optim.create_optimizer_v2(
        module if optim.wd_exclude_norm_bias else list(module.parameters()),
        name,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        momentum=optim.momentum,
        filter_bias_and_bn=optim.wd_exclude_norm_bias,
        **arguments,
    )
    if is_fused(optimizer):
        start_state(optimizer)
    return optimizer


def has_fused(name: str) -> bool:
    """Whether the optimizer of that name is a fused kernel."""
    return timm.optim.get_optimizer_info(name).opt_class in _FUSED


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer skips a step by itself when the device says so."""
    return bool(optimizer.defaults.get("fused"))


def skips_when_told(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer is one that skips a step without a trace."""
    return type(optimizer) in _FUSED


@functools.cache
def state_per_parameter(optim: OptimConfig) -> float:
    """Return how many numbers an optimizer keeps for a parameter of a layer of 32 x 32 weights.

    Args:
        optim: settings of a run or of one peer, which ``check_optimizers`` has accepted.

    Returns:
        0 for SGD without momentum, 1 with it, 2 for AdamW, a fraction where moments are factored.
    """
    layer = nn.utils.skip_init(nn.Linear, 32, 32)  # without a draw from torch's generator
    optimizer = make_optimizer(layer, optim)
    _step(layer, optimizer)
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    # Single numbers are counts of steps, however large the layer is.
    kept = sum(t.numel() for t in tensors if isinstance(t, Tensor) and t.dim() > 0)
    return kept / sum(weight.numel() for weight in layer.parameters())


def _step(layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for weight in layer.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()


def start_state(optimizer: torch.optim.Optimizer) -> None:
    """Give a fused optimizer the state that its first step would start from."""
    # It is zero in any case; the kernel of SGD would leave it undefined if the first step is
    # skipped.
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if isinstance(optimizer, torch.optim.SGD):
                names = ["momentum_buffer"] * (group["momentum"] > 0)
            else:
                names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
                # torch counts in single precision whatever the weights are.
                count = torch.zeros((), dtype=torch.float32, device=weight.device)
                optimizer.state[weight]["step"] = count
            for name in names:
                optimizer.state[weight][name] = torch.zeros_like(weight)


# ---------------------------------------------------------------- validation


def check_optimizers(optim: OptimConfig, names: Sequence[str]) -> None:
    """Refuse optimizers, arguments and peers that do not exist or do not fit.

    Args:
        optim: of the run.
        names: of its peers.

    Raises:
        UsageError: the text names the flag, and what is allowed.
    """
    _check(optim, f"--optimizer {optim.optimizer}")
    for text in optim.peer_opt:
        peer, _ = peer_settings(text)
        if peer not in names:
            raise UsageError(
                f"--peer-opt {peer}: there is no such peer; there are {_nearest(peer, names)}"
            )
    for name in names:
        own = optim.of_peer(name)
        if own is not optim:
            _check(own, f"--peer-opt {name}: optimizer {own.optimizer}")


def _check(optim: OptimConfig, said: str) -> None:
    name, known = optim.optimizer, timm.optim.list_optimizers()
    reason = refusal(name)
    if reason is not None:
        raise UsageError(f"{said} is not supported: {reason}")
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=5)
        hint = f"near are {', '.join(near)}; " if near else ""
        raise UsageError(f"{said}: there is no such optimizer; {hint}timm has {len(known)}")
    offered = arguments_of(name)
    for key, value in _arguments(optim).items():
        if key in OF_PEER:
            raise UsageError(f"--opt-args {key}={value}: use --{key.replace('_', '-')}")
        if key not in offered:
            known = sorted(offered)
            if said.startswith("--peer-opt"):
                known = [*sorted(OF_PEER), *known]
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"{said} does not take {key}; {hint}it takes {', '.join(known)}")
        _check_value(f"{said}: {key} is {value};", value, offered[key])
    # An optimizer knows best which values it can work with.
    net = nn.utils.skip_init(nn.Linear, 2, 2)  # without a draw from torch's generator
    try:
        optimizer = make_optimizer(net, optim)
        for _ in range(2):
            _step(net, optimizer)
    except Exception as error:  # each optimizer raises its own kinds
        raise UsageError(f"{said} cannot work with its arguments: {one_line(error)}") from error


def _check_value(said: str, value: Any, default: Any) -> None:
    if isinstance(default, bool) and not isinstance(value, bool):
        raise UsageError(f"{said} it must be True or False")
    several = isinstance(value, tuple | list)
    if any(
        isinstance(one, float) and not math.isfinite(one) for one in (value if several else [value])
    ):
        raise UsageError(f"{said} it must be finite")
    # Most optimizers take the first ones in silence.
    if isinstance(default, tuple) and not (several and len(value) == len(default)):
        example = ",".join(map(str, default))
        raise UsageError(f"{said} it must be {len(default)} numbers, as {example}")


def refusal(name: str) -> str | None:
    """Return why an optimizer is refused; None if it is not."""
    reasons = (why for pattern, why in REFUSED.items() if fnmatch.fnmatchcase(name, pattern))
    return next(reasons, None)


def arguments_of(name: str) -> Mapping[str, Any]:
    """Return what ``--opt-args`` may set for an optimizer: {argument: default}."""
    info = timm.optim.get_optimizer_info(name)
    # timm drops these in silence where it does not know them.
    dropped = {
        "momentum": info.has_momentum,  # then it is --momentum
        "eps": not info.has_eps,
        "betas": not info.has_betas,
    }
    hidden = _NOT_OFFERED | {name for name, hides in dropped.items() if hides}
    takes = inspect.signature(info.opt_class).parameters
    return {name: one.default for name, one in takes.items() if name not in hidden}


def _arguments(optim: OptimConfig) -> dict[str, Any]:
    """Return ``--opt-args`` as keywords: numbers, tuples, True, False, None and words."""
    pairs = (assignment("--opt-args", text) for text in optim.opt_args)
    return {key: _WORDS.get(value.lower(), literal(value)) for key, value in pairs}


def _nearest(name: str, names: Sequence[str]) -> str:
    """Return names in words, those most like ``name`` first."""

    def likeness(one: str) -> float:
        return difflib.SequenceMatcher(None, name, one).ratio()

    return ", ".join(sorted(names, key=likeness, reverse=True))
