"""The losses of Deep Mutual Learning (Zhang et al., CVPR 2018, section 2): pure functions.

    L_k = CE(z_k, y) + w T^2 mean_{l != k} KL(p_l || p_k),    p_k = softmax(z_k / T)

The peers' posteriors p_l are constants: no gradient of L_k reaches peer l. Cross-entropy is linear
in the posterior that it is taken against, so

    mean_l KL(p_l || p_k) = CE(mean_l p_l, p_k) - mean_l H(p_l)

and the sum over all peers less one's own term serves every peer: O(K) work, not O(K^2).

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


def mutual_losses(
    logits_KBC: Tensor,
    labels_B: Tensor,
    *,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    kl_reduction: str = "mean",
) -> Losses:
    """Compute every peer's loss on every row.

    Args:
        logits_KBC: logits of K peers for the same B images; computed on in single precision at
            least, whatever their own.
        labels_B: classes, int64.
        kl_weight: w. At 0, as for K = 1, the KL term is not computed at all: 0 times a peer's
            NaN would be NaN.
        temperature: T of the KL term.
        kl_reduction: ``mean`` or ``sum`` over the K - 1 peers.

    Returns:
        ``total`` carries gradients: row k of it into logits k and nowhere else. ``kl`` is the
        term as it stands in the sum above, before w, T^2 included. The KL part of ``total`` is
        0 where it was not computed.
    """
    logits_KBC = logits_KBC.to(torch.promote_types(logits_KBC.dtype, torch.float32))
    log_p = F.log_softmax(logits_KBC, dim=-1)
    peers = len(logits_KBC)
    cross_entropy = -log_p.gather(2, labels_B.expand(peers, -1)[..., None])[..., 0]
    if peers == 1 or kl_weight == 0:
        return Losses(cross_entropy, cross_entropy, torch.zeros_like(cross_entropy))
    log_q = log_p if temperature == 1 else F.log_softmax(logits_KBC / temperature, dim=-1)
    kl = kl_from_peers(log_q) * temperature**2
    if kl_reduction == "sum":
        kl = kl * (peers - 1)
    return Losses(cross_entropy + kl_weight * kl, cross_entropy, kl)


def kl_from_peers(log_p_KBC: Tensor) -> Tensor:
    """Return mean_{l != k} KL(p_l || p_k) for every peer k and row, [K, B], in nats.

    Row k carries a gradient into ``log_p_KBC[k]`` alone: the others are targets.
    """
    others = len(log_p_KBC) - 1
    with torch.no_grad():
        p = log_p_KBC.exp()
        target = (p.sum(0) - p) / others
        negative_entropy = (p * log_p_KBC).sum(-1)
        mean_negative_entropy = (negative_entropy.sum(0) - negative_entropy) / others
    return mean_negative_entropy - (target * log_p_KBC).sum(-1)
