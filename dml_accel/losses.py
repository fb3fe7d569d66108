"""The losses of Deep Mutual Learning (Zhang et al., CVPR 2018, section 2): pure functions.

    L_k = CE(z_k, y) + w T^2 mean_{l != k} KL(p_l || p_k),    p_k = softmax(z_k / T)

The peers' posteriors p_l are constants: no gradient of L_k reaches peer l. Cross-entropy is linear
in the posterior that it is taken against, so

    mean_l KL(p_l || p_k) = CE(mean_l p_l, p_k) - mean_l H(p_l)

and the sum over all peers less one's own term serves every peer: O(K) work, not O(K^2). A peer
whose logits for an image are not finite teaches nobody that image.

Shape letters: K peers, B rows of the batch, C classes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Losses(NamedTuple):
    """The named parts of every peer's loss, one value per row, all [K, B], in nats."""

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor


class Targets(NamedTuple):
    """What every peer is taught, row by row: constants.

    Attributes:
        posterior: mean posterior of the other peers, [K, B, C].
        negative_entropy: mean of the others' negative entropies in nats, [K, B].
        teachers: how many others that is, [K, B].
    """

    posterior: Tensor
    negative_entropy: Tensor
    teachers: Tensor


def mutual_losses(
    logits_KBC: Tensor,
    labels_B: Tensor,
    targets: Targets | None,
    *,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    kl_reduction: str = "mean",
) -> Losses:
    """Compute the loss of K peers on every row.

    Args:
        logits_KBC: logits of K peers for the same B images; computed on in single precision at
            least, whatever their own.
        labels_B: classes, int64.
        targets: what each of these peers is taught at ``temperature``. None where nobody teaches
            anybody: the KL term is then not computed at all, as 0 times a peer's NaN is NaN.
        kl_weight: w.
        temperature: T of the KL term.
        kl_reduction: ``mean`` or ``sum`` over the other peers.

    Returns:
        ``total`` carries gradients: row k of it into logits k and nowhere else. ``kl`` is the
        term as it stands in the sum above, before w, T^2 included; 0 where it was not computed.
    """
    logits_KBC = at_least_single(logits_KBC)
    log_p = F.log_softmax(logits_KBC, dim=-1)
    peers = len(logits_KBC)
    cross_entropy = -log_p.gather(2, labels_B.expand(peers, -1)[..., None])[..., 0]
    if targets is None:
        return Losses(cross_entropy, cross_entropy, torch.zeros_like(cross_entropy))
    log_q = log_p if temperature == 1 else F.log_softmax(logits_KBC / temperature, dim=-1)
    kl = kl_from_targets(log_q, targets) * temperature**2
    if kl_reduction == "sum":
        kl = kl * targets.teachers
    return Losses(cross_entropy + kl_weight * kl, cross_entropy, kl)


def kl_from_targets(log_p_KBC: Tensor, targets: Targets) -> Tensor:
    """Return mean_{l != k} KL(p_l || p_k) for every peer k and row, [K, B], in nats."""
    return targets.negative_entropy - (targets.posterior * log_p_KBC).sum(-1)


@torch.no_grad()
def posterior_sums(logits_KBC: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over peers, row by row: posteriors, negative entropy in nats, peers that are finite.

    Sums of parts of a cohort add up to the sums of the cohort.

    Args:
        logits_KBC: logits of some peers for the same B images.
        temperature: T.

    Returns:
        [B, C + 2], in single precision at least.
    """
    return torch.cat(_parts(logits_KBC, temperature), dim=-1).sum(0)


@torch.no_grad()
def targets(sums_BC: Tensor, logits_KBC: Tensor, temperature: float = 1.0) -> Targets:
    """Return what K peers of a cohort are taught by the others: the sums less their own part.

    Args:
        sums_BC: ``posterior_sums`` of the whole cohort, [B, C + 2].
        logits_KBC: logits of these K peers, as they went into the sums.
        temperature: T.
    """
    posterior, negative_entropy, own = _parts(logits_KBC, temperature)
    classes = posterior.shape[-1]
    all_posterior, all_negative_entropy, everyone = sums_BC.split([classes, 1, 1], dim=-1)
    teachers = everyone - own
    divisor = teachers.clamp(min=1)  # nobody is left: a mean of nothing is 0 here
    return Targets(
        (all_posterior - posterior) / divisor,
        ((all_negative_entropy - negative_entropy) / divisor)[..., 0],
        teachers[..., 0],
    )


def _parts(logits_KBC: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return posteriors [K, B, C], negative entropies and whether finite [K, B, 1]; else zeros."""
    log_p = F.log_softmax(at_least_single(logits_KBC) / temperature, dim=-1)
    finite = log_p.isfinite().all(-1, keepdim=True)
    p = log_p.exp()
    negative_entropy = (p * log_p).sum(-1, keepdim=True)
    return (
        torch.where(finite, p, 0.0),
        torch.where(finite, negative_entropy, 0.0),
        finite.to(p.dtype),
    )


def at_least_single(logits: Tensor) -> Tensor:
    """Return the logits in single precision, or in double where they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
