"""The losses of Deep Mutual Learning (Zhang et al., CVPR 2018, section 2): pure functions.

    L_k = CE(z_k, y) + w T^2 mean_{l != k} KL(p_l || p_k),    p_k = softmax(z_k / T)

The peers' posteriors p_l are constants: no gradient of L_k reaches peer l. Cross-entropy is linear
in its target posterior, so

    mean_l KL(p_l || p_k) = CE(mean_l p_l, p_k) - mean_l H(p_l)

and one sum over all peers serves every peer, which subtracts its own term: O(K) work, not O(K^2).
A peer whose logits for an image are not finite teaches nobody on that image.

Shape letters: K peers, B rows of the batch, C classes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dml_accel.data.mixing import Mixed


class Losses(NamedTuple):
    """The named parts of every peer's loss, one value per row, all [K, B], in nats."""

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor


class Targets(NamedTuple):
    """What every peer learns from its teachers, row by row: constants.

    Attributes:
        posterior: mean posterior of the peer's teachers, [K, B, C]; for ``mean-logit`` the
            posterior of their mean logits.
        negative_entropy: mean of their negative entropies in nats, [K, B]; for a single target
            (``mean-prob``, ``mean-logit``), that of the target.
        teachers: number of teachers, or sum of the weights of their links, [K, B].
    """

    posterior: Tensor
    negative_entropy: Tensor
    teachers: Tensor


def mutual_loss(
    logits_KBC: Tensor,
    labels_B: Tensor,
    *,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    kl_reduction: str = "mean",
    target: str = "peers",
    mixed: Mixed | None = None,
    label_smoothing: float = 0.0,
    class_weights_C: Tensor | None = None,
) -> Losses:
    """Return the loss of K peers that all learn from each other, on every row.

    ``mutual_loss(torch.stack(logits), labels).total.mean(1).sum().backward()`` gives every network
    the gradient of its own loss and of no other.

    Args:
        logits_KBC: logits of K peers for the same B images.
        labels_B: classes, int64.
        kl_weight: w; at 0 the KL term is not computed.
        temperature: T.
        kl_reduction: ``mean`` or ``sum`` over the K - 1 other peers.
        target: see ``targets``.
        mixed, label_smoothing, class_weights_C: see ``mutual_losses``.
    """
    learned = None
    if kl_weight and len(logits_KBC) > 1:
        # Detached: what a peer teaches is a constant, or its loss would pull on its teachers too.
        own = contributions(logits_KBC.detach(), temperature, target)
        learned = targets(own.sum(0) - own, target)
    return mutual_losses(
        logits_KBC,
        labels_B,
        learned,
        kl_weight=kl_weight,
        temperature=temperature,
        sums_kl=kl_reduction == "sum",
        mixed=mixed,
        label_smoothing=label_smoothing,
        class_weights_C=class_weights_C,
    )


def mutual_losses(
    logits_KBC: Tensor,
    labels_B: Tensor,
    targets: Targets | None,
    *,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    sums_kl: bool = False,
    label_weight: Tensor | None = None,
    kl_on_labelled: bool = False,
    mixed: Mixed | None = None,
    label_smoothing: float = 0.0,
    class_weights_C: Tensor | None = None,
) -> Losses:
    """Return the loss of K peers on every row.

    Args:
        logits_KBC: logits of K peers for the same B images; converted to at least single precision.
        labels_B: classes, int64; -1 marks a label that must not be used.
        targets: of these peers, at ``temperature``; None without a KL term, which is then not
            computed at all, because 0 times a peer's NaN is NaN.
        kl_weight: w.
        temperature: T of the KL term.
        sums_kl: sum the KL over the teachers instead of averaging it.
        label_weight: weight of a labelled row, with which the mean over the whole batch becomes the
            mean over its labelled rows (CVPR 2018, section 3.4). None if all rows are labelled.
        kl_on_labelled: whether rows without a label have no KL term either.
        mixed: what the images were mixed with: the cross-entropy is the sum of those with both
            labels, each times its share. All rows must be labelled.
        label_smoothing: share of each label that is spread evenly over all classes, as in
            ``torch.nn.functional.cross_entropy``.
        class_weights_C: factor of the cross-entropy with a label of each class, smoothed or not; of
            a mixed row, of each of its two. The KL term has none. None for 1.

    Returns:
        ``total`` carries gradients: its row k into the logits of peer k and nowhere else.
        ``cross_entropy`` includes ``mixed``, ``label_smoothing`` and both weights. ``kl`` is the
        term of the formula above before w, with T^2; 0 if it was not computed.
    """
    # Half precision has too few digits for the sums over classes and over rows.
    logits_KBC = at_least_single(logits_KBC)
    log_p = F.log_softmax(logits_KBC, dim=-1)  # [K, B, C]
    # gather needs a valid class; what it picks for an unused label is multiplied by 0 below.
    known_B = labels_B if label_weight is None else labels_B.clamp(min=0)
    cross_entropy = _cross_entropy(log_p, known_B, class_weights_C)
    if mixed is not None:
        theirs = _cross_entropy(log_p, mixed.labels, class_weights_C)
        cross_entropy = mixed.share * cross_entropy + (1 - mixed.share) * theirs
    if label_smoothing:
        evenly = -log_p.mean(-1)  # [K, B]: the cross-entropy with every class alike
        if class_weights_C is not None:
            evenly = evenly * _weights_of_rows(class_weights_C, known_B, mixed)
        cross_entropy = (1 - label_smoothing) * cross_entropy + label_smoothing * evenly
    weight_B = None
    if label_weight is not None:
        # Multiplied, not left out: what is not finite must stay so, for the step to be skipped.
        weight_B = (labels_B >= 0).to(log_p.dtype) * label_weight
        cross_entropy = cross_entropy * weight_B
    if targets is None:
        return Losses(cross_entropy, cross_entropy, torch.zeros_like(cross_entropy))
    # At T = 1 both terms share one softmax, the usual case.
    log_q = log_p if temperature == 1 else F.log_softmax(logits_KBC / temperature, dim=-1)
    kl = kl_from_targets(log_q, targets) * temperature**2  # [K, B]; gradients shrink by 1 / T^2
    if sums_kl:
        kl = kl * targets.teachers
    if kl_on_labelled and weight_B is not None:
        kl = kl * weight_B
    # Parts are returned apart from the total: they are what the records and the display show.
    return Losses(cross_entropy + kl_weight * kl, cross_entropy, kl)


def _cross_entropy(log_p_KBC: Tensor, labels_B: Tensor, weights_C: Tensor | None) -> Tensor:
    """Return the cross-entropy of every peer with each row's class, [K, B], in nats."""
    found = -log_p_KBC.gather(2, labels_B.expand(len(log_p_KBC), -1)[..., None])[..., 0]
    return found if weights_C is None else found * weights_C[labels_B]


def _weights_of_rows(weights_C: Tensor, labels_B: Tensor, mixed: Mixed | None) -> Tensor:
    """Return the weight of each row's label, or the mean of those that it is mixed of, [B]."""
    own = weights_C[labels_B]
    return own if mixed is None else mixed.share * own + (1 - mixed.share) * weights_C[mixed.labels]


def balanced_weights(counts_C: Tensor) -> Tensor:
    """Return the inverse frequency of each class, with a mean of 1 over all images, [C] float64.

    That is N / (C n_c) for n_c of N images, where C counts the classes that have any; the others
    have the weight 0.

    Args:
        counts_C: images of each class.
    """
    counts = counts_C.double()
    present = counts > 0
    return torch.where(present, counts.sum() / (present.sum() * counts.clamp(min=1)), 0.0)


def kl_from_targets(log_p_KBC: Tensor, targets: Targets) -> Tensor:
    """Return the mean KL from the teachers of each peer k to p_k, row by row, [K, B], in nats."""
    return targets.negative_entropy - (targets.posterior * log_p_KBC).sum(-1)


@torch.no_grad()
def contributions(logits_KBC: Tensor, temperature: float = 1.0, target: str = "peers") -> Tensor:
    """Return what each peer contributes to the targets of those it teaches.

    Args:
        logits_KBC: logits of some peers for the same B images.
        temperature: T.
        target: see ``targets``.

    Returns:
        [K, B, C + 2], at least in single precision: the posterior, its negative entropy in nats,
        and 1 to count the teacher; all 0 where the logits are not finite. For ``mean-logit``,
        logits over T and no entropy.
    """
    scaled = at_least_single(logits_KBC) / temperature
    log_p = F.log_softmax(scaled, dim=-1)  # [K, B, C]
    # A row that is not finite would spoil the sum that all other peers learn from.
    finite = log_p.isfinite().all(-1, keepdim=True)  # [K, B, 1]
    p = log_p.exp()
    negative_entropy = (p * log_p).sum(-1, keepdim=True)
    if target == "mean-logit":
        # Logits are averaged first; their softmax and its entropy are taken of the mean.
        p, negative_entropy = scaled, torch.zeros_like(negative_entropy)
    return torch.cat(
        [
            torch.where(finite, p, 0.0),
            torch.where(finite, negative_entropy, 0.0),
            finite.to(p.dtype),
        ],
        dim=-1,
    )


@torch.no_grad()
def targets(sums_KBC: Tensor, target: str = "peers") -> Targets:
    """Return the targets of K peers from sums over their teachers.

    Args:
        sums_KBC: sums of ``contributions``, each times the weight of its link, [K, B, C + 2].
        target: ``peers``: every teacher; ``mean-prob``: the mean of their posteriors, which has
            the same gradient; ``mean-logit``: the posterior of their mean logits.
    """
    content, negative_entropy, teachers = sums_KBC.split([sums_KBC.shape[-1] - 2, 1, 1], -1)
    divisor = torch.where(teachers > 0, teachers, 1.0)  # the mean over no teachers is 0
    posterior = content / divisor  # [K, B, C]
    negative_entropy = (negative_entropy / divisor)[..., 0]
    if target == "mean-logit":
        posterior = torch.where(teachers > 0, F.softmax(posterior, dim=-1), 0.0)
    if target != "peers":
        posterior = posterior.clamp(min=0)  # a difference of sums may be just below 0
        negative_entropy = torch.special.xlogy(posterior, posterior).sum(-1)
    return Targets(posterior, negative_entropy, teachers[..., 0])


def at_least_single(logits: Tensor) -> Tensor:
    """Return logits in single precision, or in double if they are double."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
