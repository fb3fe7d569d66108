"""The same losses and steps, slow and obvious, in the paper's notation. For tests only.

Nothing is shared with the fast path: every peer's loss is written out, and every sum is a loop.
"""

import copy

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


def cross_entropy(p_k: Tensor, labels: Tensor, class_weights: list[float] | None = None) -> Tensor:
    """L_C of posteriors [B, C] and classes [B] (equation 2): the mean over labelled rows.

    Rows with label -1 have none; 0 where no row has one. ``labels`` [B, C] are ``soft_labels``,
    which have weights already.
    """
    total, labelled = torch.zeros((), dtype=p_k.dtype), 0
    if labels.dim() == 2:
        for row in range(p_k.shape[0]):
            for m in range(p_k.shape[1]):
                total = total - labels[row, m] * torch.log(p_k[row, m])
        return total / p_k.shape[0]
    for row in range(p_k.shape[0]):
        if labels[row] >= 0:
            weight = class_weights[int(labels[row])] if class_weights else 1.0
            total = total - weight * torch.log(p_k[row, labels[row]])
            labelled += 1
    return total / labelled if labelled else total


def soft_labels(
    labels: Tensor,
    classes: int,
    partners: Tensor,
    share: float,
    smoothing: float = 0.0,
    class_weights: list[float] | None = None,
) -> Tensor:
    """The indicators I(y_i, m) of equation 2, smoothed, weighted and mixed with the partners'."""
    indicators = torch.zeros(len(labels), classes, dtype=torch.float64)
    for row in range(len(labels)):
        for label, part in ((int(labels[row]), share), (int(partners[row]), 1 - share)):
            weight = class_weights[label] if class_weights else 1.0
            for m in range(classes):
                smooth = (1 - smoothing) * float(label == m) + smoothing / classes
                indicators[row, m] += part * weight * smooth
    return indicators


def loss(
    k: int,
    logits: list[Tensor],
    labels: Tensor,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    kl_reduction: str = "mean",
    target: str = "peers",
    links: list[list[float]] | None = None,
    frozen: list[Tensor] | None = None,
    class_weights: list[float] | None = None,
) -> Tensor:
    """L_k of logits [B, C] of each peer (equations 5 and 8); the other peers are constants.

    ``links[k][l]`` weighs what k learns from l; ``frozen`` are logits of further teachers, whose
    weights stand at the end of each row.
    """
    total = cross_entropy(F.softmax(logits[k], dim=1), labels, class_weights)
    everyone = logits + (frozen or [])
    teachers = []
    for index, z in enumerate(everyone):
        weight = links[k][index] if links else 1.0
        if index != k and weight > 0:
            teachers.append((weight, z.detach()))
    if kl_weight == 0 or not teachers:
        return total
    p_k = F.softmax(logits[k] / temperature, dim=1)
    weights = sum(weight for weight, _ in teachers)
    if target == "peers":
        divergence = torch.zeros((), dtype=p_k.dtype)
        for weight, z in teachers:
            divergence = divergence + weight * kl(F.softmax(z / temperature, dim=1), p_k)
        if kl_reduction == "mean":
            divergence = divergence / weights
    elif target == "mean-prob":
        mean = torch.zeros_like(p_k)
        for weight, z in teachers:
            mean = mean + weight / weights * F.softmax(z / temperature, dim=1)
        divergence = kl(mean.detach(), p_k)
    else:
        mean = torch.zeros_like(p_k)
        for weight, z in teachers:
            mean = mean + weight / weights * z
        divergence = kl(F.softmax(mean.detach() / temperature, dim=1), p_k)
    return total + kl_weight * temperature**2 * divergence


Batch = tuple[Tensor, Tensor]


def step(
    nets: list[nn.Module],
    optimizers: list[torch.optim.Optimizer],
    micro_batches: list[Batch],
    clip_norm: float | None = None,
    frozen: list[nn.Module] | None = None,
    averages: list[nn.Module] | None = None,
    **loss_options: object,
) -> list[float]:
    """One optimizer step of the simultaneous schedule; returns every peer's loss.

    Each peer's loss is differentiated with respect to that peer's parameters only. ``averages``
    teach in the place of ``nets``, if they are given.
    """
    rows = sum(len(labels) for _, labels in micro_batches)
    losses = [0.0 for _ in nets]
    gradients = [[torch.zeros_like(w) for w in net.parameters()] for net in nets]
    for images, labels in micro_batches:
        share = len(labels) / rows
        logits = [net(images) for net in nets]
        taught = [net(images) for net in averages] if averages else logits
        loss_options["frozen"] = [net(images) for net in frozen or []]
        for k, net in enumerate(nets):
            seen = list(taught)
            seen[k] = logits[k]
            loss_k = share * loss(k, seen, labels, **loss_options)  # type: ignore[arg-type]
            parts = torch.autograd.grad(loss_k, list(net.parameters()), retain_graph=True)
            gradients[k] = [sum_ + part for sum_, part in zip(gradients[k], parts, strict=True)]
            losses[k] += loss_k.item()
    for net, optimizer, gradient in zip(nets, optimizers, gradients, strict=True):
        _update(net, optimizer, gradient, clip_norm)
    return losses


def sequential_step(
    nets: list[nn.Module],
    optimizers: list[torch.optim.Optimizer],
    batch: Batch,
    clip_norm: float | None = None,
    frozen: list[nn.Module] | None = None,
    **loss_options: object,
) -> list[float]:
    """Algorithm 1: every peer in turn is updated, and predicts the batch again for the others.

    The second prediction is a copy's, so that running statistics see the batch once.
    """
    images, labels = batch
    logits = [net(images) for net in nets]
    loss_options["frozen"] = [net(images) for net in frozen or []]
    losses = []
    for k, net in enumerate(nets):
        loss_k = loss(k, logits, labels, **loss_options)  # type: ignore[arg-type]
        gradient = torch.autograd.grad(loss_k, list(net.parameters()))
        _update(net, optimizers[k], list(gradient), clip_norm)
        logits[k] = copy.deepcopy(net)(images)
        losses.append(loss_k.item())
    return losses


def official_step(
    nets: list[nn.Module],
    optimizers: list[torch.optim.Optimizer],
    batches: list[Batch],
    clip_norm: float | None = None,
    **loss_options: object,
) -> list[float]:
    """The authors' code: every peer in turn is updated on a batch of its own, KLs summed."""
    losses = []
    for k, (images, labels) in enumerate(batches):
        logits = [net(images) for net in nets]
        loss_k = loss(k, logits, labels, kl_reduction="sum", **loss_options)  # type: ignore[arg-type]
        gradient = torch.autograd.grad(loss_k, list(nets[k].parameters()))
        _update(nets[k], optimizers[k], list(gradient), clip_norm)
        losses.append(loss_k.item())
    return losses


def _update(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradient: list[Tensor],
    clip_norm: float | None,
) -> None:
    for weight, part in zip(net.parameters(), gradient, strict=True):
        weight.grad = part
    if clip_norm is not None:
        norm = sum((part**2).sum().item() for part in gradient) ** 0.5
        for part in gradient:
            part *= min(1.0, clip_norm / (norm + 1e-6))
    optimizer.step()
