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
        posterior: mean posterior of those that teach the peer, [K, B, C]; for ``mean-logit`` the
            posterior of their mean logits.
        negative_entropy: mean of their negative entropies in nats, [K, B]; where there is one
            target (``mean-prob``, ``mean-logit``), that of the target.
        teachers: how many they are, or the sum of their links' weights, [K, B].
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
    kl_is_summed: bool = False,
    label_weight: Tensor | None = None,
    kl_on_labelled: bool = False,
) -> Losses:
    """Compute the loss of K peers on every row.

    Args:
        logits_KBC: logits of K peers for the same B images; computed on in single precision at
            least, whatever their own.
        labels_B: classes, int64; -1 where the label is not to be used.
        targets: what each of these peers is taught at ``temperature``. None where nobody teaches
            anybody: the KL term is then not computed at all, as 0 times a peer's NaN is NaN.
        kl_weight: w.
        temperature: T of the KL term.
        kl_is_summed: over the other peers, instead of averaged.
        label_weight: what a labelled row counts, so that the mean over the whole batch is a mean
            over its labelled rows (CVPR 2018, section 3.4). None where all rows are labelled.
        kl_on_labelled: rows without a label have no KL term either.

    Returns:
        ``total`` carries gradients: row k of it into logits k and nowhere else.
        ``cross_entropy`` is times ``label_weight``. ``kl`` is the term as it stands in the sum
        above, before w, T^2 included; 0 where it was not computed.
    """
    logits_KBC = at_least_single(logits_KBC)
    log_p = F.log_softmax(logits_KBC, dim=-1)
    peers = len(logits_KBC)
    known_B = labels_B if label_weight is None else labels_B.clamp(min=0)
    cross_entropy = -log_p.gather(2, known_B.expand(peers, -1)[..., None])[..., 0]
    weight_B = None
    if label_weight is not None:
        # Multiplied and not left out: what is not finite must stay so, for the step to be skipped.
        weight_B = (labels_B >= 0).to(log_p.dtype) * label_weight
        cross_entropy = cross_entropy * weight_B
    if targets is None:
        return Losses(cross_entropy, cross_entropy, torch.zeros_like(cross_entropy))
    log_q = log_p if temperature == 1 else F.log_softmax(logits_KBC / temperature, dim=-1)
    kl = kl_from_targets(log_q, targets) * temperature**2
    if kl_is_summed:
        kl = kl * targets.teachers
    if kl_on_labelled and weight_B is not None:
        kl = kl * weight_B
    return Losses(cross_entropy + kl_weight * kl, cross_entropy, kl)


def kl_from_targets(log_p_KBC: Tensor, targets: Targets) -> Tensor:
    """Return the mean KL from what each peer k is taught to p_k, row by row, [K, B], in nats."""
    return targets.negative_entropy - (targets.posterior * log_p_KBC).sum(-1)


@torch.no_grad()
def lessons(logits_KBC: Tensor, temperature: float = 1.0, target: str = "peers") -> Tensor:
    """Return what each peer teaches, to be added up over the teachers of a peer.

    Args:
        logits_KBC: logits of some peers for the same B images.
        temperature: T.
        target: see ``targets``.

    Returns:
        [K, B, C + 2], in single precision at least: posterior, its negative entropy in nats, and 1;
        all 0 where a peer's logits are not finite. Logits over T and no entropy for
        ``mean-logit``.
    """
    scaled = at_least_single(logits_KBC) / temperature
    log_p = F.log_softmax(scaled, dim=-1)
    finite = log_p.isfinite().all(-1, keepdim=True)
    p = log_p.exp()
    negative_entropy = (p * log_p).sum(-1, keepdim=True)
    if target == "mean-logit":
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
def targets(taught_KBC: Tensor, target: str = "peers") -> Targets:
    """Return the targets of K peers from the sums over their teachers.

    Args:
        taught_KBC: sums of ``lessons``, each times its link's weight, [K, B, C + 2].
        target: ``peers``: every teacher; ``mean-prob``: the mean of their posteriors, which has
            the same gradient; ``mean-logit``: the posterior of their mean logits.
    """
    content, negative_entropy, teachers = taught_KBC.split([taught_KBC.shape[-1] - 2, 1, 1], -1)
    divisor = torch.where(teachers > 0, teachers, 1.0)  # a mean of nothing is 0 here
    posterior = content / divisor
    negative_entropy = (negative_entropy / divisor)[..., 0]
    if target == "mean-logit":
        posterior = torch.where(teachers > 0, F.softmax(posterior, dim=-1), 0.0)
    if target != "peers":
        posterior = posterior.clamp(min=0)  # what is left of a difference may be just below
        negative_entropy = torch.special.xlogy(posterior, posterior).sum(-1)
    return Targets(posterior, negative_entropy, teachers[..., 0])


def at_least_single(logits: Tensor) -> Tensor:
    """Return the logits in single precision, or in double where they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
