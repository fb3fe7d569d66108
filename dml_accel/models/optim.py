"""The optimizer of a peer, and the learning rate of each step."""

import torch
from torch import nn

from dml_accel.core.config import OptimConfig


def make_optimizer(module: nn.Module, optim: OptimConfig) -> torch.optim.SGD:
    """Return the paper's optimizer: SGD with Nesterov momentum, weight decay on all parameters.

    It is a single fused kernel, which skips a step when it is told to (``Peer.update``).
    """
    sgd = torch.optim.SGD(
        module.parameters(),
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.momentum > 0,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    if optim.momentum > 0:
        # Zero is the start in any case; the kernel would leave it undefined if the first step is
        # skipped.
        for weight in module.parameters():
            sgd.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return sgd


def learning_rate(optim: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """Return the rate of optimizer step ``step`` (from 0), a function of the step alone."""
    return optim.lr * optim.lr_gamma ** (step // steps_per_epoch // optim.lr_step)
