"""The same losses and steps, slow and obvious, in the notation of the papers. For tests only.

Nothing is shared with the fast path: every peer's loss is written out row by row, and every sum is
a loop. What a peer teaches is detached; a teacher whose logits [C] of a row are not finite teaches
nobody on that row.
"""

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------- divergences of one row
#
# Each has the logits [C] of a teacher, z_l, and of the learner, z_k, both standardized and over T
# as the method has it, and the label t, which some do not look at.


def kl_of(p: Sequence[Tensor] | Tensor, q: Sequence[Tensor] | Tensor) -> Tensor:
    """KL(p || q) of two posteriors [C], in nats."""
    total = torch.zeros((), dtype=q[0].dtype)
    for m in range(len(p)):
        if p[m] > 0:
            total = total + p[m] * (torch.log(p[m]) - torch.log(q[m]))
    return total


def kl(z_l: Tensor, z_k: Tensor, t: int) -> Tensor:
    """KL(p_l || p_k) (CVPR 2018, equation 3)."""
    return kl_of(F.softmax(z_l, 0), F.softmax(z_k, 0))


def reverse_kl(z_l: Tensor, z_k: Tensor, t: int) -> Tensor:
    """KL(p_k || p_l)."""
    return kl_of(F.softmax(z_k, 0), F.softmax(z_l, 0))


def jeffreys(z_l: Tensor, z_k: Tensor, t: int) -> Tensor:
    """Half the sum of both (PaddleClas, DMLLoss)."""
    return (kl(z_l, z_k, t) + reverse_kl(z_l, z_k, t)) / 2


def jsd(z_l: Tensor, z_k: Tensor, t: int, beta: float = 0.5) -> Tensor:
    """The generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649, equation 1)."""
    p, q = F.softmax(z_l, 0), F.softmax(z_k, 0)
    m = [beta * p[i] + (1 - beta) * q[i] for i in range(len(p))]
    return beta * kl_of(p, m) + (1 - beta) * kl_of(q, m)


def renyi(z_l: Tensor, z_k: Tensor, t: int, alpha: float = 2.0) -> Tensor:
    """The Renyi divergence of order alpha (arXiv 2209.05732)."""
    p, q = F.softmax(z_l, 0), F.softmax(z_k, 0)
    total = torch.zeros((), dtype=q.dtype)
    for m in range(len(p)):
        total = total + p[m] ** alpha * q[m] ** (1 - alpha)
    return torch.log(total) / (alpha - 1)


def dkd(z_l: Tensor, z_k: Tensor, t: int, alpha: float = 1.0, beta: float = 8.0) -> Tensor:
    """Decoupled distillation (arXiv 2203.08679): alpha TCKD + beta NCKD, before T^2."""
    target = kl_of(label_or_not(z_l, t), label_or_not(z_k, t))
    return alpha * target + beta * kl_of(others(z_l, t), others(z_k, t))


def nkd(z_l: Tensor, z_k: Tensor, t: int, gamma: float = 1.5, temperature: float = 1.0) -> Tensor:
    """Normalised distillation (arXiv 2303.13005): no divergence, since it is not 0 at p = q."""
    total = -F.softmax(z_l, 0)[t] * torch.log(F.softmax(z_k, 0)[t])
    p, q = others(z_l / temperature, t), others(z_k / temperature, t)
    for i in range(len(p)):
        total = total - gamma * temperature**2 * p[i] * torch.log(q[i])
    return total


def ttm(z_l: Tensor, z_k: Tensor, t: int, gamma: float = 0.1) -> Tensor:
    """Transformed teacher matching (arXiv 2402.11148): p_l to the power gamma, normalised."""
    powers = [p**gamma for p in F.softmax(z_l, 0)]
    return kl_of([power / sum(powers) for power in powers], F.softmax(z_k, 0))


def wttm(z_l: Tensor, z_k: Tensor, t: int, gamma: float = 0.1) -> Tensor:
    """The same times the sum of the powers."""
    return sum(p**gamma for p in F.softmax(z_l, 0)) * ttm(z_l, z_k, t, gamma)


def label_or_not(z: Tensor, t: int) -> list[Tensor]:
    """b = [p_t, 1 - p_t] of logits [C]; the second one as a sum, which does not cancel."""
    p = F.softmax(z, 0)
    return [p[t], sum((p[m] for m in range(len(p)) if m != t), torch.zeros((), dtype=p.dtype))]


def others(z: Tensor, t: int) -> Tensor:
    """The softmax [C - 1] of logits [C] without class t."""
    return F.softmax(torch.stack([z[m] for m in range(len(z)) if m != t]), 0)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "kl": kl,
    "reverse-kl": reverse_kl,
    "jeffreys": jeffreys,
    "jsd": jsd,
    "renyi": renyi,
    "dkd": dkd,
    "nkd": nkd,
    "ttm": ttm,
    "wttm": wttm,
}


def standardized(z: Tensor) -> Tensor:
    """Logits [C] with a mean of 0 and an unbiased deviation of 1 (arXiv 2403.01427)."""
    mean = sum(z) / len(z)
    variance = sum((one - mean) ** 2 for one in z) / (len(z) - 1)
    return (z - mean) / (torch.sqrt(variance) + 1e-7)


# ---------------------------------------------------------------- targets of one row


def mean(logits: list[Tensor], weights: list[float]) -> Tensor:
    """The weighted mean of logits or posteriors [C]."""
    total = torch.zeros_like(logits[0])
    for weight, z in zip(weights, logits, strict=True):
        total = total + weight / sum(weights) * z
    return total


def best(logits: list[Tensor], t: int) -> int:
    """Which of these logits [C] has the smallest cross-entropy with the label; the first of two."""
    found = [-float(F.log_softmax(z, 0)[t]) for z in logits]
    return found.index(min(found))


def min_logit(logits: list[Tensor], t: int) -> Tensor:
    """For each class, the smallest of these logits, counted from the label's (CVPR 2020)."""
    return torch.stack([min(z[m] - z[t] for z in logits) for m in range(len(logits[0]))])


# ---------------------------------------------------------------- the loss of a peer


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
    ce_weight: float = 1.0,
    kl_on_labelled: bool = False,
    averages: list[Tensor] | None = None,
    frozen: list[Tensor] | None = None,
    links: list[list[float]] | None = None,
    class_weights: list[float] | None = None,
    **method: object,
) -> Tensor:
    """L_k of logits [B, C] of each peer (equations 5 and 8).

    ``links[k][l]`` weighs what k learns from l; ``frozen`` are logits of further teachers, whose
    weights stand at the end of each row. ``averages`` are logits that teach in the place of
    ``logits``. ``method``: see ``lesson``.
    """
    total = ce_weight * cross_entropy(F.softmax(logits[k], dim=1), labels, class_weights)
    everyone = (averages or logits) + (frozen or [])
    weights = links[k] if links else [1.0] * len(everyone)
    if kl_weight == 0:
        return total
    rows = [row for row in range(len(labels)) if not kl_on_labelled or labels[row] >= 0]
    lessons = torch.zeros((), dtype=logits[k].dtype)
    for row in rows:
        taught = [z[row].detach() for z in everyone]
        label = int(labels[row]) if labels.dim() == 1 else int(labels[row].argmax())
        lessons = lessons + lesson(k, logits[k][row], taught, weights, label, **method)  # type: ignore[arg-type]
    return total + kl_weight * lessons / max(1, len(rows))


def lesson(
    k: int,
    z_k: Tensor,
    everyone: list[Tensor],
    weights: list[float],
    t: int,
    temperature: float = 1.0,
    kl_reduction: str = "mean",
    target: str = "peers",
    divergence: str = "kl",
    divergence_args: dict[str, float] | None = None,
    standardize: bool = False,
    gate: str = "none",
) -> Tensor:
    """What peer k, with logits z_k [C], learns from everyone on a row with the label t, times T^2.

    ``everyone[k]`` is what k itself teaches, which only those targets have that are made of all.
    """

    def from_(z_l: Tensor) -> Tensor:
        return DIVERGENCES[divergence](z_l, ready(z_k), t, **divergence_args or {})

    def ready(z: Tensor) -> Tensor:
        return (standardized(z) if standardize else z) / temperature

    finite = [place for place, z in enumerate(everyone) if z.isfinite().all()]
    teachers = [place for place in finite if place != k and weights[place] > 0]
    scores = [ready(everyone[place]) for place in finite]
    theirs = [ready(everyone[place]) for place in teachers]
    shares = [weights[place] for place in teachers]
    nothing = torch.zeros((), dtype=z_k.dtype)
    if target in ("mean-logit-all", "best", "min-logit"):
        if not finite:
            return nothing
        if target == "mean-logit-all":
            z_l = mean(scores, [1.0] * len(scores))
        elif target == "best":
            z_l = scores[best([everyone[place] for place in finite], t)]
        else:
            z_l = min_logit(scores, t)
        return temperature**2 * from_(z_l)
    if not teachers:
        return nothing
    if target == "mean-prob":
        p = mean([F.softmax(z, 0) for z in theirs], shares)
        return temperature**2 * kl_of(p, F.softmax(ready(z_k), 0))
    if target == "mean-logit":
        return temperature**2 * from_(mean(theirs, shares))
    total = nothing
    for place, z_l, weight in zip(teachers, theirs, shares, strict=True):
        if gate == "none" or int(everyone[place].argmax()) == t:
            total = total + weight * from_(z_l)
    return temperature**2 * (total / sum(shares) if kl_reduction == "mean" else total)


# ---------------------------------------------------------------- steps

Batch = tuple[Tensor, Tensor]


def step(
    nets: list[nn.Module],
    optimizers: list[torch.optim.Optimizer],
    micro_batches: list[Batch],
    clip_norm: float | None = None,
    frozen: list[nn.Module] | None = None,
    averages: list[nn.Module] | None = None,
    pauses: bool = False,
    **loss_options: object,
) -> list[float]:
    """One optimizer step of the simultaneous schedule; returns every peer's loss.

    Each peer's loss is differentiated with respect to that peer's parameters only. ``averages``
    teach in the place of ``nets``, if they are given. With ``pauses`` it is a step of the schedule
    ``switch``: one of two peers may be left as it is.
    """
    rows = sum(len(labels) for _, labels in micro_batches)
    losses = [0.0 for _ in nets]
    gradients = [[torch.zeros_like(w) for w in net.parameters()] for net in nets]
    before = [copy.deepcopy(net.state_dict()) for net in nets]
    seen = []
    for images, labels in micro_batches:
        share = len(labels) / rows
        logits = [net(images) for net in nets]
        seen.append(logits)
        loss_options["averages"] = [net(images) for net in averages or []]
        loss_options["frozen"] = [net(images) for net in frozen or []]
        for k, net in enumerate(nets):
            loss_k = share * loss(k, logits, labels, **loss_options)  # type: ignore[arg-type]
            parts = torch.autograd.grad(loss_k, list(net.parameters()), retain_graph=True)
            gradients[k] = [sum_ + part for sum_, part in zip(gradients[k], parts, strict=True)]
            losses[k] += loss_k.item()
    paused = None
    if pauses:
        labels = torch.cat([labels for _, labels in micro_batches])
        z_0, z_1 = (torch.cat(z) for z in zip(*seen, strict=True))
        paused = pausing(z_0, z_1, labels)
    for k, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
        if k == paused:
            net.load_state_dict(before[k])  # the running statistics
        else:
            _update(net, optimizer, gradients[k], clip_norm)
    return losses


def pausing(z_0: Tensor, z_1: Tensor, labels: Tensor) -> int | None:
    """Which of two peers with logits [B, C] pauses, if one does (SwitOKD, ECCV 2022).

    The better one, t, does while the gap between both is above that of the other one, s, to the
    labels, less e times that of t. All gaps are means over the rows of L1 norms; rows with the
    label -1 have none.
    """
    gap, distances, rows = 0.0, [0.0, 0.0], 0
    for row in range(len(labels)):
        if labels[row] < 0:
            continue
        rows += 1
        p = [F.softmax(z[row].detach(), 0) for z in (z_0, z_1)]
        for m in range(len(p[0])):
            gap += abs(float(p[0][m] - p[1][m]))
            for k in (0, 1):
                distances[k] += abs(float(p[k][m]) - float(labels[row] == m))
    if not rows:
        return None
    gap, distances = gap / rows, [distance / rows for distance in distances]
    t = 0 if distances[0] <= distances[1] else 1
    s = 1 - t
    e = math.exp(-distances[t] / (distances[s] + distances[t]))
    return t if gap > distances[s] - e * distances[t] else None


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
