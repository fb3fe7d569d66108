"""Optimizers that a caller of ``learn`` makes: checked, and made for each network."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from dml_accel.core.errors import UsageError, one_line
from dml_accel.models.optim import is_fused, skips_when_told, start_state

OptimizerOf = Callable[[nn.Module], torch.optim.Optimizer]


def make_own_optimizer(make: OptimizerOf, module: nn.Module) -> torch.optim.Optimizer:
    """Return the caller's optimizer of a network that is on its device.

    Args:
        make: what the caller has given, which ``check_own_optimizer`` has accepted.
        module: the network.
    """
    optimizer = make(module)
    if is_fused(optimizer):
        start_state(optimizer)
    return optimizer


def rates_of(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    """Return the learning rate of each group."""
    return tuple(float(group["lr"]) for group in optimizer.param_groups)


def check_own_optimizer(make: OptimizerOf, name: str, module: nn.Module) -> str:
    """Refuse an optimizer that cannot train a network; return what a run records of it.

    Args:
        make: what the caller has given.
        name: of the network, for messages.
        module: the network, which is left as it is.

    Raises:
        UsageError: the text says what is wrong with it.
    """
    what = f"optimizer({name})"
    try:
        optimizer = make(module)
    except Exception as error:  # whatever the caller's function raises
        raise UsageError(f"{what} fails: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(
            f"{what} is a {type(optimizer).__name__}; it must return a torch.optim.Optimizer of "
            "the network's parameters"
        )
    own = {id(weight): one for one, weight in module.named_parameters()}
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    if held - own.keys():
        raise UsageError(
            f"{what} has {len(held - own.keys())} parameters that are not of {name}: give it those "
            "of the network that it is called with"
        )
    left = [one for one, weight in module.named_parameters() if id(weight) not in held]
    trained = {one for one, weight in module.named_parameters() if weight.requires_grad}
    if missing := [one for one in left if one in trained]:
        raise UsageError(
            f"{what} lacks {missing[0]}{f' and {len(missing) - 1} more' * (len(missing) > 1)}: add "
            "them, or freeze them with requires_grad_(False)"
        )
    if is_fused(optimizer) and not skips_when_told(optimizer):
        raise UsageError(
            f"{what}: a fused {type(optimizer).__name__} is not known to skip a step whose loss is "
            "not finite: leave fused out"
        )
    _try_step(what, optimizer)
    groups = [len(group["params"]) for group in optimizer.param_groups]
    return f"{type(optimizer).__name__} of {' and '.join(map(str, groups))} tensors"


def _try_step(what: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose ``step`` wants more than gradients; a copy takes one."""
    try:
        tried = copy.deepcopy(optimizer)
        for group in tried.param_groups:
            for weight in group["params"]:
                weight.grad = torch.zeros_like(weight)
        tried.step()
    except Exception as error:  # each optimizer raises its own kinds
        if "closure" in str(error):
            raise UsageError(
                f"{what} is a {type(optimizer).__name__}, whose step needs a closure that computes "
                "the loss again: use one that needs gradients alone"
            ) from error
        raise UsageError(f"{what} cannot take a step: {one_line(error)}") from error
