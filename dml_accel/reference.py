"""The same losses and the same step, slow and obvious, in the paper's notation. For tests only.

Nothing here is shared with the fast path: every peer's loss is written out, every sum is a loop.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def kl(p_l: Tensor, p_k: Tensor) -> Tensor:
    """D_KL(p_l || p_k) of posteriors [B, C], averaged over the batch (paper, equation 3)."""
    total = torch.zeros((), dtype=p_k.dtype)
    for row in range(p_k.shape[0]):
        for m in range(p_k.shape[1]):
            if p_l[row, m] > 0:
                total = total + p_l[row, m] * torch.log(p_l[row, m] / p_k[row, m])
    return total / p_k.shape[0]


def cross_entropy(p_k: Tensor, labels: Tensor) -> Tensor:
    """L_C of posteriors [B, C] and classes [B], averaged over the batch (equation 2)."""
    total = torch.zeros((), dtype=p_k.dtype)
    for row in range(p_k.shape[0]):
        total = total - torch.log(p_k[row, labels[row]])
    return total / p_k.shape[0]


def loss(
    k: int,
    logits: list[Tensor],
    labels: Tensor,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    kl_reduction: str = "mean",
) -> Tensor:
    """L_k of logits [B, C] of each peer (equations 5 and 8); the other peers are constants."""
    total = cross_entropy(F.softmax(logits[k], dim=1), labels)
    others = [index for index in range(len(logits)) if index != k]
    if kl_weight == 0 or not others:
        return total
    p_k = F.softmax(logits[k] / temperature, dim=1)
    divergence = torch.zeros((), dtype=p_k.dtype)
    for index in others:
        p_l = F.softmax(logits[index].detach() / temperature, dim=1)
        divergence = divergence + kl(p_l, p_k)
    if kl_reduction == "mean":
        divergence = divergence / len(others)
    return total + kl_weight * temperature**2 * divergence


def step(
    nets: list[nn.Module],
    optimizers: list[torch.optim.Optimizer],
    micro_batches: list[tuple[Tensor, Tensor]],
    clip_norm: float | None = None,
    **loss_options: float | str,
) -> list[float]:
    """One optimizer step of the simultaneous schedule; returns every peer's loss.

    Each peer's loss is differentiated with respect to that peer's parameters only.
    """
    rows = sum(len(labels) for _, labels in micro_batches)
    losses = [0.0 for _ in nets]
    gradients = [[torch.zeros_like(w) for w in net.parameters()] for net in nets]
    for images, labels in micro_batches:
        share = len(labels) / rows
        logits = [net(images) for net in nets]
        for k, net in enumerate(nets):
            loss_k = share * loss(k, logits, labels, **loss_options)  # type: ignore[arg-type]
            parts = torch.autograd.grad(loss_k, list(net.parameters()), retain_graph=True)
            gradients[k] = [sum_ + part for sum_, part in zip(gradients[k], parts, strict=True)]
            losses[k] += loss_k.item()
    for net, optimizer, gradient in zip(nets, optimizers, gradients, strict=True):
        for weight, part in zip(net.parameters(), gradient, strict=True):
            weight.grad = part
        if clip_norm is not None:
            norm = sum((part**2).sum().item() for part in gradient) ** 0.5
            for part in gradient:
                part *= min(1.0, clip_norm / (norm + 1e-6))
        optimizer.step()
    return losses
